"""Additive masks that only hide keys, as the bools they were made of: values of the graph, for masks of segments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, CASTS, COPIES, IN_ORDER, facts_of, fill, operation
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.additive import FINAL

_CALLS = ("call_function", "call_method")


def allowed_keys(mask: Value, writes: Writes) -> tuple[Value, float] | None:
    """(a bool mask of the allowed keys, the number that hides the others), None where `mask` is, or may be, anything
    else than such a mask."""
    tensor = example_tensor(mask)
    if tensor is None or not tensor.is_floating_point():
        return None
    if isinstance(mask, fx.Node) and (mask.op not in _CALLS or writes.touch(mask)):
        return None
    name, args = operation(mask), mask.args
    if name == "where" and len(args) == 3:
        condition, chosen, other = args
        if _is_zero(chosen, writes):
            return _hidden_by(_scalar(other), condition)
        if _is_zero(other, writes):
            return _hidden_by(_scalar(chosen), Expr.of(torch.logical_not, condition))
        return None
    if name == "masked_fill" and len(args) == 3 and _is_zero(args[0], writes):
        return _hidden_by(_scalar(args[2]), Expr.of(torch.logical_not, args[1]))
    inner = allowed_keys(args[0], writes) if args and isinstance(args[0], (fx.Node, Expr)) else None
    return None if inner is None else _passed_on(mask, args[0], tensor, *inner)


def _passed_on(
    mask: Value, source: Any, tensor: Tensor, allowed: Value, lowest: float
) -> tuple[Value, float] | None:
    """What `mask` makes of `source`, its first argument, a mask of `allowed` keys where `lowest` hides the others."""
    name, args, before = operation(mask), mask.args, example_tensor(source)
    if name in BROADCASTS:
        return allowed, lowest  # it broadcasts by itself
    if name == "clamp":  # from below, at a number that still hides
        floor = _scalar(mask.kwargs.get("min", args[1] if len(args) > 1 else None))
        has_ceiling = mask.kwargs.get("max") is not None or len(args) > 2
        return None if floor is None or has_ceiling else _hidden_by(max(floor, lowest), allowed)
    if before is None or before.device != tensor.device:
        return None
    if name in CASTS:
        # float32's lowest number is -inf in another dtype
        return _hidden_by(lowest if lowest >= torch.finfo(tensor.dtype).min else -math.inf, allowed)
    if COPIES not in facts_of(mask) or before.dtype != tensor.dtype or _holds_nodes(args[1:], mask.kwargs):
        return None
    in_order = IN_ORDER in facts_of(mask) or (name == "getitem" and _is_basic(args[1]))
    if in_order and sizes_of(before) == sizes_of(tensor):
        return allowed, lowest
    bools = example_tensor(allowed)
    if bools is None or sizes_of(bools) != sizes_of(before):
        return None
    # The bools may lie in memory in another way, in which no view has that shape.
    target = "reshape" if name in ("view", "_unsafe_view") else mask.target
    return Expr.of(target, allowed, *args[1:], **mask.kwargs), lowest


def _holds_nodes(*arguments: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return bool(found)


def _is_basic(index: Any) -> bool:
    """Whether `x[index]` leaves what it takes in order: slices and new dims, and no lists, which name elements."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


def _hidden_by(lowest: float | None, condition: Any) -> tuple[Value, float] | None:
    allowed = example_tensor(condition) if isinstance(condition, (fx.Node, Expr)) else None
    if lowest is None or allowed is None or allowed.dtype != torch.bool:
        return None
    return (condition, lowest) if lowest <= FINAL else None


def _scalar(item: Any) -> float | None:
    """A number, or the number that a tensor without dims was made of."""
    if isinstance(item, (int, float)):
        return float(item)
    tensor = example_tensor(item) if isinstance(item, fx.Node) else None
    if tensor is None or tensor.dim() != 0 or not item.args:
        return None
    made_of = item.args[1] if operation(item) == "full" and len(item.args) > 1 else item.args[0]
    if operation(item) not in ("tensor", "scalar_tensor", "_as_tensor_fullprec", "full"):
        return None
    return float(made_of) if isinstance(made_of, (int, float)) else None


def _is_zero(item: Any, writes: Writes) -> bool:
    """A zero, or a tensor of zeros."""
    if not isinstance(item, (fx.Node, Expr)):
        return _scalar(item) == 0.0
    if isinstance(item, fx.Node) and writes.touch(item):
        return False
    return fill(item) == 0 or _scalar(item) == 0.0
