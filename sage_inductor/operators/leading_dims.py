"""Inputs of any number of dims, seen as the 2 to 4 dims that the operators take. They broadcast as SDPA's do.

Query `[2, 3, heads, q_len, head_dim]` beside key `[3, heads, kv_len, head_dim]` becomes a batch of 6, to which key is expanded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sage_inductor.torch_internals.distributed import is_dtensor

__all__ = ["Folded", "folded"]


class Folded:
    """Inputs of the operators, and the way back from their outputs.

    query, key and value have the same number of dims, 2 to 4, and the same batch. Query's heads are a multiple of key's."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        enable_gqa: bool,
        leading: tuple[int, ...] | None = None,
        into_heads: bool = False,
    ) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.attn_mask = attn_mask
        self.enable_gqa = enable_gqa
        self.leading = leading
        """The dims in front of q_len that the output is to have; None where the operator's output has them already."""
        self.into_heads = into_heads
        """Which dims in front of q_len were folded: True, all but the first became heads; False, all but the last the batch."""

    @property
    def memory_order(self) -> list[int] | None:
        """The order of the output's dims in memory; None for query's. A query that was expanded has no order of its own."""
        if self.leading is None or 0 not in self.query.stride():
            return None
        return [0, 1, 2, 3]

    def unfolded(self, output: Tensor, rows_only: bool = False) -> Tensor:
        """A view of the operator's output `[batch, heads, q_len, value_head_dim]` with the dims that SDPA's output has. With
        `rows_only` it is the LSE, `[batch, heads, q_len]`."""
        if self.leading is None:
            return output
        if is_dtensor(output):
            folded_dim = 1 if self.into_heads else 0
            folded_sizes = self.leading[1:] if self.into_heads else self.leading[:-1]
            output = _ready_for_view(output, [folded_dim], folded_sizes)
        return output.view(*self.leading, *output.shape[-1 if rows_only else -2 :])

    def buffer(self, out: Tensor) -> Tensor | None:
        """`out` as the operator writes into it; None where no view of it will do."""
        if self.leading is None:
            return out
        expected = (*self.leading, self.query.shape[-2], self.value.shape[-1])
        if tuple(out.shape) != expected:
            raise RuntimeError(f"sage_inductor attention: out is {tuple(out.shape)}, the output {expected}")
        padded = _with_dims(out, 4)
        return _fold(padded, self.into_heads) if _folds_to_view(padded, self.into_heads) else None


def folded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> Folded:
    """The inputs of `F.scaled_dot_product_attention` in the form of the operators. An input is copied only where no view of it has
    that form. Raises RuntimeError for dims that do not broadcast."""
    dims = max(query.dim(), key.dim(), value.dim())
    in_front = [tensor.shape[:-2] for tensor in (query, key, value)]
    are_alike = dims <= 4 and query.dim() == key.dim() and in_front[1] == in_front[2]
    if are_alike and in_front[0][:-1] == in_front[1][:-1] and (enable_gqa or in_front[0] == in_front[1]):
        return Folded(query, key, value, attn_mask, enable_gqa)
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return Folded(query, key, value, attn_mask, enable_gqa)  # which the operator refuses

    q, k, v = (_with_dims(tensor, max(dims, 4)) for tensor in (query, key, value))
    k, v, grouped = _heads_alike(q, k, v, enable_gqa)
    heads = max(q.shape[-3], k.shape[-3])
    if not grouped and q.shape[-3] != heads:
        q = q.expand(*q.shape[:-3], heads, -1, -1)
    try:
        batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        if dims <= 4:
            return Folded(query, key, value, attn_mask, enable_gqa)  # the operator says which
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise RuntimeError(
            f"sage_inductor attention: query, key and value do not broadcast: {shapes}"
        ) from None
    q, k, v = (tensor.expand(*batch, *tensor.shape[-3:]) for tensor in (q, k, v))
    into_heads = not all(_folds_to_view(tensor, False) for tensor in (q, k, v)) and all(
        _folds_to_view(tensor, True) for tensor in (q, k, v)
    )
    mask = attn_mask
    if mask is not None and 2 < mask.dim() <= q.dim():
        mask = _folded_mask(_with_dims(mask, q.dim()), (*batch, heads), into_heads)
    leading = (*batch, heads)[max(dims, 4) - dims :]
    q, k, v = (_fold(tensor, into_heads) for tensor in (q, k, v))
    return Folded(q, k, v, mask, grouped, leading, into_heads)


def _heads_alike(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, bool]:
    """(key, value, whether heads are grouped): key and value with the same number of heads. Heads are grouped where query has a
    multiple of that number."""
    counts = [tensor.shape[-3] for tensor in (query, key, value)]
    if enable_gqa:
        wanted = max(counts[1:])
        # SDPA lets key and value have different numbers of heads: 2 and 4 beside 8 of query.
        key, value = (
            tensor
            if count in (0, wanted) or wanted % count
            else tensor.repeat_interleave(wanted // count, -3)
            for tensor, count in zip((key, value), counts[1:], strict=True)
        )
        return key, value, True
    if counts[1] == counts[2] == 1:
        return key, value, counts[0] != 1
    wanted = max(counts)
    key, value = (
        tensor.expand(*tensor.shape[:-3], wanted, -1, -1) if tensor.shape[-3] == 1 else tensor
        for tensor in (key, value)
    )
    return key, value, False


def _with_dims(tensor: Tensor, dims: int) -> Tensor:
    while tensor.dim() < dims:
        tensor = tensor.unsqueeze(0)
    return tensor


def _fold(tensor: Tensor, into_heads: bool) -> Tensor:
    """`[..., heads, seq, dim]` as four dims. The dims in front of the heads become the batch; with `into_heads` all of them but the
    first become heads."""
    first, last = (1, tensor.dim() - 3) if into_heads else (0, tensor.dim() - 4)
    if last > first and is_dtensor(tensor):
        tensor = _ready_for_view(tensor, range(first, last + 1), tensor.shape[first : last + 1])
    return tensor.flatten(first, last)


def _ready_for_view(tensor: Tensor, dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A DTensor so placed that torch can flatten `dims`, of `sizes`, or unflatten one to `sizes`."""
    from sage_inductor.operators.distributed.handler import for_view

    ready: Tensor = for_view(tensor, dims, sizes)
    return ready


def _folds_to_view(tensor: Tensor, into_heads: bool) -> bool:
    """Whether `_fold` copies nothing."""
    dims = list(range(1, tensor.dim() - 2) if into_heads else range(tensor.dim() - 3))
    sizes, strides = tensor.shape, tensor.stride()
    dims = [dim for dim in dims if sizes[dim] != 1]
    return all(
        strides[outer] == strides[inner] * sizes[inner]
        for outer, inner in zip(dims[:-1], dims[1:], strict=True)
    )


def _folded_mask(mask: Tensor, leading: tuple[int, ...], into_heads: bool) -> Tensor:
    """`mask` folded as query is. Dims along which it is the same stay one of size 1."""
    first, last = (1, mask.dim() - 2) if into_heads else (0, mask.dim() - 3)
    if all(size == 1 for size in mask.shape[first:last]):
        return _fold(mask, into_heads)
    sizes = [leading[dim] if first <= dim < last else mask.shape[dim] for dim in range(mask.dim() - 2)]
    return _fold(mask.expand(*sizes, -1, -1), into_heads)
