"""Weights that are set to zero behind the softmax: where a mask says so, or where they are NaN.

`weights.masked_fill(mask, 0)`, `where(mask, weights, 0)`, `weights * mask`; `nan_to_num(weights)`,
`weights.masked_fill(weights.isnan(), 0)`. NaN stands in rows that see no key, and such rows get 0 from our operator anyway.
So they do where it is asked of the logits, `where((logits == -inf).logical_not().any(-1, True).logical_not(), 0, weights)`, as
decompositions of torch.export write SDPA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import CASTS, NOT, operation
from sage_inductor.patterns.hiding import made_of_bools, negated
from sage_inductor.patterns.nodes import (
    ANY,
    EQ,
    ISNAN,
    MASKED_FILL,
    MUL,
    NAN_TO_NUM,
    WHERE,
    argument,
    only_reader,
    operands,
    shape_of,
    unexpanded,
)
from sage_inductor.patterns.numbers import filled_with, number


@dataclass(frozen=True)
class Zeros:
    """`source` with zeros where `mask` is true; mask None: where it is NaN. `readers` are the nodes that read it for that.

    `looks`: the node that compares logits with -inf, where they are asked which rows, along `dim` (0 and above), that is."""

    source: fx.Node
    mask: Value | None
    readers: tuple[fx.Node, ...]
    looks: fx.Node | None = None
    dim: int | None = None


def zeros(node: fx.Node) -> Zeros | None:
    """What `node` sets to zero in its first operand, of the same shape. None where it does anything else."""
    source, mask = _source_and_mask(node)
    if not isinstance(source, fx.Node) or shape_of(source) != shape_of(node):
        return None
    if mask is None:
        return Zeros(source, None, (node,))
    base, flipped = peeled(mask)
    if isinstance(base, fx.Node) and base in ISNAN and argument(base, 0, "input") is source:
        if flipped or not _is_made_for(mask, base, node):
            return None
        return Zeros(source, None, (node, base))
    rows = _rows_without_keys(base, mask, node) if flipped else None
    return Zeros(source, mask, (node,)) if rows is None else Zeros(source, None, (node,), *rows)


def _rows_without_keys(seen: Value, mask: Value, reader: fx.Node) -> tuple[fx.Node, int] | None:
    """(comparison, dim) where `seen` is `(logits != -inf).any(dim, keepdim=True)`, and `mask`, which is made of it, leads to
    `reader` alone; None where it is anything else."""
    dim = argument(seen, 1, "dim") if isinstance(seen, fx.Node) and seen in ANY else None
    if not isinstance(seen, fx.Node) or not isinstance(dim, int) or argument(seen, 2, "keepdim") is not True:
        return None
    not_hidden = argument(seen, 0, "input")
    base, flipped = peeled(not_hidden)
    if (
        not isinstance(base, fx.Node)
        or base not in EQ
        or not flipped
        or number(operands(base)[1]) != -math.inf
    ):
        return None
    made = _is_made_for(mask, seen, reader) and _is_made_for(not_hidden, base, seen)
    return (base, dim % len(shape_of(seen))) if made else None


def _is_made_for(mask: Value, base: fx.Node, reader: fx.Node) -> bool:
    """Whether nothing reads `base`, and what is made of it on the way to `mask`, but `reader`."""
    current: Any = mask
    while isinstance(current, Expr):
        current = current.args[0]
    while isinstance(current, fx.Node) and only_reader(current, reader):
        if current is base:
            return True
        reader, current = current, current.args[0]
    return False


def _source_and_mask(node: fx.Node) -> tuple[Any, Value | None]:
    if node in NAN_TO_NUM:
        return (argument(node, 0, "input") if argument(node, 1, "nan") in (None, 0) else None), None
    if node in MASKED_FILL and number(argument(node, 2, "value")) == 0:
        mask = unexpanded(argument(node, 1, "mask"))
        return (argument(node, 0, "input"), mask) if isinstance(mask, fx.Node) else (None, None)
    if node in WHERE and len(node.args) == 3:
        condition, kept, other = node.args
        condition = unexpanded(condition)
        tensor = example_tensor(condition) if isinstance(condition, fx.Node) else None
        if not isinstance(condition, fx.Node) or tensor is None or tensor.dtype != torch.bool:
            return None, None
        if filled_with(other) == 0:
            return kept, negated(condition)
        return (other, condition) if filled_with(kept) == 0 else (None, None)
    if node in MUL:
        for source, mask in (operands(node), operands(node)[::-1]):
            if isinstance(mask, fx.Node) and isinstance(source, fx.Node) and made_of_bools(mask):
                return source, negated(unexpanded(mask))
    return None, None


def peeled(mask: Value) -> tuple[Value, bool]:
    """(tensor, flipped): `mask` is true where the tensor is not 0; or where it is, if flipped. `~m`, `m == 0`, `m.bool()` and
    `m.float()` of a bool m are all about m."""
    flipped = False
    while True:
        if isinstance(mask, Expr):
            if mask.target is not torch.logical_not:
                return mask, flipped
            mask, flipped = mask.args[0], not flipped
            continue
        name, source = operation(mask), mask.args[0] if mask.args else None
        before = example_tensor(source) if isinstance(source, fx.Node) else None
        if not isinstance(source, fx.Node) or before is None:
            return mask, flipped
        other = mask.args[1] if len(mask.args) > 1 else None
        compared = name.strip("_") in ("eq", "ne") and number(other) == 0
        if (name in NOT and before.dtype == torch.bool) or (compared and name.strip("_") == "eq"):
            flipped = not flipped
        elif not (compared or (name in CASTS and before.dtype == torch.bool)):
            return mask, flipped
        mask = source


def same_mask(first: Value | None, second: Value | None) -> bool:
    """Whether both masks are true at the same places, as far as they come from one node."""
    if first is None or second is None:
        return False
    (one, flipped), (other, other_flipped) = peeled(first), peeled(second)
    return one is other and flipped is other_flipped
