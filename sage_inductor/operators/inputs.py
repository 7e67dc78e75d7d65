"""Inputs and outputs as kernels take them. Inputs have four dims, outputs the memory order that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sage_inductor.graph.sizes import memory_order
from sage_inductor.kernels import AttentionParams, AttentionProblem, Segments, TensorSpec
from sage_inductor.operators.validation import misfit


def as_4d(tensor: Tensor) -> Tensor:
    """A view of `[..., seq, head_dim]` as `[batch, heads, seq, head_dim]`. Masks are seen so, too."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor


def as_segments(query_segments: Tensor | None, key_segments: Tensor | None) -> Segments | None:
    """The ids as kernels take them. Ids without a batch get one of 1; None where there are no ids."""
    if query_segments is None or key_segments is None:
        return None
    if query_segments.dim() == 1:
        query_segments, key_segments = query_segments[None], key_segments[None]
    return Segments(query_segments, key_segments)


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    return_lse: bool = False,
    segments: Segments | None = None,
) -> AttentionProblem:
    """The problem as kernels judge it. Inputs have 2 to 4 dims and are seen as 4-D; they may be real or traced."""
    mask = None if attn_mask is None else TensorSpec.of(attn_mask).as_4d()
    q, k, v = (TensorSpec.of(tensor).as_4d() for tensor in (query, key, value))
    ids = (None, None) if segments is None else tuple(map(TensorSpec.of, segments))
    return AttentionProblem(q, k, v, mask, params, return_lse, *ids)


def empty_output(query: Tensor, value: Tensor, order: Sequence[int] | None) -> Tensor:
    """A tensor for the output: `[..., q_len, value_head_dim]` in query's dtype, dense, its dims in memory in `order`, or in that of
    query where it is None. Raises RuntimeError for an order that is none."""
    if order is None:
        order = memory_order(query, guarded=True)
    elif sorted(order) != list(range(query.dim())):
        raise misfit(f"memory_order={list(order)} is no order of {query.dim()} dims")
    shape = (*query.shape[:-1], value.shape[-1])
    return torch.empty_permuted(shape, list(order), dtype=query.dtype, device=query.device)


def empty_lse(query: Tensor) -> Tensor:
    """A tensor for the LSE: float32 `[..., q_len]`."""
    return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
