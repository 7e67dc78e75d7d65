"""The decision at a site: the fastest kernel that can run there, or SDPA. SDPA wins ties."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sage_inductor import kernels
from sage_inductor.config import Config
from sage_inductor.kernels import AttentionProblem, Kernel
from sage_inductor.tuning import measure as measuring
from sage_inductor.tuning.agreement import Choice, Vote, agreed
from sage_inductor.tuning.comparison import Comparison
from sage_inductor.tuning.machine import Machine, machine
from sage_inductor.tuning.measure import CannotMeasure
from sage_inductor.tuning.store import Result, Store

log = logging.getLogger(__name__)

MARGIN = 0.02  # the share of SDPA's time that a kernel has to save at least: two runs of the same differ by as much
# For symbolic lengths. LONGER: up to how many times the hint a kernel is tried that loses at the hint. SHORTEST: the shortest
# length worth a measurement.
LONGER = 4
SHORTEST = 128


def choose(comparison: Comparison, config: Config, precision_is_open: bool = False) -> Choice:
    """The kernel for the site, or SDPA and every reason. Sizes may be symbolic; none is guarded on. Where times are measured
    and this process is a rank of several, it is what all ranks choose. `precision_is_open`: the precision is this device's
    fastest, and may be another on another's."""
    problem = comparison.problem
    if config.kernel != "auto":
        kernel, reasons = kernels.select(problem, config.kernel)
        return Choice(None if kernel is None else kernel.name, tuple(reasons))
    against = kernels.no_choice_reasons(problem)
    if against:
        return Choice(None, tuple(against))
    candidates, refused = kernels.candidates(problem)
    unable = {name: "; ".join(reasons) for name, reasons in refused.items()}
    choice = _of_this_rank(comparison, config, candidates, refused, unable)
    if config.tune != "measure":
        return choice
    return agreed(comparison, Vote(choice, problem.params.precision, unable), precision_is_open)


def _of_this_rank(
    comparison: Comparison,
    config: Config,
    candidates: Sequence[Kernel],
    refused: Mapping[str, Sequence[str]],
    unable: dict[str, str],
) -> Choice:
    """What this process chooses among `candidates`. Those that fail while they are measured are added to `unable`."""
    others = [text for reasons in refused.values() for text in reasons]
    if not candidates:
        return Choice(None, tuple(others))
    if config.tune == "off":
        return _without_measurement(candidates, comparison.problem, others)
    note: list[str] = []
    choice = None
    if config.tune == "measure":
        try:
            choice = _across_lengths(comparison, _by_measurement(candidates, config, unable))
        except CannotMeasure as why:
            note = [f"tune=measure: {why} (decided by the shipped table)"]
            if note[0] not in _warned:  # once, for as many equal layers as there are
                _warned.add(note[0])
                log.warning(note[0])
    if choice is None and comparison.sdpa.standing is not None:
        untold = f"tune={config.tune}: the shipped table compares with SDPA, not with {comparison.sdpa.name}"
        return Choice(None, (untold, *others, *note))
    if choice is None:
        choice = _across_lengths(comparison, _by_table(candidates))
    if choice.kernel is None:
        return Choice(None, (*choice.reasons, *others, *note), choice.speedup)
    return choice


def _without_measurement(
    candidates: Sequence[Kernel], problem: AttentionProblem, others: Sequence[str]
) -> Choice:
    """The first of `candidates` that need not be measured first; `others` are the reasons against other kernels."""
    against = {kernel.name: kernel.unmeasured_reasons(problem) for kernel in candidates}
    first = next((name for name, reasons in against.items() if not reasons), None)
    texts = [f"{name}: {text}" for name, reasons in against.items() for text in reasons]
    return Choice(first, () if first is not None else (*texts, *others))


def is_makeshift() -> bool:
    """Whether the table took the place of a measurement in this process. Such choices are not to outlive the process."""
    return bool(_unmeasurable)


@dataclass(frozen=True)
class _Outcome:
    """The result at one pair of lengths: the kernels that beat SDPA, best first, or why none does."""

    winners: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    speedup: float | None = None  # of the best kernel, be it below 1


_Judge = Callable[[Comparison], _Outcome]  # takes hinted comparisons


