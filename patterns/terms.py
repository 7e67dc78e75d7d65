"""What is done to logits beside scaling, as one additive mask: the steps between product and softmax, in the order in which
the model takes them, done to zeros.

Kernels add a mask to the scores. A number that overwrites them leaves nothing of them, so that a query whose keys all have
it attends to all of them alike. That survives where the number is so large that the sum is the number again. Smaller ones
(-1e4) are moved down to where that holds, in the order in which they are: a query that sees no key attends to those that
the highest number hides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.patterns.hiding import HIDES

LOWEST = torch.finfo(torch.float32).min
# The number that hides keys where there is but one: finite in bfloat16 and float32, and just low enough that the
# classification of masks knows it for a key that is masked out.
HIDDEN = LOWEST / 2
# Scores are lost beside a number whose neighbours lie this far apart.
LOST = 64.0
# Several numbers become these, from the highest on: beside each no score is left, and none of the next. Kernels take all
# numbers below -1e30 for one.
LEVELS = tuple(-(10.0**exponent) for exponent in range(12, 30, 2))
SPREAD = 1e20  # takes -1e4 to where scores are lost, and leaves -1e9 above -1e30


@dataclass(frozen=True)
class Term:
    """A tensor that broadcasts to logits, of shape `logits` and of `dtype` where it meets them; both `[*batch, queries,
    keys]`. It is added to them; or, where it comes with a number, bool: they are overwritten by the number."""

    value: Value
    logits: tuple[Any, ...]
    dtype: torch.dtype
    number: float | None = None

    def promoted(self) -> Value:
        """The value in the precision of the sum that it is a part of."""
        tensor = example_tensor(self.value)
        exact = tensor is None or tensor.dtype in (torch.float32, self.dtype)
        return self.value if exact else Expr.of("to", self.value, torch.float32)


def loses(number: float, dtype: torch.dtype, spacing: float = LOST) -> bool:
    """Whether in `dtype` numbers as large as `number` lie `spacing` apart, or farther."""
    return abs(number) * torch.finfo(dtype).eps >= spacing


def is_representable(terms: Sequence[Term]) -> bool:
    """Whether `in_order` can keep the order of the numbers of `terms`."""
    numbers = {term.number for term in terms} - {None}
    return None in {term.number for term in terms} or len(numbers) <= len(LEVELS)


def in_order(terms: Sequence[Term]) -> Value | None:
    """`terms`, in the order in which the model applies them, as one additive mask; None where there are none."""
    if not terms:
        return None
    overwriting = [term.number for term in terms if term.number is not None]
    if len(overwriting) == len(terms):
        return _of_numbers(terms, overwriting)
    total: Value | None = None
    for term in terms:
        if term.number is not None:
            total = _overwritten(total, term.value, term.number)
        elif total is None:
            total = term.value if len(terms) == 1 else term.promoted()
        else:
            total = Expr.of("add", total, term.promoted())
    assert total is not None
    return total if all(loses(number, torch.float32) for number in overwriting) else _spread(total)


def _of_numbers(terms: Sequence[Term], numbers: Sequence[float]) -> Value:
    """Numbers alone: nothing tells by how much they differ, but for their order."""
    if len(set(numbers)) == 1:
        hidden = terms[0].value
        for term in terms[1:]:
            hidden = Expr.of(torch.logical_or, hidden, term.value)
        return _overwritten(None, hidden, HIDDEN)
    levels = dict(zip(sorted(set(numbers), reverse=True), LEVELS, strict=False))
    total: Value | None = None
    for term, number in zip(terms, numbers, strict=True):
        total = _overwritten(total, term.value, levels[number])
    assert total is not None
    return total


def _overwritten(total: Value | None, hidden: Value, number: float) -> Value:
    """`total`, in float32, with `number` where `hidden` is true."""
    if total is None:
        zeros = Expr.of(torch.zeros_like, hidden, dtype=torch.float32)
        return Expr.of("masked_fill", zeros, hidden, number)
    tensor = example_tensor(total)
    if tensor is not None and tensor.dtype != torch.float32:
        total = Expr.of("to", total, torch.float32)
    return Expr.of(torch.where, hidden, number, total)


def _spread(total: Value) -> Value:
    """`total` with all that hides moved down, so far that no score is left beside it, in the same order; -inf stays."""
    low = Expr.of("clamp", Expr.of("mul", total, SPREAD), min=LOWEST)
    low = Expr.of(torch.minimum, low, total)
    return Expr.of(torch.where, Expr.of("gt", total, HIDES / 2), total, low)


def floor_of(floor: float) -> float:
    """The number that a floor of logits makes of -inf in a term: one beside which no score is left."""
    return floor if loses(floor, torch.float32) else HIDDEN


def tells_keys_apart(number: float, dtype: torch.dtype) -> bool:
    """Whether what is added to `number` in `dtype` shows: then queries that see no key do not attend to all alike."""
    return number != -math.inf and not loses(number, dtype, 8.0)
