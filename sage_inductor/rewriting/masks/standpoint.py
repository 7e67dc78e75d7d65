"""From where in a graph a value is read, and who reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sage_inductor.rewriting.masks.formula import Scalar
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.views import Index


@dataclass(frozen=True)
class Standpoint:
    """From where a value is read: the position in the graph of what reads it, and the index of each level of vmap."""

    time: int
    levels: tuple[tuple[int, Scalar], ...] = ()

    def at(self, time: int) -> Standpoint:
        return Standpoint(time, self.levels)

    def inside(self, level: Any, index: Scalar) -> Standpoint:
        """Inside a level of vmap, at `index` of what it maps over."""
        return Standpoint(self.time, (*self.levels, (level, index)))


class Reads(Protocol):
    """Reads elements of tensors; `reading.Reader` does."""

    ranges: Ranges

    def read(self, item: Any, index: Index, place: Standpoint) -> Scalar:
        """The element of the tensor `item` at `index`. Raises NotUnderstood."""

    def number(self, value: Any, place: Standpoint) -> Scalar:
        """A number in the arguments of a node. Raises NotUnderstood."""
