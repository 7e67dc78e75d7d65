"""Arithmetic and logic of formulas. What has no form among them raises NotUnderstood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sage_inductor.graph.sizes import Size
from sage_inductor.rewriting.masks.formula import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    AllOf,
    AnyOf,
    AtLeastZero,
    Condition,
    Conditional,
    Data,
    Extreme,
    Holds,
    IsZero,
    Linear,
    NotUnderstood,
    Quantity,
    Quotient,
    Real,
    Scalar,
    constant_of,
    number,
    plain,
)

_MOST_PARTS = 64  # of one conjunction or disjunction; masks have a handful


def _order(pair: tuple[Quantity, int]) -> tuple[int, str]:
    term = pair[0]
    return (0, term) if isinstance(term, str) else (1, repr(term))


def distributed(function: Callable[..., Scalar], *scalars: Scalar) -> Scalar | None:
    """`function` of what the first `Conditional` among `scalars` chooses, in both cases; None where there is none."""
    for position, scalar in enumerate(scalars):
        if isinstance(scalar, Conditional):
            before, after = scalars[:position], scalars[position + 1 :]
            return choice(
                scalar.condition,
                function(*before, scalar.chosen, *after),
                function(*before, scalar.other, *after),
            )
    return None


def add(left: Scalar, right: Scalar) -> Scalar:
    left, right = as_number(left), as_number(right)
    if (cases := distributed(add, left, right)) is not None:
        return cases
    if isinstance(left, Linear) and isinstance(right, Linear):
        return _sum(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Extreme) and isinstance(other, Linear):
            return Extreme(one.largest, tuple(add(item, other) for item in one.numbers))
        if isinstance(one, Real):
            constant = _real(other)
            if constant is not None:
                return number(one.number + constant)
    raise NotUnderstood("a sum")


def _sum(left: Linear, right: Linear) -> Linear:
    if not right.terms and not left.terms:
        return Linear(constant=plain(left.constant + right.constant))
    terms = dict(left.terms)
    for term, coefficient in right.terms:
        terms[term] = terms.get(term, 0) + coefficient
    kept = sorted(((term, count) for term, count in terms.items() if count), key=_order)
    return Linear(tuple(kept), plain(left.constant + right.constant))


def multiply(left: Scalar, right: Scalar) -> Scalar:
    left, right = as_number(left), as_number(right)
    if (cases := distributed(multiply, left, right)) is not None:
        return cases
    for one, other in ((left, right), (right, left)):
        factor = constant_of(one)
        if factor is None:
            continue
        if isinstance(other, Real):
            if isinstance(factor, int):
                return number(factor * other.number)
        elif isinstance(other, Linear) and (isinstance(factor, int) or not other.terms):
            if factor == 0:
                return ZERO
            terms = tuple((term, factor * count) for term, count in other.terms)
            return Linear(terms, plain(factor * other.constant))
        elif isinstance(other, Extreme) and isinstance(factor, int):
            items = tuple(multiply(one, item) for item in other.numbers)
            return Extreme(other.largest == (factor > 0), items)
    if isinstance(left, Real) and isinstance(right, Real):
        return number(left.number * right.number)
    raise NotUnderstood("a product")


def negative(scalar: Scalar) -> Scalar:
    return multiply(Linear(constant=-1), scalar)


def subtract(left: Scalar, right: Scalar) -> Scalar:
    return add(left, negative(right))


def quotient(left: Scalar, right: Scalar) -> Scalar:
    """`left // right`, rounded down."""
    left = as_number(left)
    divisor = constant_of(as_number(right))
    if not isinstance(left, Linear) or not isinstance(divisor, int) or divisor <= 0:
        raise NotUnderstood("a division")
    if not left.terms:
        return Linear(constant=plain(left.constant // divisor))
    return left if divisor == 1 else Linear(((Quotient(left, divisor), 1),))


def remainder(left: Scalar, right: Scalar) -> Scalar:
    return subtract(left, multiply(right, quotient(left, right)))


def extreme(largest: bool, left: Scalar, right: Scalar) -> Scalar:
    left, right = as_number(left), as_number(right)
    if left == right:
        return left
    if (cases := distributed(lambda *numbers: extreme(largest, *numbers), left, right)) is not None:
        return cases
    reals = _real(left), _real(right)
    if reals[0] is not None and reals[1] is not None:
        return number(max(reals) if largest else min(reals))  # type: ignore[type-var]
    if any(isinstance(item, (Real, Data)) for item in (left, right)):
        raise NotUnderstood("an extreme of floats")
    return Extreme(largest, (left, right))


def choice(condition: Condition, chosen: Scalar, other: Scalar) -> Scalar:
    if condition == TRUE or chosen == other:
        return chosen
    if condition == FALSE:
        return other
    if isinstance(chosen, Condition) and isinstance(other, Condition):
        return either(both(condition, chosen), both(negated(condition), other))
    if isinstance(chosen, Conditional) and chosen.condition == condition:
        chosen = chosen.chosen
    if isinstance(other, Conditional) and other.condition == condition:
        other = other.other
    return Conditional(condition, chosen, other)


def as_number(scalar: Scalar) -> Scalar:
    """A condition as 1 or 0, all else as it is."""
    return choice(scalar, ONE, ZERO) if isinstance(scalar, Condition) else scalar


def as_condition(scalar: Scalar) -> Condition:
    """Whether `scalar` is other than 0."""
    if isinstance(scalar, Condition):
        return scalar
    return negated(equal(scalar, ZERO))


def _real(scalar: Scalar) -> float | None:
    if isinstance(scalar, Real):
        return scalar.number
    constant = constant_of(scalar)
    return float(constant) if isinstance(constant, int) else None


# Conditions


def at_least(left: Scalar, right: Scalar) -> Condition:
    """`left >= right`."""
    left, right = as_number(left), as_number(right)
    reals = _real(left), _real(right)
    if reals[0] is not None and reals[1] is not None:
        return TRUE if reals[0] >= reals[1] else FALSE
    found = distributed(at_least, left, right)
    if found is not None:
        assert isinstance(found, Condition)
        return found
    return _not_negative(subtract(left, right))


def _not_negative(scalar: Scalar) -> Condition:
    if isinstance(scalar, Extreme):
        parts = [_not_negative(item) for item in scalar.numbers]
        return either(*parts) if scalar.largest else both(*parts)
    if isinstance(scalar, Real):
        return TRUE if scalar.number >= 0 else FALSE
    if not isinstance(scalar, Linear):
        raise NotUnderstood("a comparison")
    scalar = _reduced(scalar)
    if not scalar.terms and isinstance(scalar.constant, int):
        return TRUE if scalar.constant >= 0 else FALSE
    return AtLeastZero(scalar)


def _reduced(linear: Linear) -> Linear:
    """`2 q - 2 k + 3 >= 0` is `q - k + 1 >= 0`."""
    factor = math.gcd(*(count for _, count in linear.terms)) if linear.terms else 1
    if factor == 1 or not isinstance(linear.constant, int):
        return linear
    return Linear(tuple((term, count // factor) for term, count in linear.terms), linear.constant // factor)


def equal(left: Scalar, right: Scalar) -> Condition:
    left, right = as_number(left), as_number(right)
    reals = _real(left), _real(right)
    if reals[0] is not None and reals[1] is not None:
        return TRUE if reals[0] == reals[1] else FALSE
    found = distributed(equal, left, right)
    if found is not None:
        assert isinstance(found, Condition)
        return found
    if not isinstance(left, Linear) or not isinstance(right, Linear):
        raise NotUnderstood("an equality")
    difference = subtract(left, right)
    assert isinstance(difference, Linear)
    if not difference.terms and isinstance(difference.constant, int):
        return TRUE if difference.constant == 0 else FALSE
    if difference.terms and difference.terms[0][1] < 0:  # one way to say it
        turned = negative(difference)
        assert isinstance(turned, Linear)
        difference = turned
    return IsZero(difference)


def negated(condition: Condition) -> Condition:
    if isinstance(condition, AtLeastZero):
        turned = subtract(negative(condition.number), ONE)
        return _not_negative(turned)
    if isinstance(condition, IsZero):
        return IsZero(condition.number, not condition.negated)
    if isinstance(condition, Holds):
        return Holds(condition.data, not condition.negated)
    assert isinstance(condition, (AllOf, AnyOf))
    parts = map(negated, condition.parts)
    return either(*parts) if isinstance(condition, AllOf) else both(*parts)


def both(*conditions: Condition) -> Condition:
    return _joined(AllOf, AnyOf, FALSE, conditions)


def either(*conditions: Condition) -> Condition:
    return _joined(AnyOf, AllOf, TRUE, conditions)


def _joined(
    kind: type[AllOf] | type[AnyOf],
    opposite: type[AllOf] | type[AnyOf],
    decides: Condition,
    conditions: Iterable[Condition],
) -> Condition:
    """A conjunction (`kind` AllOf, which a part that is FALSE decides), or a disjunction."""
    parts: set[Condition] = set()
    for condition in conditions:
        if condition == decides:
            return decides
        parts |= condition.parts if isinstance(condition, kind) else {condition}
    parts = _without_weaker(parts, strongest=kind is AllOf)
    for part in list(parts):
        if not isinstance(part, opposite):
            continue
        if not part.parts.isdisjoint(parts - {part}):  # a & (a | b) is a
            parts.discard(part)
            continue
        left = {item for item in part.parts if negated(item) not in parts}
        if len(left) < len(part.parts):  # a & (not a | b) is a & b
            return _joined(
                kind, opposite, decides, (*(parts - {part}), _joined(opposite, kind, kind(frozenset()), left))
            )
    if _are_opposed(parts, kind is AllOf):
        return decides
    if len(parts) > _MOST_PARTS:
        raise NotUnderstood("too many conditions")
    return next(iter(parts)) if len(parts) == 1 else kind(frozenset(parts))


def _are_opposed(parts: set[Condition], exclude: bool) -> bool:
    """Whether two of `parts` exclude one another, as `n - 5 >= 0` and `-n >= 0`; else whether two leave nothing out."""
    bounds: dict[tuple[tuple[Quantity, int], ...], Size] = {}
    for part in parts:
        if isinstance(part, AtLeastZero):
            opposite = bounds.get(tuple((term, -count) for term, count in part.number.terms))
            together = None if opposite is None else plain(opposite + part.number.constant)
            if isinstance(together, int) and (together < 0 if exclude else together >= -1):
                return True
            bounds[part.number.terms] = part.number.constant
        elif not isinstance(part, (AllOf, AnyOf)) and negated(part) in parts:
            return True
    return False


def _without_weaker(parts: set[Condition], strongest: bool) -> set[Condition]:
    """Of comparisons that differ by a number only, the one that says most of a conjunction, or least of a disjunction."""
    kept: dict[tuple[tuple[Quantity, int], ...], AtLeastZero] = {}
    others: set[Condition] = set()
    for part in parts:
        before = kept.get(part.number.terms) if isinstance(part, AtLeastZero) else None
        if not isinstance(part, AtLeastZero) or not isinstance(part.number.constant, int):
            others.add(part)
        elif before is None or (part.number.constant < before.number.constant) == strongest:
            kept[part.number.terms] = part
    return others | set(kept.values())
