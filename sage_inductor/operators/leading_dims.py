"""Inputs of any number of dims, which broadcast as SDPA's do, as the 2 to 4 dims that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Folded", "folded"]


class Folded:
    """Inputs of the operators, and the way back from their outputs.

    query, key and value have one number of dims, 2 to 4, the same batch, and heads of which query's are a multiple."""

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
        """The dims in front of q_len that the output is to have; None where the operator's output has them."""
        self.into_heads = into_heads
        """Whether all dims in front of q_len but the first became heads, and not all but the last the batch."""

    @property
    def memory_order(self) -> list[int] | None:
        """The order of the output's dims in memory; None: query's, which a query that was expanded has none of."""
        if self.leading is None or 0 not in self.query.stride():
            return None
        return [0, 1, 2, 3]

    def unfolded(self, output: Tensor, rows_only: bool = False) -> Tensor:
        """An output `[batch, heads, q_len, value_head_dim]` of the operator, or its LSE, which has rows only, with the dims
        that SDPA's output has. A view."""
        if self.leading is None:
            return output
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
    """The inputs of `F.scaled_dot_product_attention` in the form of the operators. What they hold is copied only where no
    view can have that form. Raises RuntimeError for dims that do not broadcast."""
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
    """key and value with as many heads, and whether query has a multiple of them that is more."""
    counts = [tensor.shape[-3] for tensor in (query, key, value)]
    if enable_gqa:
        wanted = max(counts[1:])
        # Each of key and value may repeat by a number of its own.
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
    """`[..., heads, seq, dim]` as four dims: those in front of the heads as one, or all of them but the first as heads."""
    return tensor.flatten(1, -3) if into_heads else tensor.flatten(0, -4)


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
    """`mask` with the dims of query folded as there; where it is the same along all of them, it stays one."""
    first, last = (1, mask.dim() - 2) if into_heads else (0, mask.dim() - 3)
    if all(size == 1 for size in mask.shape[first:last]):
        return _fold(mask, into_heads)
    sizes = [leading[dim] if first <= dim < last else mask.shape[dim] for dim in range(mask.dim() - 2)]
    return _fold(mask.expand(*sizes, -1, -1), into_heads)
