"""The rows of `bench`, each with the figures of one way to compute something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One way to compute something. Where `ms` is None it was not run, for the reasons in `problems`."""

    name: str
    precision: str
    ms: float | None = None
    speedup: float | None = None
    """The time of the first row over that of this one."""
    rel_l2: float | None = None
    tflops: float | None = None
    graph_breaks: int | None = None
    rewritten: int | None = None
    sites: int | None = None
    memory: int | None = None
    """Bytes that it takes beside its inputs and output at the most; of a kernel that did not run here, those of its copies in 8 bits
    (kernels/copies.py)."""
    memory_measured: bool = False
    problems: tuple[str, ...] = ()


def speedup(ms: float, rows: Sequence[Row]) -> float | None:
    baseline = rows[0].ms if rows else ms
    return None if baseline is None else baseline / ms
