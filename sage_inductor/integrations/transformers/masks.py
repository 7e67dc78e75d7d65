"""The masks of a registered name: those of "sdpa", with one meaning for None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_inductor.integrations.transformers.promises import takes_bools


def mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """What transformers' `AttentionMaskInterface` calls: bool `[batch, 1, q_length or 1, kv_length]`, True where attention is
    allowed, or None; of a model that promises to work with the masks of "eager" only, additive as those.

    None says that the attention function knows the mask: all keys, or causality that ends at the last key. So chunks of a
    prefill need none, and while Dynamo traces plain causality needs none, where "sdpa" makes one. But "sdpa" also says None of
    queries at the beginning of a static cache, where causality starts at the first key. Models that drop queries afterwards
    (Gemma 4) leave the same shapes with the other meaning, so a mask is made there.
    """
    from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

    sizes: dict[str, Any] = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    sizes |= {"kv_offset": kv_offset, "attention_mask": attention_mask, "local_size": local_size}
    made: Tensor | None
    if not takes_bools(type(config)):
        made = eager_mask(**sizes, **rest)
        return made
    if allow_is_causal_skip and (local_size is None or kv_length < local_size):
        ends_at_last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        if ends_at_last and not _may_have_padding(attention_mask, kv_offset, kv_length):
            return None
    if rest.get("mask_function") is bidirectional_mask_function and rest.get("allow_is_bidirectional_skip"):
        # Padding alone: a row of keys, which more kernels take than a mask of each query's. Models that want a mask even
        # where nothing is padded put it beside another one (T5Gemma 2), for which it has to have all queries.
        sizes["q_length"] = 1
    made = sdpa_mask(**sizes, allow_is_causal_skip=False, **rest)
    return made


def _may_have_padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> bool:
    """Of a tokenizer's bool mask `[batch, keys]`. While it is traced, nobody knows."""
    if attention_mask is None:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if attention_mask.shape[-1] != kv_offset + kv_length:
        return True
    return not bool(attention_mask[:, kv_offset:].all())


def causal(query: Tensor, key: Tensor) -> Tensor:
    """Bool `[1, 1, q_len, kv_len]`: the last query sees all keys, each one before it a key less."""
    q_len, kv_len = query.shape[2], key.shape[2]
    allowed = torch.ones((q_len, kv_len), dtype=torch.bool, device=query.device)
    return allowed.tril(kv_len - q_len)[None, None]


def additive(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as attention by hand adds it: the lowest number where a bool mask says no."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.where(attn_mask, 0.0, torch.finfo(dtype).min).to(dtype)


def with_bias(attn_mask: Tensor | None, bias: Tensor) -> Tensor:
    """`bias`, additive `[1 or batch, heads, q_len, kv_len]`, where `attn_mask` allows it."""
    if attn_mask is None:
        return bias
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, bias, torch.finfo(bias.dtype).min)
    return bias + attn_mask
