"""Ranks that write into each other's memory.

What one rank sends another goes straight to where that one reads it, by a copy engine, and a flag says that it is there. NCCL's kernels
need multiprocessors instead, and attention leaves them none until it ends: more than half of a ring's communication was waited for.

Ranks of one host can, whose GPUs reach each other's memory. All ranks of a group find the same: each says whether it is able before
anything is shared, and whether what the others wrote has come. Other groups use collectives, and so does a CUDA graph that is
captured before anything was shared.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from sage_inductor.torch_internals import symmetric

log = logging.getLogger("sage_inductor")
FLAGS = 1024
_STEP = 2 << 20  # bytes are shared in multiples of it


class Queue(Protocol):
    """Work of one rank that is done in turn, beside its other queues."""

    def after(self, other: Any) -> None:
        """What follows here is done when what `other`, a queue of the same rank, has been given so far is."""

    def copy(self, peer: int, at: int, pitch: int, source: Tensor) -> None:
        """Rows of `source`, `[rows, columns]` with adjacent columns, to the memory of rank `peer`: the first to byte `at`, each other
        `pitch` bytes behind the one before. `source` must stay until that is done."""

    def signal(self, peer: int, flag: int) -> None:
        """Sets a flag of rank `peer`, when everything before is done and can be seen there."""

    def wait(self, flag: int) -> None:
        """Waits until a flag of this rank is set, and takes it back."""


@dataclass
class Peers:
    """This rank among those that write into each other's memory."""

    rank: int
    ranks: int
    memory: Tensor
    """uint8 `[bytes]`: this rank's, which the others write."""
    current: Queue
    """Where attention is computed."""
    outgoing: Queue
    returning: Queue

    @property
    def others(self) -> list[int]:
        """The other ranks, those first that come next."""
        return [(self.rank + step) % self.ranks for step in range(1, self.ranks)]


@dataclass
class _Shared:
    """What a group shares for one purpose."""

    group: ref[Any]
    is_able: bool = True
    size: int = 0
    peers: Peers | None = None
    flags: Tensor | None = None
    is_captured: bool = False  # a CUDA graph has the addresses
    stream: torch.cuda.Stream | None = None  # of the last call


_SHARED: dict[tuple[str, str], _Shared] = {}
_CAPTURED: list[_Shared] = []  # what CUDA graphs may write when they are replayed


def may_reach(device: torch.device) -> bool:
    """Whether ranks on such a device may be able to write into each other's memory."""
    return device.type == "cuda" and symmetric.is_available()


def peers_of(
    group_name: str, purpose: str, size: int, device: torch.device, first: Iterable[int]
) -> Peers | None:
    """The ranks of a group, which share `size` bytes of each; None where they do not reach each other's memory. What is shared for a
    `purpose` stays, and grows when more is asked for. All ranks ask for as much at the same time. `first`: the flags of this rank
    that are set in the beginning."""
    if not may_reach(device):
        return None
    group = symmetric.group_named(group_name)
    is_capturing = torch.cuda.is_current_stream_capturing()
    shared = _SHARED.get((group_name, purpose))
    if shared is None or shared.group() is not group:
        shared = _Shared(ref(group))
    if shared.is_able and shared.size < size:
        if is_capturing:
            return None
        if shared.is_captured:
            _CAPTURED.append(shared)
        torch.cuda.synchronize(device)
        shared = _SHARED[group_name, purpose] = _new(group, -(-size // _STEP) * _STEP, device, first)
    shared.is_captured |= is_capturing
    if not is_capturing:
        stream = torch.cuda.current_stream(device)
        if shared.stream not in (None, stream):
            stream.wait_stream(shared.stream)  # calls share their flags: one begins behind the other
        shared.stream = stream
    return shared.peers


def _new(group: Any, size: int, device: torch.device, first: Iterable[int]) -> _Shared:
    """`size` bytes of each rank that all can write, if they can."""
    unable = _Shared(ref(group), is_able=False)
    here = _place(group, device)
    places = _said(group, here)
    if None in places or len({place[0] for place in places}) > 1 or len(set(places)) < len(places):
        return unable  # several hosts, a GPU that two ranks share, a torch or a driver that lacks something
    shared = _Shared(ref(group), size=size)
    reasons = _said(group, _try(lambda: _share(shared, group, size, device)))
    if not any(reasons):
        reasons = _said(group, _try(lambda: _write_to_all(shared)))
    if not any(reasons):
        reasons = _said(group, _try(lambda: _see_whether_all_wrote(shared, set(first))))
    if any(reasons):
        log.warning(
            "sage_inductor: ranks of one host send by collectives, since they cannot write into each other's memory: %s",
            next(filter(None, reasons)),
        )
        return unable
    return shared


def _place(group: Any, device: torch.device) -> tuple[str, str] | None:
    """(host, GPU) of this rank; None where it has no way to write into the memory of others."""
    if "nccl" not in torch.distributed.get_backend(group) or find_spec("cuda.bindings") is None:
        return None
    boot = Path("/proc/sys/kernel/random/boot_id")  # hosts may have one name
    host = f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
    return host, str(torch.cuda.get_device_properties(device).uuid)


def _said(group: Any, word: Any) -> list[Any]:
    """What each rank of the group says here."""
    words: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(words, word, group=group)
    return words


def _try(step: Any) -> str:
    """Why `step` failed; empty where it did not."""
    try:
        step()
    except (RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _share(shared: _Shared, group: Any, size: int, device: torch.device) -> None:
    from sage_inductor.operators.distributed.streams import StreamQueue

    memory, addresses = symmetric.shared_bytes(size, device, group.group_name)
    flags, flag_addresses = symmetric.shared_bytes(4 * FLAGS, device, group.group_name)
    shared.flags = flags.view(torch.int32)
    shared.flags.zero_()
    memory[: group.size()].zero_()
    torch.cuda.synchronize(device)

    def queue(stream: torch.cuda.Stream | None) -> StreamQueue:
        return StreamQueue(group.rank(), addresses, flag_addresses, stream)

    streams = [torch.cuda.Stream(device) for _ in range(2)]
    shared.peers = Peers(group.rank(), group.size(), memory, queue(None), *map(queue, streams))


def _write_to_all(shared: _Shared) -> None:
    assert shared.peers is not None
    peers = shared.peers
    number = torch.full((1, 1), peers.rank + 1, dtype=torch.uint8, device=peers.memory.device)
    for peer in peers.others:
        peers.current.copy(peer, peers.rank, 1, number)
        peers.current.signal(peer, peers.rank)
    torch.cuda.synchronize(number.device)


def _see_whether_all_wrote(shared: _Shared, first: set[int]) -> None:
    """Raises RuntimeError where a number or a flag of another rank is not there. Sets the flags `first`."""
    peers, flags = shared.peers, shared.flags
    assert peers is not None and flags is not None
    for peer in peers.others:
        if (int(peers.memory[peer]), int(flags[peer])) != (peer + 1, 1):
            raise RuntimeError(f"what rank {peer} wrote is not there")
    flags.zero_()
    if first:
        flags[sorted(first)] = 1
    torch.cuda.synchronize(flags.device)
