"""One decision for all ranks: where times are measured, ranks that measure for themselves may choose differently, and then
compute other numbers for what they hold in common.

Ranks meet in the store of their process group, under the name of the comparison. Each leaves its vote there: what it would
choose, and which kernels it can run. The vote of the lowest rank is the decision, unless another cannot run it: then all
stay. Whoever has all votes writes the decision, and the first that is written holds for everybody.

Nothing here is a collective. A rank that never meets the comparison, as a stage of a pipeline does not, is waited for once,
`WAIT` seconds; one that comes too late finds the decision and keeps to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sage_inductor.kernels.base import reason
from sage_inductor.torch_internals.distributed import default_store
from sage_inductor.tuning.comparison import Comparison

log = logging.getLogger(__name__)

WAIT = 30.0  # seconds: ranks that compile the same model are seconds apart, most of them for a kernel's own compilation
_EVERY = 0.02  # seconds between two looks; a store that blocks would keep other threads from it
_FOLDER = "sage_inductor/decisions"


@dataclass(frozen=True)
class Choice:
    """What runs at a site.

    `kernel` runs from `min_q_len` queries and `min_kv_len` keys on, and exact attention below. None leaves SDPA, for all
    the `reasons`. `speedup` is SDPA's time over the kernel's, where that was measured.
    """

    kernel: str | None
    reasons: tuple[str, ...] = ()
    speedup: float | None = None
    min_q_len: int = 0
    min_kv_len: int = 0

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Choice:
        return cls(**{**data, "reasons": tuple(data["reasons"])})


@dataclass(frozen=True)
class Vote:
    """The choice of one rank, in the precision that it takes, and why it cannot run each kernel that it cannot run."""

    choice: Choice
    precision: str
    unable: Mapping[str, str]


_decided: dict[str, Choice] = {}
_absent: dict[int, str] = {}
"""Ranks that were waited for in vain, with the first comparison that they did not come to. One that has come to it since is
waited for again."""
_met_in: list[Any] = []
"""The store that both belong to."""


def agreed(comparison: Comparison, vote: Vote, precision_is_open: bool) -> Choice:
    """What all ranks choose for `comparison`; the choice of `vote`, this rank's, where there are no others."""
    store = default_store()
    if store is None:
        return vote.choice
    if not _met_in or _met_in[0] is not store:
        _met_in[:] = [store]
        _decided.clear()
        _absent.clear()
    name = f"{_FOLDER}/{_name_of(comparison, 'auto' if precision_is_open else vote.precision)}"
    if name not in _decided:
        _decided[name] = _decision(store, name, vote)
    choice = _decided[name]
    if choice.kernel is not None and choice.kernel in vote.unable:
        # It was decided before this rank came.
        why = reason(f"kernel of the other ranks, {choice.kernel}", vote.unable[choice.kernel], "alike")
        log.warning("this rank stays with SDPA where others take a kernel: %s", why)
        return Choice(None, (why,))
    return choice


def _decision(store: Any, name: str, vote: Vote) -> Choice:
    store.set(f"{name}/{torch.distributed.get_rank()}", json.dumps(asdict(vote)))
    votes = _votes(store, name)
    if not store.check([f"{name}/decision"]):
        # Whatever it is set to is the first that was written.
        store.compare_set(f"{name}/decision", "", json.dumps(asdict(_outcome(votes))))
    return Choice.of_json(json.loads(store.get(f"{name}/decision")))


def _votes(store: Any, name: str) -> dict[int, Vote]:
    """The votes by rank, once all are there, there is a decision, or `WAIT` seconds are over."""
    deadline = time.monotonic() + WAIT
    votes: dict[int, Vote] = {}
    ranks = range(torch.distributed.get_world_size())
    while True:
        for rank in ranks:
            if rank not in votes and store.check([f"{name}/{rank}"]):
                data = json.loads(store.get(f"{name}/{rank}"))
                votes[rank] = Vote(Choice.of_json(data["choice"]), data["precision"], data["unable"])
            if rank in _absent and store.check([f"{_absent[rank]}/{rank}"]):
                del _absent[rank]
        missing = [rank for rank in ranks if rank not in votes and rank not in _absent]
        if not missing or store.check([f"{name}/decision"]):
            return votes
        if time.monotonic() > deadline:
            log.info("kernel chosen without ranks %s, which did not come by in %g s", missing, WAIT)
            _absent.update(dict.fromkeys(missing, name))
            return votes
        time.sleep(_EVERY)


def _outcome(votes: Mapping[int, Vote]) -> Choice:
    """The choice of the lowest rank, if all can carry it out in one precision."""
    first, *_ = (votes[rank] for rank in sorted(votes))
    precisions = {rank: vote.precision for rank, vote in sorted(votes.items())}
    if len(set(precisions.values())) > 1:
        found = ", ".join(f"{precision} on rank {rank}" for rank, precision in precisions.items())
        return Choice(None, (f"precision={found} (supported: one for all ranks)",))
    kernel = first.choice.kernel
    if kernel is None:
        return first.choice
    against = [
        f"{kernel} on rank {rank}: {vote.unable[kernel]}"
        for rank, vote in sorted(votes.items())
        if kernel in vote.unable
    ]
    return Choice(None, tuple(against), first.choice.speedup) if against else first.choice


def _name_of(comparison: Comparison, precision: str) -> str:
    """The same on every rank that meets this comparison. Where each has a part of the inputs, which may be larger than another
    rank's, it goes by the whole of them."""
    hinted = comparison.hinted()
    key = hinted.key()
    key["kernel"]["precision"] = precision
    key["symbolic"] = comparison.symbolic
    if not any(comparison.symbolic):
        key["lengths"] = hinted.lengths
    if comparison.whole:
        key = {"whole": comparison.whole, "symbolic": comparison.symbolic, **key}
        for part in (key, key["kernel"], key["sdpa"]):
            for name in ("batch", "q_len", "kv_len", "lengths", "query", "key", "value", "attn_mask"):
                part.pop(name, None)
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