def _across_lengths(comparison: Comparison, judge: _Judge) -> Choice:
    """The choice at the hint and, where lengths are symbolic, the lengths from which it holds.

    Besides the hint, lengths are judged at powers of two and midway between, so that other hints find the same ones
    measured. If a kernel wins at the hint, shorter lengths are tried while it wins; else longer ones until a kernel wins. A
    hint of 3000 that is won is followed by 2048, 1024, .... Where both lengths are symbolic, they change by the same factor.
    """
    hinted = comparison.hinted()
    verdict = judge(hinted)
    symbolic_q, symbolic_kv = comparison.symbolic
    if not symbolic_q and not symbolic_kv:
        return Choice(next(iter(verdict.winners), None), verdict.reasons, verdict.speedup)
    q_len, kv_len = hinted.lengths
    hint = kv_len if symbolic_kv else q_len

    def lengths(length: int) -> tuple[int, int]:
        other = max(1, round(q_len * length / hint)) if symbolic_q else q_len
        return (other, length) if symbolic_kv else (length, kv_len)

    def winners(length: int) -> tuple[str, ...]:
        try:
            return judge(hinted.at(*lengths(length))).winners
        except CannotMeasure:  # not enough memory: such lengths do not run here
            return ()

    below = 1 << (max(hint, 2) - 1).bit_length() - 1  # the last power of two below the hint
    if verdict.winners:
        kernel, crossover = verdict.winners[0], hint
        while below >= SHORTEST and kernel in winners(below):
            crossover, below = below, below // 2
    else:
        longer = [below * 2 * factor for factor in (1, 2, 4) if hint < below * 2 * factor <= LONGER * hint]
        crossover = next((length for length in longer if winners(length)), 0)
        if crossover == 0:
            return Choice(None, verdict.reasons, verdict.speedup)
        kernel = winners(crossover)[0]
        below = max(hint, crossover // 2)
    between = (below + crossover) // 2
    if SHORTEST <= below < between < crossover and kernel in winners(between):
        crossover = between
    least_q, least_kv = lengths(crossover)
    return Choice(kernel, (), verdict.speedup, least_q if symbolic_q else 0, least_kv if symbolic_kv else 0)


def _by_table(candidates: Sequence[Kernel]) -> _Judge:
    """The first kernel in order whose shipped measurements say that it wins."""

    def judge(comparison: Comparison) -> _Outcome:
        reasons = {kernel.name: kernel.not_chosen_reasons(comparison.problem) for kernel in candidates}
        winners = tuple(name for name, against in reasons.items() if not against)
        texts = [f"{name}: {text}" for name, against in reasons.items() for text in against]
        return _Outcome(winners, () if winners else tuple(texts))

    return judge


def _by_measurement(candidates: Sequence[Kernel], config: Config, unable: dict[str, str]) -> _Judge:
    names = [kernel.name for kernel in candidates]

    def judge(comparison: Comparison) -> _Outcome:
        device = comparison.problem.query.device
        if device.type == "cuda" and not torch.cuda.is_available():
            raise CannotMeasure("no GPU to measure on")
        here = machine(device)
        result = _result(comparison, names, config, here)
        unable.update(result.failed)
        return _verdict(result, comparison, names, here)

    return judge


# (folder, fingerprint, key) -> what this process measured or read; (..., lengths) -> why it could not.
_known: dict[tuple[str | None, str, str], list[Result]] = {}
_unmeasurable: dict[tuple[str | None, str, str, tuple[int, int]], str] = {}
_warned: set[str] = set()


def _result(comparison: Comparison, names: Sequence[str], config: Config, here: Machine) -> Result:
    """Times that hold for a hinted `comparison`: known to this process, read from disk, or measured now. Raises
    CannotMeasure."""
    key, lengths = comparison.key(), comparison.lengths
    folder = None if config.cache_dir is None else os.fspath(config.cache_dir)
    where = (folder, here.fingerprint(), json.dumps(key, sort_keys=True))
    store = Store(folder, here)
    if where not in _known:
        _known[where] = store.load(key)
    for result in _known[where]:
        if result.decides(*lengths, names):
            return result
    device = comparison.problem.query.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CannotMeasure("a CUDA graph is being captured")
    this = (*where, lengths)
    if this in _unmeasurable:
        raise CannotMeasure(_unmeasurable[this])
    try:
        result = measuring.measure(comparison, names)
    except CannotMeasure as why:
        _unmeasurable[this] = str(why)
        raise
    for name, text in result.failed.items():
        log.warning("kernel %s failed while it was measured, and is not used: %s", name, text)
    for name, timing in result.kernels.items():
        if timing.scattered is not None and abs(timing.scattered - timing.ratio) > MARGIN:
            log.info(
                "%s takes %.2f of SDPA's time with a mask as models have it, which decides, and %.2f with keys left at random",
                name,
                timing.ratio,
                timing.scattered,
            )
    _known[where] = [result, *(other for other in _known[where] if (other.q_len, other.kv_len) != lengths)]
    if not result.failed:  # a kernel may have failed for a passing reason: later processes try again
        store.save(key, result)
    return result


def _verdict(result: Result, comparison: Comparison, names: Sequence[str], here: Machine) -> _Outcome:
    timed = sorted(
        (name for name in names if name in result.kernels), key=lambda name: result.kernels[name].ratio
    )
    winners = tuple(name for name in timed if result.kernels[name].ratio < 1 - _needed_gain(result, name))
    speedup = 1 / result.kernels[timed[0]].ratio if timed else None
    if winners:
        return _Outcome(winners, (), speedup)
    at = (
        "" if comparison.lengths == (result.q_len, result.kv_len) else f" at {result.q_len} x {result.kv_len}"
    )
    reasons = []
    for name in timed:
        tie = f", wins from {_needed_gain(result, name):.1%} less" if result.kernels[name].ratio < 1 else ""
        reasons.append(
            f"time={result.kernels[name].ms:.3g} ms {name} {comparison.problem.params.precision} "
            f"({comparison.sdpa.name}: {result.sdpa_ms:.3g} ms{at} on {here.device}, measured{tie})"
        )
    reasons += [
        f"{name}: failed while measured: {text}" for name, text in result.failed.items() if name in names
    ]
    return _Outcome((), tuple(reasons), speedup)


def _needed_gain(result: Result, name: str) -> float:
    """The share of SDPA's time that kernel `name` must save to count as faster."""
    return max(MARGIN, result.kernels[name].noise)
