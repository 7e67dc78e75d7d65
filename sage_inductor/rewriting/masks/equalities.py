"""What an equality says of the conditions beside it.

A mask of documents often counts positions within them: `doc[q] == doc[k]` and `q - start[doc[q]] >= k - start[doc[k]]`. Where
the ids are equal so are the starts, and the second condition is `q >= k`.
"""

from __future__ import annotations

from collections.abc import Iterable

from sage_inductor.rewriting.masks.algebra import add, at_least, equal, negated
from sage_inductor.rewriting.masks.formula import (
    ZERO,
    AtLeastZero,
    Condition,
    Data,
    IsZero,
    Linear,
    NotUnderstood,
    Quantity,
    Quotient,
    Scalar,
)


def equals(condition: Condition) -> tuple[Quantity, Quantity] | None:
    """The two numbers, each read or a quotient, of which `condition` says that they are equal; None where it says anything else."""
    if not isinstance(condition, IsZero) or condition.negated or condition.number.constant != 0:
        return None
    terms = condition.number.terms
    if len(terms) != 2 or {count for _, count in terms} != {1, -1}:
        return None
    first, second = (term for term, _ in terms)
    return None if isinstance(first, str) or isinstance(second, str) else (first, second)


def beside_equalities(conditions: Iterable[Condition]) -> list[Condition]:
    """`conditions`, which hold together, with one number for two that one of them says are equal, where that leaves less to read."""
    found = list(conditions)
    for equality in [item for item in found if equals(item) is not None]:
        pair = equals(equality)
        assert pair is not None
        found = [item if item is equality else _shorter(item, *pair) for item in found]
    return found


def _shorter(condition: Condition, first: Quantity, second: Quantity) -> Condition:
    if not isinstance(condition, (AtLeastZero, IsZero)):
        return condition
    try:
        number = _replaced(condition.number, first, second)
    except NotUnderstood:
        return condition
    if not isinstance(number, Linear) or len(number.terms) >= len(condition.number.terms):
        return condition
    if isinstance(condition, AtLeastZero):
        return at_least(number, ZERO)
    same = equal(number, ZERO)
    return negated(same) if condition.negated else same


def _replaced(number: Scalar, old: Quantity, new: Quantity) -> Scalar:
    """`number` with `new` for `old`, in what it reads by too."""
    if not isinstance(number, Linear):
        return number
    total: Scalar = Linear(constant=number.constant)
    for term, count in number.terms:
        if term == old:
            term = new
        elif isinstance(term, Data):
            term = Data(term.node, tuple(_replaced(at, old, new) for at in term.index))
        elif isinstance(term, Quotient):
            inner = _replaced(term.number, old, new)
            assert isinstance(inner, Linear)
            term = Quotient(inner, term.divisor)
        total = add(total, Linear(((term, count),)))
    return total
