"""Masks of packed sequences: a query sees the keys of its own id, as `ids[:, :, None] == ids[:, None, :]` says.

Two rows of ids stand for the mask then, whatever the ids are made of: a model's document ids, `position_ids` of which each 0
starts a sequence, the images of a packed batch. What the mask asks for besides (causality, padding) is classified by itself.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, leaves
from sage_inductor.graph.facts import CASTS, COPIES, NOT, facts_of, operation
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.allowed import allowed_keys
from sage_inductor.rewriting.masks.conjunction import conjuncts, is_function, joined
from sage_inductor.rewriting.masks.new_dims import new_dims, operands, with_dims
from sage_inductor.rewriting.masks.packed_positions import compared_ranges, is_causal_within, window_within

_EQUAL = ("eq", "__eq__")
_UNEQUAL = ("ne", "__ne__", "not_equal")
_DIFFERENCE = ("sub", "subtract", "__sub__")
_FITTING = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# Ids of queries that no key has. Those of keys are no less than 0 then.
_NO_KEY = -1


@dataclass(frozen=True)
class PackedMask:
    """A mask that is segments, and `rest`. Ids are int32, `[batch, q_len]` and `[batch, kv_len]`, or without batch."""

    query: Value
    key: Value
    rest: Value | None
    """Bool, what the mask asks for besides; None where that is nothing."""
    is_causal: bool
    """Whether it asks for keys that are no later than the query, too."""
    equality: Value
    """Bool, the part of the mask that compares the ids."""


def packed_mask(call: AttentionCall, writes: Writes) -> PackedMask | None:
    """`call`'s mask as segments and what is left; None where it has none. `writes` are those of the graph."""
    mask, query, key = map(example_tensor, (call.attn_mask, call.query, call.key))
    if call.attn_mask is None or mask is None or query is None or key is None:
        return None
    allowed: Value = call.attn_mask
    if mask.dtype != torch.bool:
        found = allowed_keys(allowed, writes)
        if found is None or found[1] != -math.inf:
            return None  # beside a finite number, a query without keys attends to all of them
        allowed = found[0]
    parts = _parts(allowed, writes)
    for part in parts:
        rows = _compared_rows(part, writes)
        if rows is None:
            continue
        for own, other in (rows, rows[::-1]):
            ids = _row(own, -2, call, query, query), _row(other, -1, call, query, key)
            if ids[0] is None or ids[1] is None or any(map(writes.touch, leaves(own) + leaves(other))):
                continue
            others = [item for item in parts if item is not part]
            return _packed(call, part, ids[0], ids[1], (own, other), others, query, key, writes)
    return None


def _packed(
    call: AttentionCall,
    equality: Value,
    query_ids: Value,
    key_ids: Value,
    compared: tuple[Value, Value],
    others: list[Value],
    query: Tensor,
    key: Tensor,
    writes: Writes,
) -> PackedMask | None:
    """The mask where `others`, bool masks, hold beside the ids, which were made of the rows `compared`."""
    is_causal, seen, rest = False, list[Value](), list[Value]()
    for item in others:
        row = _row(item, -2, call, query, query)
        if row is not None:
            seen.append(row)
        elif is_causal_within(item, *compared, writes) or _is_causal(item, query, key, writes):
            is_causal = True
        else:
            rest.append(window_within(item, *compared, writes) or item)
    if any(map(writes.touch, [leaf for row in seen for leaf in leaves(row)])):
        return None
    ids = _as_int32(query_ids, key_ids, joined(seen) if seen else None, writes)
    return PackedMask(*ids, joined(rest) if rest else None, is_causal, equality)


def _is_causal(part: Value, query: Tensor, key: Tensor, writes: Writes) -> bool:
    """Whether `part`, a bool mask, is causal (top-left) by a comparison of indices, of whatever lengths."""
    ranges = compared_ranges(part, writes)
    if ranges is None:
        return False
    return _is_row(ranges[0], -1, query, key) and _is_row(ranges[1], -2, query, query)


def _parts(mask: Value, writes: Writes) -> list[Value]:
    """The values whose logical and `mask` is, those in front of which dims of one element were put among them."""
    found: list[Value] = []
    for part in conjuncts(mask, writes):
        dims, source = new_dims(part, writes), part.args[0] if part.args else None
        inner = _parts(source, writes) if dims is not None and isinstance(source, (fx.Node, Expr)) else []
        found += [with_dims(item, *dims) for item in inner] if dims and len(inner) > 1 else [part]
    return found


def _compared_rows(
    part: Value, writes: Writes, wanted: tuple[str, ...] = _EQUAL
) -> tuple[Value, Value] | None:
    """The two tensors that are equal where `part`, a bool mask, is True (or False, with `wanted` _UNEQUAL)."""
    name, args = operation(part), part.args
    if not args or not is_function(part, writes):
        return None
    left = args[0]
    if name in NOT and isinstance(left, (fx.Node, Expr)):
        return _compared_rows(left, writes, _UNEQUAL if wanted is _EQUAL else _EQUAL)
    found = operands(part, wanted, writes)
    if found is not None:
        return found[1], found[2]
    if name in wanted and len(args) == 2 and not part.kwargs and _is_zero(args[1]):
        difference = operands(left, _DIFFERENCE, writes) if isinstance(left, (fx.Node, Expr)) else None
        if difference is not None:
            return difference[1], difference[2]
    return None


