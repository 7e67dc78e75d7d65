"""Masks that were worked out as a whole while compiling: bands, and chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_inductor.rewriting.masks.blocks import RowEnds, ends_of
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


def ends_of_constant(mask: Tensor, q_len: int, kv_len: int) -> RowEnds | None:
    """The ends of the rows of a mask that is the same for all batches and heads and does nothing but hide keys. None for another,
    and where a finite number hides all keys of a query, which attends to all alike then."""
    additive = mask.dtype != torch.bool
    if additive:
        masked_out = mask <= torch.finfo(mask.dtype).min * MASKED_OUT_FRACTION
        if not bool((masked_out | (mask == 0)).all()):
            return None
        mask = ~masked_out
    allowed = _the_same_for_all(mask, q_len, kv_len)
    if allowed is None:
        return None
    ends = ends_of(lambda start, stop: allowed[start:stop], q_len, kv_len)
    return None if additive and bool((ends.count == 0).any()) else ends


def _the_same_for_all(mask: Tensor, q_len: int, kv_len: int) -> Tensor | None:
    """`mask` `[q_len, kv_len]` of every batch and head; None where they differ."""
    mask = mask.expand(*([1] * (2 - mask.dim())), *mask.shape) if mask.dim() < 2 else mask
    rows = mask.expand(*mask.shape[:-2], q_len, kv_len).reshape(-1, q_len, kv_len)
    return rows[0] if rows.shape[0] == 1 or bool((rows == rows[0]).all()) else None
