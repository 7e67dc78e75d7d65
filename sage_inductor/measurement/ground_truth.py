"""Ground truth for the output of a kernel: attention in float64, and the errors that are allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sage_inductor.kernels.base import AttentionParams, Segments
from sage_inductor.measurement.metrics import relative_l2

DOCUMENTED = {"fast": 0.040, "balanced": 0.021, "accurate": 0.013}
"""precision -> the largest relative L2 error against float64 on normal inputs (README.md)."""

LARGEST_STEP = 32 / 448
"""The largest step by which P is rounded, relative to P: that of e4m3 at 448. Where a P is rounded the other way, an output
moves by at most this share of the largest V."""

LSE_TOLERANCE = 0.05
"""Absolute tolerance of the LSE (natural log). An element of Q or K that is rounded to the other integer moves a score by a
127th of its share."""

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The rounding of an output to its own dtype, relative."""


def float64_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    params: AttentionParams | None = None,
    rows: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp (natural log), written out in float64.

    query `[batch, heads, q_len, head_dim]`, key and value `[batch, kv_heads, kv_len, ...]`; attn_mask, bool or additive,
    must expand to `[batch, heads, q_len, kv_len]`. `rows`, indices of queries, limits the result to those. With `segments` a
    query sees keys of its own id only.

    Returns `[batch, heads, rows, value_head_dim]` and `[batch, heads, rows]`, both float64. A row that sees no key gives 0
    and -inf.
    """
    params = AttentionParams() if params is None else params
    q_len, kv_len = query.shape[2], key.shape[2]
    rows = torch.arange(q_len, device=query.device) if rows is None else rows
    groups = query.shape[1] // key.shape[1]
    k, v = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if params.scale is None else params.scale
    scores = query[:, :, rows].double() @ k.mT * scale
    low, high = params.bounds(q_len, kv_len)
    distance = torch.arange(kv_len, device=query.device) - rows[:, None]
    if low is not None:
        scores = scores.masked_fill(distance < low, -math.inf)
    if high is not None:
        scores = scores.masked_fill(distance > high, -math.inf)
    if segments is not None:
        same = segments.query[:, rows, None] == segments.key[:, None]
        scores = scores.masked_fill(~same[:, None], -math.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(*query.shape[:3], kv_len)[:, :, rows]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def sampled_error(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, params: AttentionParams, samples: int = 128
) -> float:
    """Relative L2 error of `out` against float64, on `samples` random queries of the last batch and head."""
    rows = torch.randperm(query.shape[2], device=query.device)[:samples]
    query, key, value = (tensor[-1:, -1:] for tensor in (query, key, value))
    expected, _ = float64_attention(query, key, value, None, params, rows)
    return relative_l2(out[-1:, -1:, rows], expected)
