"""The order of dims of scores and weights, which models permute freely.

An `Order` lists the dims of a tensor as `[*batch, queries, keys]`. Scores `[batch, q, heads, k]` have the order (0, 2, 1, 3):
dims 0 and 2 are batch dims, dim 1 holds the queries, dim 3 the keys.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.patterns.nodes import MATRIX_TRANSPOSE, PERMUTE, TRANSPOSE, T, argument, shape_of

Order: TypeAlias = tuple[int, ...]


def as_they_stand(rank: int) -> Order:
    return tuple(range(rank))


def ordered(shape: tuple[Any, ...], order: Order) -> tuple[Any, ...]:
    """The sizes of a tensor of `shape`, its dims taken in `order`."""
    return tuple(shape[dim] for dim in order)


def arranged(term: Value, order: Order) -> Value:
    """`term` with its dims taken in `order`, that of the tensor to which it broadcasts. Missing leading dims become dims of
    1: a bias `[q, 1, k]` beside scores `[batch, q, heads, k]` becomes `[1, 1, q, k]`."""
    if order == as_they_stand(len(order)):
        return term
    for _ in range(len(order) - len(shape_of(term))):
        term = Expr.of("unsqueeze", term, 0)
    return Expr.of("permute", term, *order)


def viewed(order: Order, shape: tuple[Any, ...], source: tuple[Any, ...]) -> Order | None:
    """The order of the tensor before a view, of sizes `source`, where `order` is that of the view, of sizes `shape`.

    A view may split and merge batch dims that stand side by side: `scores.view(b * h, q, k)` of `[b, h, q, k]`. It keeps
    the dims of queries and keys. None where a view splits or merges those, or batch dims that stand apart.

    Dims in the order `[*batch, queries, keys]` already are not looked at here: whatever the view did, the caller compares
    the sizes of queries and keys with those of the product in the end.
    """
    rank = len(order)
    if order == as_they_stand(rank):
        return as_they_stand(len(source))
    if order[:-2] == as_they_stand(rank - 2) and shape[-2:] == source[-2:]:
        return (*range(len(source) - 2), *(dim - rank + len(source) for dim in order[-2:]))
    if not all(isinstance(size, int) for size in (*shape, *source)):
        return None
    there = {here[0]: (here, dims) for dims, here in regrouped(source, shape) or ()}
    groups: list[tuple[list[int], list[int]]] = []
    position = 0
    while position < rank:
        here, dims = there.get(order[position], ([], []))
        if not here or list(order[position : position + len(here)]) != here:
            return None
        groups.append((here, dims))
        position += len(here)
    alone = all(len(here) == len(dims) == 1 for here, dims in groups[-2:])
    return tuple(dim for _, dims in groups for dim in dims) if alone else None


def regrouped(first: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """The dims that a reshape from sizes `first` to sizes `second` splits and merges, as pairs of dims of either that hold
    the same elements: ([0, 1], [0]) where the first two are merged. None where the sizes do not divide so."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(first) and j < len(second):
        dims, other_dims = [i], [j]
        size, other_size = first[i], second[j]
        while size != other_size:
            if size < other_size:
                i += 1
                if i == len(first):
                    return None
                dims.append(i)
                size *= first[i]
            else:
                j += 1
                if j == len(second):
                    return None
                other_dims.append(j)
                other_size *= second[j]
        groups.append((dims, other_dims))
        i, j = i + 1, j + 1
    if any(size != 1 for size in (*first[i:], *second[j:])) or not groups:
        return None
    groups[-1][0].extend(range(i, len(first)))
    groups[-1][1].extend(range(j, len(second)))
    return groups


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
    of_matrix = item in T or (item.target is getattr and item.args[1] in ("T", "H"))
    return (
        item in MATRIX_TRANSPOSE
        or (item.target is getattr and item.args[1] in ("mT", "mH"))
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
