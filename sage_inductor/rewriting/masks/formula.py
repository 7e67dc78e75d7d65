"""Formulas: what one element of a mask is, as a function of where it stands.

The element of `arange(n)[None] <= arange(n)[:, None]` at query q and key k is `k <= q`. Numbers are linear in the indices, as far
as they are understood, with whole coefficients: `q - k + 3`. Sizes in them may be symbolic. Conditions are conjunctions and
disjunctions of comparisons of such numbers with 0, negations resolved. All are records that compare by what they say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from sage_inductor.graph.sizes import Size

BATCH, HEAD, QUERY, KEY = "batch", "head", "query", "key"
"""The indices of a mask's element, from dim -4 to dim -1."""


class NotUnderstood(Exception):
    """A value is no formula, as far as is known."""


@dataclass(frozen=True)
class Data:
    """The element of `node`, a tensor of which nothing is known while compiling, at `index`."""

    node: fx.Node
    index: tuple[Scalar, ...]


@dataclass(frozen=True)
class Quotient:
    """`number // divisor`, rounded down."""

    number: Linear
    divisor: int


Quantity: TypeAlias = "str | Data | Quotient"


@dataclass(frozen=True)
class Linear:
    """The sum of `coefficient * term` and a constant, which may be a symbolic size."""

    terms: tuple[tuple[Quantity, int], ...] = ()
    constant: Size = 0


@dataclass(frozen=True)
class Real:
    """A float that is no small whole number: -inf, .5, the lowest of a dtype."""

    number: float


@dataclass(frozen=True)
class Extreme:
    """The largest of `numbers`, or the smallest."""

    largest: bool
    numbers: tuple[Scalar, ...]


@dataclass(frozen=True)
class Conditional:
    """`chosen` where `condition` holds, else `other`."""

    condition: Condition
    chosen: Scalar
    other: Scalar


class Condition:
    """A formula that holds or does not."""


@dataclass(frozen=True)
class AtLeastZero(Condition):
    """`number >= 0`."""

    number: Linear


@dataclass(frozen=True)
class IsZero(Condition):
    """`number == 0`, or with `negated` that it is not."""

    number: Linear
    negated: bool = False


@dataclass(frozen=True)
class Holds(Condition):
    """A bool that is read, or its negation."""

    data: Data
    negated: bool = False


@dataclass(frozen=True)
class AllOf(Condition):
    """All of `parts` hold; with none, always."""

    parts: frozenset[Condition]


@dataclass(frozen=True)
class AnyOf(Condition):
    """Any of `parts` holds; with none, never."""

    parts: frozenset[Condition]


Scalar: TypeAlias = "Linear | Real | Extreme | Conditional | Data | Condition"
TRUE, FALSE = AllOf(frozenset()), AnyOf(frozenset())
ZERO, ONE = Linear(), Linear(constant=1)


def variable(name: str) -> Linear:
    return Linear(((name, 1),))


def number(value: Any) -> Linear | Real:
    """A constant: a number, or a symbolic size."""
    if isinstance(value, float):
        whole = math.isfinite(value) and value == int(value) and abs(value) < 2**24
        return Linear(constant=int(value)) if whole else Real(value)
    return Linear(constant=plain(value))


def plain(size: Size) -> Size:
    """`size` as an int where it is one."""
    return int(size) if isinstance(size, bool) or getattr(size, "is_Integer", False) else size


def data(node: fx.Node, index: tuple[Scalar, ...]) -> Linear:
    """The integer element of `node` at `index` as a number."""
    return Linear(((Data(node, index), 1),))


def constant_of(scalar: Scalar) -> Size | None:
    """The constant that `scalar` is, None where it is none."""
    return scalar.constant if isinstance(scalar, Linear) and not scalar.terms else None


def names_of(scalar: Scalar | Quotient) -> set[str]:
    """The indices of the element, BATCH to KEY, that `scalar` depends on, also by way of what is read."""
    found: set[str] = set()
    for part in parts_of(scalar):
        if isinstance(part, Linear):
            found |= {term for term, _ in part.terms if isinstance(term, str)}
    return found


def data_of(scalar: Scalar) -> list[Data]:
    """All that is read in `scalar`, in the indices of what is read too."""
    return [part for part in parts_of(scalar) if isinstance(part, Data)]


def parts_of(scalar: Scalar | Quotient) -> Iterable[Any]:
    """`scalar` and all formulas in it."""
    yield scalar
    inner: Iterable[Any] = ()
    if isinstance(scalar, Linear):
        inner = (term for term, _ in scalar.terms if not isinstance(term, str))
    elif isinstance(scalar, (AtLeastZero, IsZero, Quotient)):
        inner = (scalar.number,)
    elif isinstance(scalar, Holds):
        inner = (scalar.data,)
    elif isinstance(scalar, (AllOf, AnyOf)):
        inner = scalar.parts
    elif isinstance(scalar, Conditional):
        inner = (scalar.condition, scalar.chosen, scalar.other)
    elif isinstance(scalar, Extreme):
        inner = scalar.numbers
    elif isinstance(scalar, Data):
        inner = scalar.index
    for item in inner:
        yield from parts_of(item)
