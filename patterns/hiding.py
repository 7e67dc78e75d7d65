"""Keys that are hidden: logits overwritten by a low number where a mask says so, in every spelling.

`masked_fill(mask, -inf)`, `where(mask, logits, -1e9)`, `logits * mask + -1e9 * (1 - mask)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import CASTS, COPIES, facts_of, operation
from sage_inductor.patterns.nodes import (
    ADD,
    MASKED_FILL,
    MUL,
    SUB,
    WHERE,
    argument,
    only_reader,
    operands,
    shape_of,
    unexpanded,
)
from sage_inductor.patterns.numbers import filled_with, number

# A number written into logits hides a key where no other logit of the row comes near it. -1e4, from the days of GPT-2 in
# float16, is the highest in use for that.
HIDES = -1e4


@dataclass(frozen=True)
class Hiding:
    """`source` with `value` where `hidden` is true. `hidden` is a bool mask that broadcasts to `source`."""

    source: fx.Node
    hidden: Value
    value: float


def hiding(node: fx.Node) -> Hiding | None:
    """What `node` hides. None where it does something else, or writes a number above HIDES."""
    if node in MASKED_FILL:
        source, mask = argument(node, 0, "input"), argument(node, 1, "mask")
        return _where(node, source, mask, number(argument(node, 2, "value")), hidden_where=True)
    if node in WHERE and len(node.args) == 3:
        condition, kept, other = node.args
        if filled_with(other) is not None:
            return _where(node, kept, condition, filled_with(other), hidden_where=False)
        return _where(node, other, condition, filled_with(kept), hidden_where=True)
    return _multiplied_mask(node) if node in ADD or node in SUB else None


def negated(mask: Value) -> Value:
    if isinstance(mask, Expr) and mask.target is torch.logical_not:
        inner: Value = mask.args[0]
        return inner
    return Expr.of(torch.logical_not, mask)


def _where(node: fx.Node, source: Any, mask: Any, value: float | None, hidden_where: bool) -> Hiding | None:
    """Logits overwritten by `value` where `mask` is `hidden_where`."""
    mask = unexpanded(mask)
    tensor = example_tensor(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(source, fx.Node) or tensor is None or tensor.dtype != torch.bool:
        return None
    return _hiding(node, source, mask if hidden_where else negated(mask), value)


def _hiding(node: fx.Node, source: fx.Node, hidden: Value, value: float | None) -> Hiding | None:
    if value is None or value > HIDES or shape_of(source) != shape_of(node):
        return None
    return Hiding(source, hidden, value)


def _multiplied_mask(node: fx.Node) -> Hiding | None:
    """`logits * mask + lowest * (1 - mask)`, as it overwrites logits where the mask is 0. The mask must come from bools: with
    .5 in it the sum is no overwriting."""
    left, right = operands(node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    for kept, other in ((left, right), (right, left)):
        lowest = _times_inverse(other)
        if kept not in MUL or lowest is None or (node in SUB and kept is right):
            continue
        mask, value = lowest
        source = next((arg for arg in operands(kept) if arg is not mask), None)
        if mask in operands(kept) and isinstance(source, fx.Node) and only_reader(kept, node):
            if not made_of_bools(mask):
                return None
            hidden = negated(Expr.of("to", mask, torch.bool))
            return _hiding(node, source, hidden, -value if node in SUB else value)
    return None


def _times_inverse(node: Any) -> tuple[fx.Node, float] | None:
    """(mask, value) where `node` is `value * (1 - mask)`."""
    if node not in MUL:
        return None
    for inverse, value in (operands(node), operands(node)[::-1]):
        if not isinstance(inverse, fx.Node) or number(value) is None:
            continue
        first, second = operands(inverse)
        if inverse.target in ("rsub", torch.rsub, torch.ops.aten.rsub.Scalar):
            first, second = second, first
        elif inverse not in SUB:
            continue
        if first == 1 and isinstance(second, fx.Node) and inverse.kwargs.get("alpha", 1) == 1:
            return second, float(number(value) or 0.0)
    return None


def made_of_bools(mask: fx.Node) -> bool:
    """Whether `mask` holds but 0 and 1, being a view, copy or cast of a bool tensor."""
    current: Any = mask
    while isinstance(current, fx.Node):
        tensor = example_tensor(current)
        if tensor is not None and tensor.dtype == torch.bool:
            return True
        if COPIES not in facts_of(current) and operation(current) not in CASTS:
            return False
        current = argument(current, 0, "input")
    return False
