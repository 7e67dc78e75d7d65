"""Operations that are neither views nor computed element by element: ranges, triangles, pieces, indices, levels of vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import operation
from sage_inductor.graph.sizes import Size, sizes_of
from sage_inductor.rewriting.masks.algebra import (
    add,
    as_number,
    at_least,
    both,
    choice,
    equal,
    multiply,
    remainder,
    subtract,
)
from sage_inductor.rewriting.masks.formula import (
    ONE,
    ZERO,
    Condition,
    Linear,
    NotUnderstood,
    Scalar,
    constant_of,
    data_of,
)
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.standpoint import Reads, Standpoint
from sage_inductor.rewriting.masks.views import Index, argument, broadcast, constant, size, sliced

WHOLE = slice(None)


def _arange(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    numbers = [reader.number(arg, place) for arg in item.args]
    start = numbers[0] if len(numbers) > 1 else reader.number(item.kwargs.get("start", 0), place)
    step = numbers[2] if len(numbers) > 2 else reader.number(item.kwargs.get("step", 1), place)
    return add(start, multiply(step, index[0]))


def _scalar(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    return reader.number(argument(item, 0, "data", "s"), place)


def _eye(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    return choice(equal(*index), ONE, ZERO)


def _tril(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    kept = at_least(_diagonal(reader, item, place), subtract(index[-1], index[-2]))
    return choice(kept, reader.read(item.args[0], index, place), ZERO)


def _triu(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    kept = at_least(subtract(index[-1], index[-2]), _diagonal(reader, item, place))
    return choice(kept, reader.read(item.args[0], index, place), ZERO)


def _diagonal(reader: Reads, item: Value, place: Standpoint) -> Scalar:
    return reader.number(argument(item, 1, "diagonal", "k", default=0), place)


def _cumsum(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    """Of a number that is the same everywhere."""
    dim = argument(item, 1, "dim", "axis")
    each = constant_of(as_number(reader.read(item.args[0], index, place)))
    if each is None or not isinstance(dim, int):
        raise NotUnderstood("a sum")
    return multiply(constant(each), add(index[dim], ONE))


def _diff(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    """What each element is more than the one before it; a single one may be put in front."""
    source, order, dim = item.args[0], argument(item, 1, "n", default=1), argument(item, 2, "dim", default=-1)
    front = argument(item, 3, "prepend")
    tensor = example_tensor(front) if isinstance(front, (fx.Node, Expr)) else None
    if order != 1 or argument(item, 4, "append") is not None or not isinstance(dim, int):
        raise NotUnderstood("differences")
    before, after = index[:dim], index[dim % len(index) + 1 :]

    def at(value: Any, position: Scalar) -> Scalar:
        return reader.read(value, (*before, position, *after), place)

    here = index[dim]
    if front is None:
        return subtract(at(source, add(here, ONE)), at(source, here))
    if tensor is None or sizes_of(tensor)[dim] != 1:
        raise NotUnderstood("differences")
    first = subtract(at(source, ZERO), at(front, ZERO))
    later = subtract(at(source, here), at(source, subtract(here, ONE)))
    return choice(at_least(here, ONE), later, first)


def _cat(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    tensors, dim = argument(item, 0, "tensors"), argument(item, 1, "dim", "axis", default=0)
    if operation(item) == "hstack":
        dim = min(1, len(index) - 1)
    if not isinstance(tensors, (list, tuple)) or not tensors or not isinstance(dim, int):
        raise NotUnderstood("a sequence")
    dim %= len(index)
    starts: list[Size] = [0]
    for tensor in tensors:
        found = example_tensor(tensor)
        if found is None or found.dim() != len(index):
            raise NotUnderstood("a piece")
        starts.append(starts[-1] + sizes_of(found)[dim])
    pieces = []
    for tensor, start in zip(tensors, starts, strict=False):
        at = subtract(index[dim], constant(start))
        pieces.append(reader.read(tensor, (*index[:dim], at, *index[dim + 1 :]), place))
    result = pieces.pop()
    for piece, start in zip(reversed(pieces), reversed(starts[1:-1]), strict=True):
        beyond = reader.ranges.simplified(at_least(index[dim], constant(start)))
        result = choice(beyond, result, piece)
    return result


def _pad(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    source, pads = item.args[0], argument(item, 1, "pad")
    mode, value = argument(item, 2, "mode", default="constant"), argument(item, 3, "value")
    tensor = example_tensor(source) if isinstance(source, (fx.Node, Expr)) else None
    if tensor is None or mode != "constant" or not isinstance(pads, (list, tuple)):
        raise NotUnderstood("a padding")
    inner, within = list(index), []
    for from_last, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim, first, last = len(index) - 1 - from_last, size(before), size(after)
        if first == 0 and last == 0:
            continue
        if not isinstance(first, int) or first < 0:
            raise NotUnderstood("a cut")
        inner[dim] = subtract(index[dim], constant(first))
        within += [at_least(inner[dim], ZERO), at_least(constant(sizes_of(tensor)[dim] - 1), inner[dim])]
    filled = ZERO if value is None else reader.number(value, place)
    condition = reader.ranges.simplified(both(*within))
    return choice(condition, reader.read(source, tuple(inner), place), filled)


def _getitem(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    source, key = item.args[0], item.args[1]
    tensor = example_tensor(source) if isinstance(source, (fx.Node, Expr)) else None
    if tensor is None:
        raise NotUnderstood("an item")
    if operation(item) == "index":  # aten's: None is a whole dim
        assert isinstance(key, (list, tuple))
        key = tuple(WHOLE if part is None else part for part in key)
    elif isinstance(key, list):
        raise NotUnderstood("a list")
    parts = whole_index(key, tensor.dim())
    by = [_tensor(part) for part in parts]
    places = [at for at, tensor_ in enumerate(by) if tensor_ is not None]
    own = list(enumerate(index))
    shared: Index = ()
    if places:
        if places[-1] - places[0] >= len(places) or any(isinstance(part, int) for part in parts):
            raise NotUnderstood("indices apart")
        rank = max(tensor_.dim() for tensor_ in by if tensor_ is not None)
        shared = index[places[0] : places[0] + rank]
        del own[places[0] : places[0] + rank]
    after = example_tensor(item)
    assert after is not None
    lengths, found, remaining = sizes_of(tensor), list[Scalar](), iter(own)
    for part, tensor_ in zip(parts, by, strict=True):
        if part is None:
            next(remaining)
        elif tensor_ is not None:
            found.append(_looked_up(reader, reader.read(part, broadcast(shared, sizes_of(tensor_)), place)))
        elif isinstance(part, slice):
            dim, at = next(remaining)
            found.append(sliced(part, at, lengths[len(found)], sizes_of(after)[dim]))
        elif isinstance(part, int):
            found.append(constant(part if part >= 0 else lengths[len(found)] + part))
        else:
            raise NotUnderstood("an index")
    return reader.read(source, tuple(found), place)


def _tensor(part: Any) -> Tensor | None:
    found = example_tensor(part) if isinstance(part, (fx.Node, Expr)) else None
    if found is not None and found.dtype == torch.bool:
        raise NotUnderstood("an index of bools")
    return found


def _looked_up(reader: Reads, at: Scalar) -> Scalar:
    """An index from a tensor, where it is known not to count from the end."""
    if isinstance(at, Linear) and not data_of(at):
        least = reader.ranges.least(at)
        if least is None or least < 0:
            raise NotUnderstood("an index that may count from the end")
    return at


def _index_select(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    dim, by = argument(item, 1, "dim"), argument(item, 2, "index")
    if not isinstance(dim, int):
        raise NotUnderstood("a dim")
    at = _looked_up(reader, reader.read(by, (index[dim],), place))
    return reader.read(item.args[0], (*index[:dim], at, *index[dim % len(index) + 1 :]), place)


def _repeat(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    """The whole, several times along each dim; new dims stand in front."""
    source, times = item.args[0], argument(item, 1, "repeats", "dims")
    counts = list(times) if isinstance(times, (list, tuple)) else list(item.args[1:])
    tensor = example_tensor(source) if isinstance(source, (fx.Node, Expr)) else None
    if tensor is None or len(counts) != len(index):
        raise NotUnderstood("a repetition")
    own = []
    for at, count, length in zip(
        index[len(index) - tensor.dim() :], counts[len(index) - tensor.dim() :], sizes_of(tensor), strict=True
    ):
        is_once = isinstance(count, int) and count == 1
        own.append(ZERO if length == 1 else at if is_once else remainder(at, constant(length)))
    return reader.read(source, tuple(own), place)


def whole_index(key: Any, rank: int) -> list[Any]:
    """An index with an item for each of `rank` dims, and None for each new one. Raises NotUnderstood for bools, which are new
    dims, too."""
    items = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(item, bool) for item in items):
        raise NotUnderstood("a bool as an index")
    missing = [WHOLE] * (rank - sum(item is not None and item is not Ellipsis for item in items))
    at = next((place for place, item in enumerate(items) if item is Ellipsis), None)
    return [*items, *missing] if at is None else [*items[:at], *missing, *items[at + 1 :]]


def _into_level(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    source, dim, level = item.args
    at = next((at for number, at in reversed(place.levels) if number == level), None)
    if at is None or not isinstance(dim, int) or dim < 0:
        raise NotUnderstood("a level")
    return reader.read(source, (*index[:dim], at, *index[dim:]), place)


def _out_of_level(reader: Reads, item: Value, index: Index, place: Standpoint) -> Scalar:
    source, level, _, dim = item.args
    if not isinstance(dim, int) or dim < 0:
        raise NotUnderstood("a dim")
    return reader.read(source, (*index[:dim], *index[dim + 1 :]), place.inside(level, index[dim]))


def within(parts: list[Any], index: Index, tensor: Tensor, ranges: Ranges) -> tuple[Condition, Index]:
    """Whether the place `index` of `tensor` is one of those that `parts`, slices and numbers, take, and where among them."""
    if len(parts) != len(index):
        raise NotUnderstood("new dims in what is written to")
    conditions, inner = list[Condition](), list[Scalar]()
    for part, at, length in zip(parts, index, sizes_of(tensor), strict=True):
        if isinstance(part, int):
            conditions.append(equal(at, constant(part if part >= 0 else length + part)))
            continue
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise NotUnderstood("a place that is written to")
        first = 0 if part.start is None else size(part.start)
        last = length if part.stop is None else size(part.stop)
        if any((ranges.of_size(end)[0] or 0) < 0 or ranges.of_size(end)[0] is None for end in (first, last)):
            raise NotUnderstood("a place that may count from the end")
        if part.start is not None:
            conditions.append(at_least(at, constant(first)))
        if part.stop is not None:
            conditions.append(at_least(constant(last - 1), at))
        inner.append(subtract(at, constant(first)))
    return both(*conditions), tuple(inner)


MAKERS: dict[str, Callable[..., Scalar]] = {
    "arange": _arange,
    **dict.fromkeys(("tensor", "scalar_tensor", "as_tensor", "_as_tensor_fullprec"), _scalar),
    "eye": _eye,
    "tril": _tril,
    "triu": _triu,
    "cumsum": _cumsum,
    "diff": _diff,
    **dict.fromkeys(("cat", "concat", "concatenate", "hstack"), _cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("getitem", "__getitem__", "index"), _getitem),
    "index_select": _index_select,
    "repeat": _repeat,
    "_add_batch_dim": _into_level,
    "_remove_batch_dim": _out_of_level,
}
