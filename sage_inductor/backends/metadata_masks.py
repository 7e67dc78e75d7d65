"""Masks of metadata, turned into masks that broadcast to `[batch, heads, q_len, key_len]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels.arguments import as_flag

# What is no metadata. A named tuple can be.
OVERLOOKED = (Mapping, Tensor, list, str, bytes, int, float, type)


def of_metadata(attn_metadata: object | None) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) of any metadata object; None and False for an attribute that it lacks.

    Raises TypeError for what has no such attributes and would be overlooked: a dict, a list, a number, a text, a class; a tensor, as
    where a host passes another argument in front of the metadata; and for a mask that is no tensor. Raises ValueError for an
    is_causal that is no bool.
    """
    if isinstance(attn_metadata, OVERLOOKED):
        raise TypeError(
            f"attn_metadata is a {type(attn_metadata).__name__} (valid: an object with attributes, such as "
            "AttentionMetadata, None)"
        )
    attn_mask = getattr(attn_metadata, "attn_mask", None)
    if not isinstance(attn_mask, (Tensor, NoneType)):
        raise TypeError(f"attn_mask is a {type(attn_mask).__name__} (valid: a tensor, None)")
    return attn_mask, as_flag("attn_metadata.is_causal", getattr(attn_metadata, "is_causal", False))


def normalized(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`attn_mask` as a 4-D bool mask (True: attend) or an additive mask in float32 or query's dtype.

    query, key: `[batch, seq, heads, head_dim]`. Integer masks become bool. Masks `[batch, key_len]` and `[batch, q_len,
    key_len]` gain their missing dims. A mask shorter than the keys is padded in front with "attend".

    Raises ValueError for a mask longer than the keys, and for one that does not have 2 to 4 dims.
    """
    if attn_mask is None:
        return None
    if not 2 <= attn_mask.dim() <= 4:
        raise ValueError(f"attn_mask has {attn_mask.dim()} dimensions (valid: 2 to 4)")
    if attn_mask.is_complex():
        raise ValueError(f"attn_mask is {attn_mask.dtype} (valid: bool, integers, floating point)")
    attn_mask = attn_mask.to(query.device)
    if not attn_mask.is_floating_point() and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask != 0
    elif attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        attn_mask = attn_mask.to(torch.float32)
    key_len, mask_len = key.shape[1], attn_mask.shape[-1]
    if mask_len > key_len:
        raise ValueError(f"attn_mask covers {mask_len} keys (valid: up to the {key_len} there are)")
    if mask_len < key_len:
        attend = True if attn_mask.dtype == torch.bool else 0.0
        attn_mask = F.pad(attn_mask, (key_len - mask_len, 0), value=attend)
    if attn_mask.dim() == 2:
        return attn_mask[:, None, None, :]
    return attn_mask[:, None] if attn_mask.dim() == 3 else attn_mask


def with_causal(attn_mask: Tensor, q_len: int, key_len: int) -> Tensor:
    """One mask of the dtype of `attn_mask` that is causal (top-left alignment), too. SDPA takes only one of the two."""
    visible = torch.ones(q_len, key_len, dtype=torch.bool, device=attn_mask.device).tril()
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return attn_mask.masked_fill(~visible, -math.inf)
