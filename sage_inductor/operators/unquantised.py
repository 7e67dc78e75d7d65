"""Attention without quantisation, by SDPA. "auto" falls back to it, and gradients are taken of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_inductor.kernels import AttentionParams, Segments
from sage_inductor.kernels.reference.algorithm import SCORES_AT_ONCE
from sage_inductor.torch_internals.sdpa import builtin_sdpa


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` of 4-D inputs, in the strides that it chooses. Differentiable.

    An additive mask of float32 keeps its precision beside inputs of 16 bits. Segments become a mask of q_len * kv_len bools."""
    bounds = params.bounds(query.shape[2], key.shape[2])
    attn_mask, plain_causal = combined_mask(query, key, attn_mask, *bounds, _same(segments))
    dtype = query.dtype
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, dtype):
        # The mask is not rounded: positions of ALiBi need more than the 8 bits of bfloat16, where the lowest float32 is -inf.
        # SDPA's memory-efficient kernel takes a mask of the inputs' dtype only, so the inputs are cast to the mask's.
        query, key, value = (tensor.to(attn_mask.dtype) for tensor in (query, key, value))
    gqa = bool(query.shape[1] != key.shape[1])  # sizes of a trace may be symbolic, and SDPA takes a bool only
    if gqa and attn_mask is not None:
        # That kernel takes masks but no GQA. To write out all scores instead would cost far more than these copies.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        gqa = False
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (query, key, value, attn_mask))
    if attn_mask is not None and attn_mask.is_floating_point() and wanted and torch.is_grad_enabled():
        query, attn_mask = _with_hidden_rows_at_zero(query, attn_mask)
    out = builtin_sdpa(
        query, key, value, attn_mask, is_causal=plain_causal, scale=params.scale, enable_gqa=gqa
    )
    return out.to(dtype)


# Next to such numbers a logarithm of sums keeps too few digits, and beside these no score is left in float32.
_LOW, _LOST = -1e4, -64 / torch.finfo(torch.float32).eps


def _with_hidden_rows_at_zero(query: Tensor, attn_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(query, attn_mask) of which SDPA makes the same output, and the gradients of it, where a number of an additive mask hides
    all keys of a query.

    Its backward passes take the weights for `exp(score - lse)`. There the LSE is the number itself, and all weights would be 1.
    So the row is shifted to 0. What the number leaves nothing of are scores of 0, with no gradients for queries and keys."""
    shape = attn_mask.shape
    if not attn_mask.requires_grad:  # else each of its elements has a gradient of its own
        for dim, stride in enumerate(attn_mask.stride()):  # the same for all heads, say: no copy for each
            if stride == 0 and shape[dim] > 1:
                attn_mask = attn_mask.narrow(dim, 0, 1)
    top = attn_mask.detach().amax(-1, keepdim=True)
    low = (top < _LOW) & (top > -math.inf)
    shifted = attn_mask - top.masked_fill(~low, 0.0)
    return query.masked_fill(low & (top <= _LOST), 0.0), shifted.expand(shape)


def exact_lse(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    lse: Tensor,
    segments: Segments | None = None,
) -> None:
    """Write the LSE of the exact scores of 4-D inputs into `lse`, float32 `[batch, heads, q_len]`. SDPA does not give it."""
    q_len, kv_len = query.shape[2], key.shape[2]
    attn_mask, plain_causal = combined_mask(
        query, key, attn_mask, *params.bounds(q_len, kv_len), _same(segments)
    )
    scale = query.shape[-1] ** -0.5 if params.scale is None else params.scale
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    step = max(1, SCORES_AT_ONCE // max(1, query.shape[0] * query.shape[1] * kv_len))
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:3], kv_len)
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        scores = query[:, :, rows].float() @ keys.mT * scale
        if plain_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1 + start), -math.inf)
        elif mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, rows], -math.inf)
        elif mask is not None:
            scores = scores + mask[:, :, rows]
        lse[:, :, rows] = scores.logsumexp(-1)


def combined_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    low: int | None,
    high: int | None,
    same: Tensor | None = None,
) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) for SDPA, which takes one of them: all of a mask, the bounds of a band and segments (`same`, as
    `same_segment` gives it) in one. A band `None .. 0` alone is `is_causal`."""
    if same is not None:
        attn_mask = _joined(attn_mask, same)
    if low is None and high is None:
        band = None
    elif low is None and high == 0 and attn_mask is None:
        return None, True
    else:
        q_len, kv_len = query.shape[-2], key.shape[-2]
        distance = (
            torch.arange(kv_len, device=query.device) - torch.arange(q_len, device=query.device)[:, None]
        )
        band = torch.ones_like(distance, dtype=torch.bool)
        if low is not None:
            band &= distance >= low
        if high is not None:
            band &= distance <= high
    if attn_mask is None:
        return band, False
    return (attn_mask if band is None else _joined(attn_mask, band)), False


def same_segment(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which keys are of each query's segment. Ids `[batch, q_len]` and `[batch, kv_len]` give bool `[batch, 1, q_len, kv_len]`; ids
    without a batch give `[q_len, kv_len]`."""
    same = query_segments[..., :, None] == key_segments[..., None, :]
    return same.unsqueeze(-3) if same.dim() > 2 else same


def _same(segments: Segments | None) -> Tensor | None:
    return None if segments is None else same_segment(*segments)


def _joined(attn_mask: Tensor | None, allowed: Tensor) -> Tensor:
    """`attn_mask`, bool or additive, which hides all that `allowed`, bool, does not allow. The two broadcast."""
    if attn_mask is None:
        return allowed
    return (
        attn_mask & allowed if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~allowed, -math.inf)
    )
