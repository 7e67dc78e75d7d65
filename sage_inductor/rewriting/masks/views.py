"""Where the element of a view lies in what it is a view of: `x.transpose(0, 1)` at (i, j) is x at (j, i)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor, example_value
from sage_inductor.graph.facts import BROADCASTS, RESHAPES, operation
from sage_inductor.graph.sizes import Size, known, sizes_of
from sage_inductor.rewriting.masks.algebra import add, multiply
from sage_inductor.rewriting.masks.formula import ZERO, Linear, NotUnderstood, Scalar, plain

Index = tuple[Scalar, ...]
# The same numbers where they stand. Casts are read elsewhere.
SAME = ("contiguous", "detach", "alias", "positive", "clone", "cpu", "cuda", "lift_fresh", "lift_fresh_copy")


def argument(item: Value, position: int, *names: str, default: Any = None) -> Any:
    if len(item.args) > position:
        return item.args[position]
    return next((item.kwargs[name] for name in names if name in item.kwargs), default)


def size(value: Any) -> Size:
    """A size in the arguments of a node: a number, a symbolic one, or the node of it."""
    if isinstance(value, (fx.Node, Expr)):
        value = example_value(value)
    if isinstance(value, torch.SymInt):
        return plain(known(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise NotUnderstood("a size")


def constant(value: Size) -> Linear:
    return Linear(constant=plain(value))


def source_of(item: Value, index: Index) -> tuple[Value, Index] | None:
    """The tensor that `item` is a view of, and where in it the element at `index` lies. None where `item` is no view. Raises
    NotUnderstood for a view that is not known, and for one by tensors of indices."""
    name = operation(item)
    if name == "getattr" and len(item.args) > 1:
        name = str(item.args[1])
    source = argument(item, 0, "input", "self")
    if not isinstance(source, (fx.Node, Expr)) or name not in _KNOWN:
        return None
    before, after = example_tensor(source), example_tensor(item)
    if before is None or after is None:
        return None
    if name in SAME:
        return source, index
    if name in BROADCASTS:
        return source, broadcast(index, sizes_of(before))
    if name in RESHAPES:
        if before.dtype != after.dtype:
            raise NotUnderstood("a view of another dtype")
        return source, _reshaped(index, sizes_of(before), sizes_of(after))
    return source, _VIEWS[name](item, index, sizes_of(before))


def broadcast(index: Index, sizes: Sequence[Size]) -> Index:
    """Where the element of a broadcast result lies in an operand of `sizes`."""
    own = index[len(index) - len(sizes) :]
    return tuple(ZERO if length == 1 else at for at, length in zip(own, sizes, strict=True))


def _reshaped(index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    long_before = [length for length in before if length != 1]
    at = [position for position, length in zip(index, after, strict=True) if length != 1]
    long_after = [length for length in after if length != 1]
    if long_before != long_after:
        if len(long_before) != 1:
            raise NotUnderstood("a reshape")
        flat: Scalar = ZERO
        for position, length in zip(at, long_after, strict=True):
            flat = add(multiply(flat, constant(length)), position)
        at = [flat]
    remaining = iter(at)
    return tuple(ZERO if length == 1 else next(remaining) for length in before)


def _dim(value: Any, rank: int) -> int:
    if not isinstance(value, int):
        raise NotUnderstood("a dim")
    return value % rank


def _permuted(index: Index, order: Sequence[int]) -> Index:
    """`order`: the dims of the source in the order in which the view has them."""
    at: list[Scalar] = [ZERO] * len(order)
    for position, dim in zip(index, order, strict=True):
        at[dim] = position
    return tuple(at)


def _transpose(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    rank = len(sizes)
    first = _dim(argument(item, 1, "dim0", "axis0"), rank)
    second = _dim(argument(item, 2, "dim1", "axis1"), rank)
    order = list(range(rank))
    order[first], order[second] = second, first
    return _permuted(index, order)


def _permute(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    dims = argument(item, 1, "dims")
    order = dims if isinstance(dims, (list, tuple)) else item.args[1:]
    return _permuted(index, [_dim(dim, len(sizes)) for dim in order])


def _movedim(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    source, target = (
        [_dim(dim, len(sizes)) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
        for dims in (argument(item, 1, "source"), argument(item, 2, "destination"))
    )
    order: list[int | None] = [None] * len(sizes)
    for dim, place in zip(source, target, strict=True):
        order[place] = dim
    others = iter(dim for dim in range(len(sizes)) if dim not in source)
    return _permuted(index, [next(others) if dim is None else dim for dim in order])


def _matrix(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    """The last two dims turned."""
    return (*index[:-2], *reversed(index[-2:]))


def _turned(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    return tuple(reversed(index))


def _select(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    dim = _dim(argument(item, 1, "dim"), len(sizes))
    return (*index[:dim], _position(argument(item, 2, "index"), sizes[dim]), *index[dim:])


def _narrow(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    dim = _dim(argument(item, 1, "dim"), len(sizes))
    start = _position(argument(item, 2, "start"), sizes[dim])
    return (*index[:dim], add(index[dim], start), *index[dim + 1 :])


def _slice(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    dim = _dim(argument(item, 1, "dim", default=0), len(sizes))
    part = slice(argument(item, 2, "start"), argument(item, 3, "end"), argument(item, 4, "step"))
    after = example_tensor(item)
    assert after is not None
    return (*index[:dim], sliced(part, index[dim], sizes[dim], sizes_of(after)[dim]), *index[dim + 1 :])


def _flip(item: Value, index: Index, sizes: Sequence[Size]) -> Index:
    dims = argument(item, 1, "dims")
    dims = dims if isinstance(dims, (list, tuple)) else item.args[1:]
    turned = {_dim(dim, len(sizes)) for dim in dims}
    return tuple(
        add(constant(sizes[dim] - 1), multiply(constant(-1), at)) if dim in turned else at
        for dim, at in enumerate(index)
    )


def _position(value: Any, length: Size) -> Linear:
    """A place in a dim, counted from its end where it is negative."""
    found = size(value)
    if isinstance(found, int):
        return constant(found if found >= 0 else length + found)
    if getattr(found, "is_nonnegative", None) is True:
        return constant(found)
    if getattr(found, "is_negative", None) is True:
        return constant(length + found)
    raise NotUnderstood("a place that may count from the end")


def sliced(part: slice, at: Scalar, length: Size, left: Size) -> Scalar:
    """The place in a dim of `length` that `at` in a slice of it is; `left`: the length of the slice."""
    step = 1 if part.step is None else size(part.step)
    if not isinstance(step, int) or step < 1:
        raise NotUnderstood("a step")
    start = ZERO if part.start is None else _position(part.start, length)
    if isinstance(start.constant, int) and isinstance(length, int):
        start = constant(min(max(start.constant, 0), length))
    elif start != ZERO:
        # A start beyond either end is cut off, which shows in the length.
        end = constant(length) if part.stop is None else _position(part.stop, length)
        if step != 1 or plain(end.constant - start.constant) != left:
            raise NotUnderstood("a slice")
    return add(multiply(constant(step), at), start)


_VIEWS: dict[str, Callable[[Value, Index, Sequence[Size]], Index]] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("mT", "mH", "adjoint"), _matrix),
    **dict.fromkeys(("t", "T", "H", "numpy_T", "matrix_H"), _turned),
    "select": _select,
    "narrow": _narrow,
    "slice": _slice,
    "flip": _flip,
}
_KNOWN = frozenset({*SAME, *BROADCASTS, *RESHAPES, *_VIEWS})
