"""The order of dims: an `Order` says which dims of a tensor are `[*batch, queries, keys]`, wherever they stand."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import fx

from sage_inductor.call import Expr, Value, example_tensor
from sage_inductor.patterns.nodes import MATRIX_TRANSPOSE, PERMUTE, TRANSPOSE, T, argument, shape_of

Order: TypeAlias = tuple[int, ...]


def as_they_stand(rank: int) -> Order:
    return tuple(range(rank))


def ordered(shape: tuple[Any, ...], order: Order) -> tuple[Any, ...]:
    """The sizes of a tensor of `shape` with its dims in `order`."""
    return tuple(shape[dim] for dim in order)


def arranged(term: Value, order: Order) -> Value:
    """`term`, which broadcasts to a tensor whose dims are in `order`, with its own dims so."""
    if order == as_they_stand(len(order)):
        return term
    for _ in range(len(order) - len(shape_of(term))):
        term = Expr.of("unsqueeze", term, 0)
    return Expr.of("permute", term, *order)


def reshaped(order: Order, rank: int) -> Order | None:
    """`order` for a view with `rank` dims, of which the last two are the same; None where others are moved."""
    dims = len(order)
    if order[:-2] != as_they_stand(dims - 2):
        return None
    return (*range(rank - 2), *(dim - dims + rank for dim in order[-2:]))


def permutation(item: Any) -> tuple[fx.Node, Order] | None:
    """(x, order) where `item` is x with its dims in that order."""
    tensor = example_tensor(item) if isinstance(item, fx.Node) else None
    source = argument(item, 0, "input") if tensor is not None else None
    if tensor is None or tensor.dim() < 2 or not isinstance(source, fx.Node):
        return None
    rank = tensor.dim()
    order = list(range(rank))
    if item in TRANSPOSE:
        first, second = argument(item, 1, "dim0"), argument(item, 2, "dim1")
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first], order[second] = order[second], order[first]
    elif item in PERMUTE:
        dims = argument(item, 1, "dims")
        dims = dims if isinstance(dims, (tuple, list)) else item.args[1:]
        if len(dims) != rank or not all(isinstance(dim, int) for dim in dims):
            return None
        order = [dim % rank for dim in dims]
    elif _swaps_the_last_two(item, rank):
        order[-1], order[-2] = order[-2], order[-1]
    else:
        return None
    return source, tuple(order)


def _swaps_the_last_two(item: fx.Node, rank: int) -> bool:
    of_matrix = item in T or (item.target is getattr and item.args[1] == "T")
    return (
        item in MATRIX_TRANSPOSE
        or (item.target is getattr and item.args[1] == "mT")
        or (of_matrix and rank == 2)
    )


def untransposed(item: fx.Node) -> Value:
    """`item` with its last two dims swapped: the node before a transpose where there is one."""
    found = permutation(item)
    if found is not None:
        source, order = found
        rank = len(order)
        if order == (*range(rank - 2), rank - 1, rank - 2):
            return source
    return Expr.of("transpose", item, -2, -1)
