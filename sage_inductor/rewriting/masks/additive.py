"""Finite numbers that hide keys: what becomes of queries that see no key.

Where a finite number hides all keys of a query, beside which rounding loses the scores, softmax gives all keys, hidden or
not, the same weight. Such queries get the mean of V.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor
from sage_inductor.graph.sizes import Size, sizes_of
from sage_inductor.rewriting.masks.formula import plain

# Additive masks write "not allowed" as -inf or as the most negative number of float32 or bfloat16; half of that is as
# final. (Not float16's: beside -65504, in float32, scores are not lost.)
FINAL = torch.finfo(torch.float32).min / 2


def seeing_rows(padding: Value, low: Size | None, high: Size | None, call: AttentionCall) -> Value | None:
    """Which queries see a key: bool `[..., q_len, 1]` (`[..., 1, 1]` without a band), of the keys that `padding`
    `[..., 1, kv_len]` allows and, for query i, those from i + low to i + high. None: not to be told."""
    if low is None and high is None:
        return Expr.of("any", padding, -1, True)
    query, row = example_tensor(call.query), example_tensor(padding)
    assert query is not None and row is not None
    if row.dim() == 1:  # the same keys for all, by their places alone
        padding = Expr.of("unsqueeze", padding, 0)
    q_len, kv_len = sizes_of(query)[-2], sizes_of(row)[-1]
    last = plain(kv_len - 1) if high is None else high
    # Windows that hang over the last key are not counted.
    if not _is_at_least_zero(last) or not _is_at_least_zero(plain(kv_len - last - q_len)):
        return None
    upper: Expr | None
    fewest: Expr | int | None = 0
    if low is None:  # how many keys up to i + high are allowed
        upper = _rows(Expr.of("cumsum", padding, -1), last, call)
    elif isinstance(low, int):  # the last key up to i + high that is allowed, counted from 1
        places = Expr.of("cumsum", Expr.of(torch.ones_like, padding), -1)
        latest = Expr.of(operator.getitem, Expr.of("cummax", Expr.of("mul", places, padding), -1), 0)
        queries = _rows(places, 0, call)
        upper = _rows(latest, last, call)
        fewest = None if queries is None else Expr.of("clamp", Expr.of("add", queries, low - 1), 0)
    else:
        return None
    if upper is None or fewest is None:
        return None
    return Expr.of("transpose", Expr.of("gt", upper, fewest), -1, -2)


def _is_at_least_zero(number: Size) -> bool:
    """Whether it is known to be."""
    return number >= 0 if isinstance(number, int) else getattr(number, "is_nonnegative", None) is True


def _rows(row: Expr, first: Size, call: AttentionCall) -> Expr | None:
    """`row` `[..., 1, keys]` from `first` on, of as many as there are queries."""
    query, tensor = example_tensor(call.query), example_tensor(row)
    assert query is not None and tensor is not None
    behind = plain(sizes_of(tensor)[-1] - first - sizes_of(query)[-2])
    if first == 0 and behind == 0:
        return row
    if isinstance(first, int) and isinstance(behind, int):
        return Expr.of(operator.getitem, row, (Ellipsis, slice(first, -behind if behind else None)))
    if not isinstance(call.query, fx.Node) or "val" in call.query.meta:
        return None
    length = Expr.of("size", call.query, -2)
    if first == 0:
        return Expr.of("narrow", row, -1, 0, length)
    if behind != 0:
        return None
    return Expr.of("narrow", row, -1, Expr.of(operator.sub, Expr.of("size", row, -1), length), length)


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
