"""What a formula means for attention: a band, a row over keys, and what else it asks for, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sage_inductor.graph.sizes import Size
from sage_inductor.rewriting.masks.algebra import both, choice
from sage_inductor.rewriting.masks.equalities import beside_equalities
from sage_inductor.rewriting.masks.formula import (
    FALSE,
    KEY,
    QUERY,
    TRUE,
    AllOf,
    AnyOf,
    AtLeastZero,
    Condition,
    Conditional,
    Data,
    IsZero,
    NotUnderstood,
    Quotient,
    Real,
    Scalar,
    constant_of,
    names_of,
    plain,
)
from sage_inductor.rewriting.masks.ranges import Ranges


@dataclass(frozen=True)
class Allowed:
    """Where `condition` holds a key is attended to; elsewhere one of `hidden` is added to the score, or for a bool mask
    nothing is (-inf). `bias`: floats that are added to the scores of all keys that are attended to; None: nothing is."""

    condition: Condition
    hidden: frozenset[float] = frozenset({-math.inf})
    bias: Data | None = None


@dataclass(frozen=True)
class Meaning:
    """A conjunction: query i sees keys `i + low .. i + high` (None: no bound), of those the ones that `keys`, which does not
    depend on the query, allows, and of those the ones that `others` do."""

    low: Size | None = None
    high: Size | None = None
    keys: Condition = TRUE
    others: tuple[Condition, ...] = ()

    def name(self, offset: Size) -> str | None:
        """What it is called where all of `others` have a name: "prefix", "chunked_causal size=8". `offset`:
        how many keys there are more than queries."""
        is_causal = self.low is None and self.high is not None and self.high in (0, offset)
        found = [_name(part, is_causal) for part in self.others]
        if not found or None in found:
            return None
        named = [name for name in dict.fromkeys(found) if name]
        if self.low is not None or self.high is not None:
            if not is_causal:
                named.insert(0, "band")
            elif not any(name.startswith("chunked_causal") for name in named):
                named.insert(0, "causal")
        return " + ".join(named if self.keys == TRUE else [*named, "key_padding"])


def allowed_by(scalar: Scalar, finite: float) -> Allowed:
    """The keys that a bool or an additive mask allows. `finite`: the largest finite number that counts as hiding a key. Raises
    NotUnderstood for a mask that does anything else than hide keys."""
    if isinstance(scalar, Condition):
        return Allowed(scalar)
    hidden: set[float] = set()
    added: set[Data | None] = set()
    condition = _allowed(scalar, finite, hidden, added)
    if len(added) > 1:
        raise NotUnderstood("several biases")
    return Allowed(condition, frozenset(hidden), added.pop() if added else None)


def _allowed(scalar: Scalar, finite: float, hidden: set[float], added: set[Data | None]) -> Condition:
    """As `Allowed`, what is added to scores in `added`: None for nothing."""
    if isinstance(scalar, Conditional):
        chosen, other = (_allowed(item, finite, hidden, added) for item in (scalar.chosen, scalar.other))
        found = choice(scalar.condition, chosen, other)
        assert isinstance(found, Condition)
        return found
    if isinstance(scalar, Data) and QUERY not in names_of(scalar):
        added.add(scalar)
        return TRUE
    constant = constant_of(scalar)
    value = scalar.number if isinstance(scalar, Real) else constant
    if constant == 0:
        added.add(None)
        return TRUE
    if not isinstance(value, (int, float)) or not value <= finite:
        raise NotUnderstood("a bias")
    hidden.add(float(value))
    return FALSE


def meaning_of(condition: Condition, ranges: Ranges) -> Meaning:
    """The conjunction that `condition` is."""
    condition = ranges.simplified(condition)
    parts = beside_equalities(condition.parts) if isinstance(condition, AllOf) else [condition]
    low: Size | None = None
    high: Size | None = None
    keys: list[Condition] = []
    others: list[Condition] = []
    for part in parts:
        bounds = None if part == TRUE else _band(part)
        if bounds is not None:
            lower, upper = bounds
            if (lower is not None and low is not None) or (upper is not None and high is not None):
                others.append(part)  # of two bounds it is not known which is the tighter
            else:
                low, high = (low if lower is None else lower), (high if upper is None else upper)
        elif QUERY not in names_of(part):
            keys.append(part)
        else:
            others.append(part)
    return Meaning(low, high, both(*keys), tuple(others))


def _band(part: Condition) -> tuple[Size | None, Size | None] | None:
    """The bounds (low, high) of `k - q` that `part` sets; None where it is no such bound."""
    if not isinstance(part, (AtLeastZero, IsZero)):
        return None
    terms, constant = dict(part.number.terms), part.number.constant
    if set(terms) != {QUERY, KEY} or terms[QUERY] != -terms[KEY] or abs(terms[KEY]) != 1:
        return None
    at = plain(-constant * terms[KEY])
    if isinstance(part, IsZero):
        return None if part.negated else (at, at)
    return (at, None) if terms[KEY] > 0 else (None, at)


def _name(part: Condition, is_causal: bool) -> str | None:
    """What a condition on queries and keys is called. None: nothing that has a name."""
    if isinstance(part, IsZero) and not part.negated and len(part.number.terms) == 2:
        (first, one), (second, other) = part.number.terms
        if one != -other or part.number.constant != 0 or isinstance(first, str) or isinstance(second, str):
            return None
        depends = [names_of(term) & {QUERY, KEY} for term in (first, second)]
        if sorted(map(sorted, depends)) != [[KEY], [QUERY]]:
            return None
        sizes = {_chunk(term) for term in (first, second)}
        return (
            f"chunked_causal size={sizes.pop()}"
            if is_causal and len(sizes) == 1 and None not in sizes
            else None
        )
    if isinstance(part, AnyOf):
        bands = [item for item in part.parts if _band(item) is not None]
        rest = [item for item in part.parts if item not in bands]
        if len(bands) == 1 and len(rest) == 1 and _is_prefix(rest[0]):
            return "prefix"
    return None


def _chunk(term: Data | Quotient) -> int | None:
    """The divisor of a quotient of an index itself, None for what is read."""
    is_of_index = isinstance(term, Quotient) and any(isinstance(inner, str) for inner, _ in term.number.terms)
    return term.divisor if isinstance(term, Quotient) and is_of_index else None


def _is_prefix(part: Condition) -> bool:
    """Whether `part` holds for the first keys: `k < n`, n being a number or data."""
    if not isinstance(part, AtLeastZero) or QUERY in names_of(part):
        return False
    indices = [(term, count) for term, count in part.number.terms if isinstance(term, str)]
    others = [term for term, _ in part.number.terms if not isinstance(term, str)]
    return indices == [(KEY, -1)] and not any(KEY in names_of(term) for term in others)
