"""Sparse attention: models choose keys for each query, and hand the choice to every attention function but those of
"eager" and "sdpa", for which they write it into the mask (DeepSeek V3.2, GLM 5, MiniMax M3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def chosen_keys(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor | None:
    """The keys that the model chose, bool `[batch, 1 or heads, q_len, kv_len]`, by the argument `indices` or
    `block_indices`; None where it chose none. query `[batch, heads, q_len, head_dim]`, key `[batch, kv_heads, kv_len, ...]`.
    """
    kv_len = key.shape[2]
    if (of_keys := options.get("indices")) is not None:  # [batch, q_len, chosen]
        return _at(of_keys, kv_len)[:, None]
    if (of_blocks := options.get("block_indices")) is None:  # [batch, groups of heads, q_len, chosen]
        return None
    size: int = module.indexer.block_size  # type: ignore[union-attr, assignment]
    blocks = _at(of_blocks, (kv_len + size - 1) // size)
    keys = blocks.repeat_interleave(size, dim=-1)[..., :kv_len]
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)


def _at(indices: Tensor, count: int) -> Tensor:
    """Bool `[..., count]`, True at `indices`, of which -1 is none."""
    places = torch.where(indices < 0, count, indices).long()
    allowed = torch.zeros((*indices.shape[:-1], count + 1), dtype=torch.bool, device=indices.device)
    return allowed.scatter(-1, places, True)[..., :count]


def within(attn_mask: Tensor | None, chosen: Tensor) -> Tensor:
    """`attn_mask`, bool or additive, where `chosen` allows it."""
    if attn_mask is None:
        return chosen
    if attn_mask.dtype == torch.bool:
        return attn_mask & chosen
    return torch.where(chosen, attn_mask, torch.finfo(attn_mask.dtype).min)
