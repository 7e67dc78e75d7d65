"""The inputs of `calibrate`: samples of calls of a model, and the steps that each of them speaks for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sage_inductor.plan.sites import Steps

VALID = "a tuple of arguments, a dict of keyword arguments, an iterable of those, or a dict of one per step"


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def copied(self) -> Sample:
        """A deep copy, so that every run of a model that writes to its inputs (a KV cache) begins alike."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class Phase:
    """The samples that decide about a range of steps. `steps` is None where they decide about all steps."""

    steps: Steps | None
    samples: tuple[Sample, ...]


def phases_of(inputs: Any) -> tuple[Phase, ...]:
    """The phases in `inputs`, which has one of the forms of `calibrate`.

    Raises TypeError for anything else, and ValueError for no samples and for steps that overlap.
    """
    if isinstance(inputs, Mapping) and inputs and not all(isinstance(key, str) for key in inputs):
        return _phases_of_steps(inputs)
    return (Phase(None, _samples(inputs, "inputs")),)


def _phases_of_steps(inputs: Mapping[Any, Any]) -> tuple[Phase, ...]:
    for key in inputs:
        is_range = isinstance(key, tuple) and len(key) == 2 and _is_step(key[0])
        if not _is_step(key) and not (is_range and (key[1] is None or _is_step(key[1]))):
            raise TypeError(f"step {key!r} (valid: an int, or (first, last) with last None for no end)")
    ordered = sorted(inputs, key=lambda key: key if isinstance(key, int) else key[0])
    firsts = [key if isinstance(key, int) else key[0] for key in ordered]
    phases: list[Phase] = []
    for index, key in enumerate(ordered):
        following = firsts[index + 1] if index + 1 < len(ordered) else None
        if isinstance(key, int):
            # A calibrated step speaks for all steps up to the next calibrated one; the first also for those before it.
            steps: Steps = (0 if index == 0 else key, None if following is None else following - 1)
        else:
            steps = key
        first, last = steps
        if firsts[index] < 0 or (last is not None and last < first):
            raise ValueError(f"step {key!r} (valid: from 0, each once, and first <= last)")
        if following is not None and (last is None or last >= following):
            raise ValueError(f"step {key!r} reaches into that of {ordered[index + 1]!r}")
        phases.append(Phase(steps, _samples(inputs[key], f"inputs[{key!r}]")))
    return tuple(phases)


def _is_step(key: object) -> bool:
    return isinstance(key, int) and not isinstance(key, bool)


def _samples(inputs: Any, where: str) -> tuple[Sample, ...]:
    if isinstance(inputs, (tuple, Mapping)):
        return (_sample(inputs, where),)
    if isinstance(inputs, (Tensor, str)) or not isinstance(inputs, Iterable):
        raise TypeError(f"{where} is a {type(inputs).__name__} (valid: {VALID})")
    samples = tuple(_sample(sample, f"{where}[{index}]") for index, sample in enumerate(inputs))
    if not samples:
        raise ValueError(f"{where} has no samples")
    return samples


def _sample(sample: Any, where: str) -> Sample:
    if isinstance(sample, Mapping) and all(isinstance(key, str) for key in sample):
        return Sample((), dict(sample))
    if isinstance(sample, (tuple, list)):  # a list: what a DataLoader makes of a tuple
        return Sample(tuple(sample), {})
    raise TypeError(
        f"{where} is a {type(sample).__name__} (valid: a tuple of arguments, a dict of keyword ones)"
    )
