"""Causality and windows by positions that begin anew in each sequence, as transformers has them for packed inputs.

The ids count where a position is not the one before it plus 1: `(positions.diff(...) != 1).cumsum(-1)`. So positions rise by 1
within a sequence, and of a key and a query of one sequence they lie as far apart as the indices do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, CASTS, operation
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.conjunction import is_function
from sage_inductor.rewriting.masks.new_dims import new_dims, operands

_COMPARED = ("le", "lt", "ge", "gt")
_SUB = ("sub", "subtract", "__sub__")


def is_causal_within(part: Value, query_ids: Value, key_ids: Value, writes: Writes) -> bool:
    """Whether `part`, a bool mask, says for keys of a query's own id that they are no later. `query_ids` and `key_ids` are the
    rows that are compared for that, with dims of one element for the other index."""
    ordered = _ordered(part, writes)
    return ordered is not None and _are_positions(ordered[1], ordered[0], query_ids, key_ids, writes)


def window_within(part: Value, query_ids: Value, key_ids: Value, writes: Writes) -> Value | None:
    """What `part`, a bool mask, says for keys of a query's own id, of their indices; None where it is no bound on how far
    positions lie apart: `positions[keys] > positions[queries] - 8`, `abs(positions[queries] - positions[keys]) <= 8`. Ids as
    above."""
    if len(part.args) == 2 and type(part.args[1]) is int and operation(part) in _COMPARED:
        distance = _first_of(part.args[0], "abs", writes) if is_function(part, writes) else None
        found = None if distance is None else operands(distance, _SUB, writes)
        indices = None if found is None else _indices(found[1:], query_ids, key_ids, writes)
        if indices is None:
            return None
        return Expr.of(operation(part), Expr.of("abs", Expr.of("sub", *indices)), part.args[1])
    found = operands(part, _COMPARED, writes)
    if found is None:
        return None
    (left, added), (right, more) = (_shifted(item, writes) for item in found[1:])
    indices = _indices((left, right), query_ids, key_ids, writes)
    if indices is None:
        return None
    return Expr.of(found[0], indices[0], Expr.of("add", indices[1], more - added))


def _shifted(item: Value, writes: Writes) -> tuple[Value, int]:
    """(positions, number) of which `item` is the sum."""
    name, args = operation(item), item.args
    if name not in ("add", *_SUB) or len(args) != 2 or item.kwargs or not is_function(item, writes):
        return item, 0
    source, by = args
    if not isinstance(source, (fx.Node, Expr)) or type(by) is not int:
        return item, 0
    return source, by if name == "add" else -by


def _indices(
    positions: Sequence[Value], query_ids: Value, key_ids: Value, writes: Writes
) -> tuple[Value, Value] | None:
    """By which tensors each of the two `positions` is indexed, where one is of the queries and one of the keys."""
    one, other = positions
    found = []
    for item in positions:
        read = _read(item, writes)
        if read is None or len(read.index) != 2 or read.dims:
            return None
        found.append(read.index[1])
    if _are_positions(one, other, query_ids, key_ids, writes):
        return found[0], found[1]
    return (found[0], found[1]) if _are_positions(other, one, query_ids, key_ids, writes) else None


def _are_positions(query: Value, key: Value, query_ids: Value, key_ids: Value, writes: Writes) -> bool:
    """Whether `query` and `key` are the positions whose jumps the ids count, of the queries and of the keys."""
    found = [_read(item, writes) for item in (query, key, query_ids, key_ids)]
    reads = [read for read in found if read is not None]
    if len(reads) < 4:
        return False
    by_query, by_key, of_query, of_key = reads
    if (by_query.index, by_query.dims) != (of_query.index, of_query.dims):
        return False
    if (by_key.index, by_key.dims) != (of_key.index, of_key.dims):
        return False
    for one, other in zip(of_query.index, of_key.index, strict=False):
        if one is not other and not (_is_range(one, writes) and _is_range(other, writes)):
            return False
    if len(of_query.index) not in (0, 2) or len(of_query.index) != len(of_key.index):
        return False
    if of_query.index and not all(_is_range(read.index[1], writes) for read in (of_query, of_key)):
        return False
    if of_query.source is not of_key.source or by_query.source is not by_key.source:
        return False
    counted = _counted(of_query.source, writes)
    return counted is not None and counted is by_query.source


def compared_ranges(part: Value, writes: Writes) -> tuple[Value, Value] | None:
    """(keys, queries) where `part`, a bool mask, is `keys <= queries` of two tensors that count 0, 1, 2, ... each."""
    ordered = _ordered(part, writes)
    if ordered is None:
        return None
    key, query = ordered
    return (key, query) if _is_range(key, writes) and _is_range(query, writes) else None


def _ordered(part: Value, writes: Writes) -> tuple[Value, Value] | None:
    """(first, second) where `part` is `first <= second`."""
    found = operands(part, ("le", "ge"), writes)
    if found is None:
        return None
    name, left, right = found
    return (left, right) if name == "le" else (right, left)


@dataclass(frozen=True)
class _Read:
    """`source[index]`, of one tensor for each dim, or `source` itself where `index` is empty, with new dims of one element."""

    source: Value
    index: tuple[Value, ...]
    dims: tuple[tuple[int, ...], ...]


def _read(item: Any, writes: Writes) -> _Read | None:
    dims: list[tuple[int, ...]] = []
    index: tuple[Value, ...] = ()
    while isinstance(item, (fx.Node, Expr)) and is_function(item, writes):
        new = new_dims(item, writes)
        if operation(item) in BROADCASTS:
            item = item.args[0]
        elif new is not None:
            dims.append(tuple(new[1]))
            item = item.args[0]
        elif not index and _tensors(item) is not None:
            index = _tensors(item) or ()
            item = item.args[0]
        else:
            break
    return _Read(item, index, tuple(dims)) if isinstance(item, (fx.Node, Expr)) else None


def _tensors(item: Value) -> tuple[Value, ...] | None:
    """The tensors that `item` indexes its first argument by; None where it does something else."""
    index = item.args[1] if operation(item) in ("getitem", "__getitem__") else None
    if not isinstance(index, tuple) or not all(isinstance(part, (fx.Node, Expr)) for part in index):
        return None
    tensors = [example_tensor(part) for part in index]
    return index if all(t is not None and t.dtype != torch.bool for t in tensors) else None


def _is_range(item: Any, writes: Writes) -> bool:
    """Whether `item` holds 0, 1, 2, ..., in whatever dim."""
    if not isinstance(item, (fx.Node, Expr)) or not is_function(item, writes):
        return False
    name, args = operation(item), item.args
    if name == "arange":
        return len(args) == 1 and not {"start", "end", "step"} & item.kwargs.keys()
    if name == "add" and len(args) == 2 and type(args[1]) is int and args[1] == 0:
        return _is_range(args[0], writes)
    if name in CASTS or new_dims(item, writes) is not None:
        tensor = example_tensor(item)
        return tensor is not None and not tensor.is_floating_point() and _is_range(args[0], writes)
    return False


def _counted(ids: Value, writes: Writes) -> Value | None:
    """The positions whose jumps `ids`, `[batch, length]`, counts; None where it counts something else."""
    changes = _first_of(ids, "cumsum", writes)
    if changes is None or not _is_last_dim(ids, 1):
        return None
    diff = _first_of(changes, "ne", writes)
    if diff is None or len(changes.args) != 2 or type(changes.args[1]) is not int or changes.args[1] != 1:
        return None
    positions = _first_of(diff, "diff", writes)
    if positions is None or not _is_last_dim(diff, 2) or (len(diff.args) > 1 and diff.args[1] != 1):
        return None
    if "append" in diff.kwargs or diff.kwargs.get("n", 1) != 1 or len(diff.args) > 3:
        return None
    before, after = example_tensor(positions), example_tensor(diff)
    if before is None or after is None or before.dim() != 2 or sizes_of(before) != sizes_of(after):
        return None
    if before.dtype != torch.int64:
        return None  # small integers count from the largest to the lowest, and floats not at all
    while operation(positions) in BROADCASTS and is_function(positions, writes):
        positions = positions.args[0]
    found: Value = positions
    return None if writes.touch(positions) else found


def _first_of(item: Any, name: str, writes: Writes) -> Any:
    """The first argument of `item` where that is an operation of this name."""
    is_it = isinstance(item, (fx.Node, Expr)) and operation(item) == name and is_function(item, writes)
    return item.args[0] if is_it and item.args and isinstance(item.args[0], (fx.Node, Expr)) else None


def _is_last_dim(item: Value, position: int) -> bool:
    dim = item.args[position] if len(item.args) > position else item.kwargs.get("dim", -1)
    tensor = example_tensor(item)
    return tensor is not None and dim in (-1, tensor.dim() - 1)
