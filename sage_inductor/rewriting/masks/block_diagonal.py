"""Masks that are known while compiling and are segments: blocks along the diagonal, as vision models build them for the images or
windows of a batch, whole or causal.

Where each query sees one interval of keys, and two intervals are the same or have no key in common, a number for each interval says
as much as the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, tracing
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.rewriting.masks.blocks import RowEnds

_MOST_STEPS = 256  # of ids: one addition each, which Inductor fuses


@dataclass(frozen=True)
class IdSteps:
    """Numbers of the places 0, 1, 2, ...: `values[n]` from `bounds[n - 1]` on, and `values[0]` before."""

    bounds: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class BlockDiagonal:
    """A query sees the keys of its own number, with `is_causal` of those the ones that are no later."""

    queries: IdSteps
    keys: IdSteps
    is_causal: bool = False

    def ids(self, call: AttentionCall) -> tuple[Expr, Expr] | None:
        """The numbers as ids of segments; None where they cannot be written."""
        query, key = _ids(self.queries, call, call.query), _ids(self.keys, call, call.key)
        return None if query is None or key is None else (query, key)


def block_diagonal(ends: RowEnds, kv_len: int) -> BlockDiagonal | None:
    """The mask whose rows have these `ends` as segments; None where it is something else, or has more than a few hundred."""
    seeing = ends.count > 0
    if not bool(((ends.last - ends.first + 1 == ends.count) | ~seeing).all()) or not bool(seeing.any()):
        return None
    positions = torch.arange(len(ends.first), device=ends.first.device)
    if len(positions) == kv_len and bool((ends.last == positions).all()):
        return _causal(ends.first, positions)
    changes = (ends.first[1:] != ends.first[:-1]) | (ends.last[1:] != ends.last[:-1])
    starts = _places(changes)
    if len(starts) > _MOST_STEPS:
        return None
    rows = [0, *starts]
    intervals = [(int(ends.first[row]), int(ends.last[row])) for row in rows]
    blocks = sorted({interval for interval in intervals if interval[0] >= 0})
    overlap = any(after[0] <= before[1] for before, after in zip(blocks, blocks[1:], strict=False))
    if len(blocks) < 2 or overlap:
        return None
    bounds = sorted({end for first, last in blocks for end in (first, last + 1)} - {0, kv_len})
    if len(bounds) > _MOST_STEPS:
        return None
    keys = IdSteps(tuple(bounds), tuple(range(len(bounds) + 1)))
    number = {first: sum(bound <= first for bound in bounds) for first, _ in blocks}
    queries = IdSteps(tuple(starts), tuple(number.get(first, -1) for first, _ in intervals))
    return BlockDiagonal(queries, keys)


def _causal(first: Tensor, positions: Tensor) -> BlockDiagonal | None:
    """Rows that see the keys from `first` to their own."""
    changes = first[1:] != first[:-1]
    if int(first[0]) != 0 or not bool((first[1:] == positions[1:])[changes].all()):
        return None
    starts = _places(changes)
    if not 0 < len(starts) <= _MOST_STEPS:
        return None
    steps = IdSteps(tuple(starts), tuple(range(len(starts) + 1)))
    return BlockDiagonal(steps, steps, is_causal=True)


def _places(changes: Tensor) -> list[int]:
    """Where a row differs from the one before."""
    return [int(place) + 1 for place in changes.nonzero().flatten()]


def _ids(steps: IdSteps, call: AttentionCall, rows: Value) -> Expr | None:
    """int32 `[batch, length]`, without batch where query has none."""
    query, tensor = example_tensor(call.query), example_tensor(rows)
    assert query is not None and tensor is not None
    length = sizes_of(tensor)[-2]
    options: dict[str, Any] = {"dtype": torch.int32, "device": query.device}
    assert isinstance(length, int)
    with tracing(query):
        value = torch.arange(length, **options)
    at = Expr(torch.arange, (length,), options, value)
    found = Expr.of("to", _numbers(at, steps.bounds, steps.values), torch.int32)
    if query.dim() < 4:
        return found
    batch = sizes_of(query)[0]
    if isinstance(batch, int):
        return Expr.of("expand", found, batch, -1)
    if not isinstance(call.query, fx.Node) or "val" in call.query.meta:
        return None  # a symbolic size in an exported program
    return Expr.of("expand", found, Expr.of("size", call.query, 0), -1)


def _numbers(at: Expr, bounds: Sequence[int], values: Sequence[int]) -> Expr:
    size, tensor = bounds[0] if bounds else 0, example_tensor(at)
    assert tensor is not None
    multiples = list(range(size, size * len(values), size)) if size else None
    is_counted = list(values) == list(range(len(values))) and tensor.shape[0] <= size * len(values)
    if list(bounds) == multiples and is_counted:
        return Expr.of(torch.floor_divide, at, size)
    steps = [
        Expr.of("mul", Expr.of("ge", at, bound), after - before)
        for bound, before, after in zip(bounds, values[:-1], values[1:], strict=True)
    ]
    steps.append(Expr.of("add", Expr.of("mul", at, 0), values[0]))
    return functools.reduce(lambda left, right: Expr.of("add", left, right), steps)
