"""What is known of the numbers in formulas: the indices go from 0 to a size less one, symbolic sizes have bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sage_inductor.graph.sizes import Size
from sage_inductor.rewriting.masks.algebra import both, either, subtract
from sage_inductor.rewriting.masks.formula import (
    FALSE,
    TRUE,
    AllOf,
    AnyOf,
    AtLeastZero,
    Condition,
    IsZero,
    Linear,
    Quantity,
    Quotient,
    plain,
)
from sage_inductor.torch_internals.sizes import bounds_of

Bounds = tuple["int | None", "int | None"]


@dataclass(eq=False)
class Ranges:
    """`sizes`: how many values each index has. `shape_env`: where the bounds of symbolic sizes are known."""

    sizes: dict[str, Size]
    shape_env: Any = None
    _known: dict[Any, Bounds] = field(default_factory=dict)

    def of_size(self, size: Size) -> Bounds:
        """(least, most) of a size, or of a sum of them; None where it is not known."""
        if isinstance(size, int):
            return size, size
        if size not in self._known:
            self._known[size] = (None, None) if self.shape_env is None else bounds_of(size, self.shape_env)
        return self._known[size]

    def least(self, number: Linear) -> int | None:
        end = self._end(number, upper=False)
        return None if end is None else self.of_size(end)[0]

    def most(self, number: Linear) -> int | None:
        end = self._end(number, upper=True)
        return None if end is None else self.of_size(end)[1]

    def _end(self, number: Linear, upper: bool) -> Size | None:
        total = number.constant
        for term, count in number.terms:
            end = self._end_of(term, upper == (count > 0))
            if end is None:
                return None
            total = total + count * end
        return plain(total)

    def _end_of(self, term: Quantity, upper: bool) -> Size | None:
        if isinstance(term, str):
            if not upper:
                return 0
            size = self.sizes.get(term)
            return None if size is None else size - 1
        if isinstance(term, Quotient):
            end = self.most(term.number) if upper else self.least(term.number)
            return None if end is None else end // term.divisor
        return None

    def simplified(self, condition: Condition) -> Condition:
        """`condition` without what always or never holds, and without comparisons that others imply."""
        if isinstance(condition, AtLeastZero):
            if (least := self.least(condition.number)) is not None and least >= 0:
                return TRUE
            return FALSE if (most := self.most(condition.number)) is not None and most < 0 else condition
        if isinstance(condition, IsZero):
            least, most = self.least(condition.number), self.most(condition.number)
            if (least is not None and least > 0) or (most is not None and most < 0):
                return TRUE if condition.negated else FALSE
            if least == most == 0:
                return FALSE if condition.negated else TRUE
            return condition
        if isinstance(condition, (AllOf, AnyOf)):
            join = both if isinstance(condition, AllOf) else either
            joined = join(*map(self.simplified, condition.parts))
            if not isinstance(joined, type(condition)):
                return joined  # one part alone, or what decides: of nothing but FALSE no conjunction is left
            return join(*self._decisive(joined.parts, isinstance(joined, AllOf)))
        return condition

    def _decisive(self, parts: Iterable[Condition], strongest: bool) -> list[Condition]:
        """`parts` without comparisons that others imply (`strongest`: in a conjunction), or that imply others."""
        kept: list[Condition] = []
        for part in parts:
            if isinstance(part, AtLeastZero):
                others = [item for item in kept if isinstance(item, AtLeastZero)]
                if any(self._implies(*((item, part) if strongest else (part, item))) for item in others):
                    continue
                for item in others:
                    if self._implies(*((part, item) if strongest else (item, part))):
                        kept.remove(item)
            kept.append(part)
        return kept

    def _implies(self, one: AtLeastZero, other: AtLeastZero) -> bool:
        """Whether `other` holds wherever `one` does: its number is never the smaller."""
        difference = subtract(other.number, one.number)
        least = self.least(difference) if isinstance(difference, Linear) else None
        return least is not None and least >= 0
