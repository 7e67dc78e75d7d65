"""Sizes and strides of traced tensors, as far as they are known.

A symbolic size (`torch.SymInt`) that is compared asks the tracer for an answer. It then compiles once more for sizes of which
the answer is another, and raises for those that only the data tell, as the length of `x[mask]`. Here a symbolic size is its
expression, which compares by its form: sizes are equal where they are so for all inputs, and `!=` says "not known to be
equal". An expression has no order: `<` raises TypeError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sage_inductor.torch_internals.sizes import expression, hinted, is_always_true, is_backed

Size: TypeAlias = Any
"""An int, or the sympy expression of a symbolic size."""

# What a size that only the data tell counts as where tensors' dims are put in order: more than 1, as that of a whole dim.
UNKNOWN = 4096


def known(size: Size | torch.SymInt) -> Size:
    """`size` as it compares."""
    return expression(size) if isinstance(size, torch.SymInt) else size


def sizes_of(tensor: Tensor) -> tuple[Size, ...]:
    return tuple(map(known, tensor.shape))


def strides_of(tensor: Tensor) -> tuple[Size, ...]:
    """The strides that say where elements are: 0 for a dim of one element, whose own says nothing."""
    return tuple(
        0 if size == 1 else known(stride)
        for size, stride in zip(sizes_of(tensor), tensor.stride(), strict=True)
    )


def are_multiples(size: Size, of: Size) -> bool:
    """Whether `size` is a multiple `of` another, for all inputs."""
    return bool(of != 0 and size % of == 0)


def is_static(tensor: Tensor) -> bool:
    return all(isinstance(number, int) for number in (*tensor.shape, *tensor.stride()))


def is_dense(tensor: Tensor, order: Iterable[int] | None = None) -> bool:
    """Whether `tensor` is contiguous, or would be with its dims in `order`."""
    sizes, strides, expected = sizes_of(tensor), strides_of(tensor), 1
    for dim in reversed(range(tensor.dim()) if order is None else list(order)):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected *= sizes[dim]
    return True


def differ(first: Size | torch.SymInt, second: Size | torch.SymInt) -> bool:
    """Whether two sizes are different for all inputs; those of which it is not known may be equal."""
    first, second = known(first), known(second)
    return isinstance(first, int) and isinstance(second, int) and first != second


def size_hint(size: int | torch.SymInt) -> int | None:
    """`size`, or, of a symbolic one, the value it was traced with; adds no guard. None where only the data tell it."""
    if isinstance(size, int):
        return size
    return hinted(size, UNKNOWN) if is_backed(size) else None


def memory_order(tensor: Tensor, guarded: bool = False) -> list[int]:
    """The dims of `tensor` from outermost to innermost in memory, the last dim always innermost: what SDPA gives its output,
    `[0, 2, 1, 3]` for a query in NHD memory.

    Of symbolic strides, the order they had when they were traced: `guarded` makes another order another graph."""
    last = tensor.dim() - 1
    return [*_outermost_first(tensor, range(last), guarded), last]


def all_in_memory_order(tensor: Tensor) -> list[int]:
    """The same with the last dim where it stands."""
    return _outermost_first(tensor, range(tensor.dim()), guarded=False)


def _outermost_first(tensor: Tensor, dims: Iterable[int], guarded: bool) -> list[int]:
    strides: list[Any] = list(tensor.stride())
    if not (guarded and all(map(is_backed, strides))):
        strides = [stride if isinstance(stride, int) else hinted(stride, UNKNOWN) for stride in strides]
    return sorted(dims, key=strides.__getitem__, reverse=True)


def order_is_known(tensor: Tensor) -> bool:
    """Whether `memory_order` is the same for all inputs."""
    strides, order = tensor.stride(), memory_order(tensor)[:-1]
    return all(is_always_true(strides[outer] >= strides[inner]) for outer, inner in itertools.pairwise(order))