def _is_zero(item: Any) -> bool:
    return isinstance(item, int) and item == 0


def _is_row(item: Value, along: int, query: Tensor, rows: Tensor) -> bool:
    """Whether `item` broadcasts to the scores, and differs along dim `along` (-2: queries, -1: keys), and in the batch, only."""
    tensor, batch = example_tensor(item), sizes_of(query)[0]
    if tensor is None or not -along <= tensor.dim() <= query.dim():
        return False
    others = {dim: size for dim, size in enumerate(sizes_of(tensor), -tensor.dim()) if dim != along}
    if others.pop(-4, 1) not in (1, batch):
        return False
    return sizes_of(tensor)[along] == sizes_of(rows)[-2] and all(size == 1 for size in others.values())


def _row(ids: Value, along: int, call: AttentionCall, query: Tensor, rows: Tensor) -> Value | None:
    """Such integers or bools as `[batch, length]`, or `[length]` where query has no batch. None where they are something else."""
    tensor, batch = example_tensor(ids), sizes_of(query)[0]
    if (
        tensor is None
        or tensor.is_floating_point()
        or tensor.is_complex()
        or not _is_row(ids, along, query, rows)
    ):
        return None
    rank = tensor.dim()
    for dim in reversed(range(rank)):
        if dim - rank not in (along, -4):
            ids = Expr.of("select", ids, dim, 0)
    if query.dim() < 4 or (rank == 4 and sizes_of(tensor)[0] == batch):
        return ids
    if isinstance(batch, int):
        return Expr.of("expand", ids, batch, -1)
    if not isinstance(call.query, fx.Node) or "val" in call.query.meta:
        return None  # a symbolic size in an exported program
    return Expr.of("expand", ids, Expr.of("size", call.query, 0), -1)


def _as_int32(query: Value, key: Value, seen: Value | None, writes: Writes) -> tuple[Value, Value]:
    """Ids of int32 that are equal where these are. `seen`: the queries that see keys at all, None for all of them."""
    if seen is None and _fits(query, writes) and _fits(key, writes):
        return _cast(query, torch.int32), _cast(key, torch.int32)
    # Those of 64 bits might not fit: their ranks among the keys' ids say as much, and leave ids that no key has.
    query, key = (Expr.of("contiguous", _cast(ids, torch.int64)) for ids in (query, key))
    ordered = Expr.of(operator.getitem, Expr.of(torch.sort, key, -1), 0)
    first, end = (
        Expr.of(torch.searchsorted, ordered, query, out_int32=True, right=right) for right in (False, True)
    )
    present: Value = Expr.of("gt", end, first)
    present = present if seen is None else Expr.of(torch.logical_and, present, seen)
    ranks = Expr.of(torch.where, present, first, _NO_KEY)
    return ranks, Expr.of(torch.searchsorted, ordered, key, out_int32=True)


def _cast(ids: Value, dtype: torch.dtype) -> Value:
    tensor = example_tensor(ids)
    return ids if tensor is not None and tensor.dtype == dtype else Expr.of("to", ids, dtype)


def _fits(ids: Value, writes: Writes) -> bool:
    """Whether all numbers in `ids` are numbers of int32, whatever the inputs are."""
    tensor = example_tensor(ids)
    if tensor is None or tensor.is_floating_point():
        return False
    if tensor.dtype in _FITTING:
        return True
    name, args = operation(ids), ids.args
    if not args or not is_function(ids, writes):
        return False
    if name == "arange":
        return all(isinstance(arg, int) and abs(arg) < 2**31 for arg in args) and "start" not in ids.kwargs
    if not isinstance(args[0], (fx.Node, Expr)):
        return False
    if name in ("searchsorted", "bucketize"):  # no more than there are bounds
        return True
    if name == "cumsum":  # counts no more than there are elements
        return _is_bool(args[0], writes)
    is_halved = name in ("floordiv", "floor_divide") and isinstance(args[1], int) and args[1] > 0
    return (name in CASTS or COPIES in facts_of(ids) or is_halved) and _fits(args[0], writes)


def _is_bool(item: Value, writes: Writes) -> bool:
    """Whether `item` holds 0 and 1 only: bools, or a cast of them."""
    tensor = example_tensor(item)
    if tensor is not None and tensor.dtype == torch.bool:
        return True
    source = item.args[0] if item.args else None
    is_cast = operation(item) in CASTS and is_function(item, writes)
    return is_cast and isinstance(source, (fx.Node, Expr)) and _is_bool(source, writes)


def insert_once(item: Value, graph: fx.Graph) -> fx.Node:
    """Write `item` as nodes right behind what they read, where it is not there already: layers share the ids of one mask."""
    if isinstance(item, fx.Node):
        return item
    args = tuple(insert_once(arg, graph) if isinstance(arg, Expr) else arg for arg in item.args)
    read = [arg for arg in args if isinstance(arg, fx.Node)]
    for user in read[0].users if read else graph.nodes:
        same = (user.target, user.args, user.kwargs) == (item.target, args, item.kwargs)
        if same and "sage_ids" in user.meta:
            return user
    place = max(read) if read else next(iter(graph.nodes))
    while place.op == "placeholder" and place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        if isinstance(item.target, str):
            node = graph.call_method(item.target, args, item.kwargs)
        else:
            node = graph.call_function(item.target, args, item.kwargs)
    node.meta = {"example_value": item.value, "sage_ids": True}
    return node
