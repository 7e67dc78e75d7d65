"""Additive masks that only hide keys: 0 where a key is allowed, the lowest number of a dtype, or -inf, elsewhere.

Seen as the bools they were made of, causality and padding can be told apart, and a kernel reads a row of padding
instead of a number for every score. One thing differs: where a finite number hides all keys of a query, beside which
rounding loses the scores, softmax gives all keys, hidden or not, the same weight. Such queries get the mean of V.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, CASTS, COPIES, IN_ORDER, facts_of, fill, operation
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.writes import Writes

# Additive masks write "not allowed" as -inf or as the most negative number of float32 or bfloat16; half of that is as
# final. (Not float16's: beside -65504, in float32, scores are not lost.)
FINAL = torch.finfo(torch.float32).min / 2
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


def seeing_rows(padding: Value, low: int | None, high: int | None, q_len: int) -> Value | None:
    """Which of the `q_len` queries see a key: bool `[..., q_len, 1]` (`[..., 1, 1]` without a band), of the keys
    `padding` `[..., 1, kv_len]` allows and, for query i, those from i + low to i + high. None: not to be told."""
    if low is None and high is None:
        return Expr.of("any", padding, -1, True)
    kv_len = sizes_of(example_tensor(padding))[-1]  # type: ignore[arg-type]
    before = 0 if low is None else max(0, -low)
    start, last = (0 if low is None else low), (kv_len - 1 if high is None else high)
    if high is None or last < 0 or last + q_len > kv_len or start + q_len > kv_len + 1:
        return None
    counted = Expr.of("cumsum", padding, -1)
    # fewer[j + before]: how many keys before j are allowed
    fewer = Expr.of(F.pad, counted, (1 + before, 0))

    def of_rows(first: int) -> Expr:
        return Expr.of(operator.getitem, fewer, (Ellipsis, slice(first + before, first + before + q_len)))

    upper = of_rows(last + 1)
    seen = Expr.of("gt", upper, 0 if low is None else of_rows(start))
    return Expr.of("transpose", seen, -1, -2)


def with_uniform_rows(output: Value, seeing: Value, call: AttentionCall) -> Expr:
    """`output` with the mean of V for the queries that see no key."""
    mean = Expr.of("mean", call.value, -2, True)
    attention, kept = example_tensor(output), example_tensor(mean)
    assert attention is not None and kept is not None
    if attention.dim() > 2 and call.enable_gqa and sizes_of(attention)[-3] != sizes_of(kept)[-3]:
        mean = Expr.of("repeat_interleave", mean, attention.shape[-3] // kept.shape[-3], -3)
    if kept.dtype != attention.dtype:
        mean = Expr.of("to", mean, attention.dtype)
    return Expr.of(torch.where, seeing, output, mean)
