"""Exact attention, `F.scaled_dot_product_attention`, behind the backend interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sage_inductor.backends import metadata_masks
from sage_inductor.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata, take_dropout
from sage_inductor.torch_internals.sdpa import builtin_sdpa


class SDPABackend(AttentionBackend):
    """PyTorch's own attention: every device, dtype and head size."""

    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return SDPAImpl

    @staticmethod
    def get_supported_head_sizes() -> None:
        return None


class SDPAImpl(AttentionImpl):
    """Extra arguments: `dropout_p` (alias `dropout_rate`), applied in every call, as SDPA does."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool,
        softmax_scale: float | None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix)
        self.dropout_p = take_dropout(extra_impl_args)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        self.check_inputs(query, key, value, output)
        attn_mask, is_causal = metadata_masks.of_metadata(attn_metadata)
        attn_mask = metadata_masks.normalized(attn_mask, query, key)
        is_causal = is_causal or self.causal
        result = exact_attention(query, key, value, attn_mask, is_causal, self.softmax_scale, self.dropout_p)
        return result.contiguous() if output is None else output.copy_(result)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """SDPA of `[batch, seq, heads, head_dim]` tensors, in the same layout. `attn_mask` is one that
    `metadata_masks.normalized` gave; it may stand beside `is_causal`."""
    if attn_mask is not None:
        if is_causal:
            attn_mask = metadata_masks.with_causal(attn_mask, query.shape[1], key.shape[1])
        if attn_mask.is_floating_point():
            attn_mask = attn_mask.to(query.dtype)
    result = builtin_sdpa(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask,
        dropout_p,
        is_causal and attn_mask is None,
        scale=scale,
        enable_gqa=is_grouped(query, key),
    )
    return result.transpose(1, 2)


def is_grouped(query: Tensor, key: Tensor) -> bool:
    """Whether query has more heads than key. Branching makes it a plain bool where a traced call has symbolic sizes."""
    grouped = False
    if query.shape[2] != key.shape[2]:
        grouped = True
    return grouped
