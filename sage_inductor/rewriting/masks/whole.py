"""Masks that were worked out as a whole while compiling: bands, and chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_inductor.rewriting.masks.blocks import ends_of
from sage_inductor.rewriting.masks.mask import Mask, band

# Additive masks write "not allowed" as -inf or as the most negative number of their dtype; half of that is as
# final.
MASKED_OUT_FRACTION = 0.5


def classify_constant(mask: Tensor, q_len: int, kv_len: int) -> Mask | None:
    """The band that `mask` is, or None when it is none (or differs between batches or heads)."""
    additive = mask.dtype != torch.bool
    if additive:
        if bool((mask == 0).all()):
            return Mask("zero_bias")
        masked_out = mask <= torch.finfo(mask.dtype).min * MASKED_OUT_FRACTION
        if not bool((masked_out | (mask == 0)).all()):
            return None
        mask = ~masked_out
    allowed = _the_same_for_all(mask, q_len, kv_len)
    if allowed is None:
        return None
    if bool(allowed.all()):
        return Mask("all_true")
    ends = ends_of(lambda start, stop: allowed[start:stop], q_len, kv_len)
    if additive and bool((ends.count == 0).any()):
        return None  # a row of finite minima attends to everything alike, not to nothing
    bounds = ends.band(kv_len)
    return None if bounds is None else band(*bounds, kv_len - q_len)


def chunk_of(mask: Tensor, q_len: int, kv_len: int) -> int | None:
    """The size of the chunks within which a bool mask is causal."""
    allowed = _the_same_for_all(mask, q_len, kv_len) if mask.dtype == torch.bool else None
    if allowed is None:
        return None
    return ends_of(lambda start, stop: allowed[start:stop], q_len, kv_len).chunk(kv_len)


def _the_same_for_all(mask: Tensor, q_len: int, kv_len: int) -> Tensor | None:
    """`mask` `[q_len, kv_len]` of every batch and head; None where they differ."""
    mask = mask.expand(*([1] * (2 - mask.dim())), *mask.shape) if mask.dim() < 2 else mask
    rows = mask.expand(*mask.shape[:-2], q_len, kv_len).reshape(-1, q_len, kv_len)
    return rows[0] if rows.shape[0] == 1 or bool((rows == rows[0]).all()) else None
