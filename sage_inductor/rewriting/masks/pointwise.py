"""Operations that are computed element by element, on formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sage_inductor.graph.facts import AND, NOT, OR, XOR
from sage_inductor.rewriting.masks.algebra import (
    add,
    as_condition,
    at_least,
    both,
    choice,
    either,
    equal,
    extreme,
    multiply,
    negated,
    negative,
    quotient,
    remainder,
    subtract,
)
from sage_inductor.rewriting.masks.formula import ZERO, Condition, NotUnderstood, Scalar

# Operations on bits, which mean those on bools where the result is one.
BITWISE = frozenset(
    name
    for name in (*AND, *OR, *NOT, *XOR)
    if not name.startswith("logical")  # logical_and(2, 4) is True, 2 & 4 is 0
)


def _xor(left: Scalar, right: Scalar) -> Condition:
    one, other = as_condition(left), as_condition(right)
    return either(both(one, negated(other)), both(negated(one), other))


def _not(source: Scalar) -> Condition:
    return negated(as_condition(source))


def _where(condition: Scalar, chosen: Scalar, other: Scalar) -> Scalar:
    return choice(as_condition(condition), chosen, other)


def _masked_fill(source: Scalar, mask: Scalar, value: Scalar) -> Scalar:
    return choice(as_condition(mask), value, source)


def _clamp(source: Scalar, low: Scalar | None = None, high: Scalar | None = None) -> Scalar:
    found = source if low is None else extreme(True, source, low)
    return found if high is None else extreme(False, found, high)


def _absolute(number: Scalar) -> Scalar:
    return extreme(True, number, negative(number))


def _reversed_subtract(left: Scalar, right: Scalar) -> Scalar:
    return subtract(right, left)


def _divide(left: Scalar, right: Scalar) -> Scalar:
    if right == ZERO:
        raise NotUnderstood("a division by 0")
    return quotient(left, right)


@dataclass(frozen=True)
class Pointwise:
    """`function` of formulas, as an operation with so many `arguments` by position computes it."""

    function: Callable[..., Scalar]
    arguments: tuple[int, ...]


_ROWS: tuple[tuple[Callable[..., Scalar], tuple[str, ...]], ...] = (
    (add, ("add", "__add__", "__radd__")),
    (subtract, ("sub", "subtract", "__sub__")),
    (_reversed_subtract, ("rsub", "__rsub__")),
    (multiply, ("mul", "multiply", "__mul__", "__rmul__")),
    (negative, ("neg", "negative", "__neg__")),
    (_absolute, ("abs", "absolute", "__abs__")),
    (_divide, ("floordiv", "floor_divide", "__floordiv__")),
    (remainder, ("mod", "remainder", "__mod__")),
    (lambda left, right: extreme(True, left, right), ("maximum",)),
    (lambda left, right: extreme(False, left, right), ("minimum",)),
    (_clamp, ("clamp", "clip", "clamp_min")),
    (lambda source, high: extreme(False, source, high), ("clamp_max",)),
    (at_least, ("ge", "greater_equal", "__ge__")),
    (lambda left, right: at_least(right, left), ("le", "less_equal", "__le__")),
    (lambda left, right: negated(at_least(right, left)), ("gt", "greater", "__gt__")),
    (lambda left, right: negated(at_least(left, right)), ("lt", "less", "__lt__")),
    (equal, ("eq", "__eq__")),
    (lambda left, right: negated(equal(left, right)), ("ne", "not_equal", "__ne__")),
    (lambda left, right: both(as_condition(left), as_condition(right)), AND),
    (lambda left, right: either(as_condition(left), as_condition(right)), OR),
    (_not, NOT),
    (_xor, XOR),
    (_where, ("where",)),
    (_masked_fill, ("masked_fill",)),
)
_ARGUMENTS = {
    _where: (3,),
    _masked_fill: (3,),
    _clamp: (1, 2, 3),
    _absolute: (1,),
    negative: (1,),
    _not: (1,),
}
BY_NAME = {
    name: Pointwise(function, _ARGUMENTS.get(function, (2,))) for function, names in _ROWS for name in names
}
# What writes into its first argument, beside methods that end with an underscore.
IN_PLACE = {
    "iadd": "add", "isub": "sub", "imul": "mul", "iand": "and_", "ior": "or_", "ixor": "xor", "ifloordiv": "floordiv",
    "imod": "mod",
}  # fmt: skip
