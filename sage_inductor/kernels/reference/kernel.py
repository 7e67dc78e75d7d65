"""The eager quantised oracle as a kernel: right on every device, fast on none."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_inductor.kernels.base import PRECISIONS, AttentionParams, Kernel, Segments
from sage_inductor.kernels.key_value import Attend, KeyValueForm, KeyValueLayout, Quantize
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.reference import key_value
from sage_inductor.kernels.smoothing import SMOOTHINGS


class ReferenceKernel(Kernel):
    """Plain PyTorch. Never chosen by "auto": it defines what the others must compute, it saves no time."""

    name = "reference"
    precisions = tuple(PRECISIONS)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    device_types = ("cpu", "cuda")
    head_dims = range(1, 1025)  # |int8 dot| < 2^24, the integers float32 holds exactly
    takes_segments = True
    prequantizes = True
    smoothings = tuple(SMOOTHINGS)
    skips = True

    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        return []

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor | None,
        segments: Segments | None = None,
    ) -> None:
        result, result_lse = reference.attention(
            query,
            key,
            value,
            attn_mask,
            bounds=params.bounds(query.shape[2], key.shape[2]),
            scale=params.scale,
            precision=params.precision,
            smoothing=params.smoothing,
            segments=segments,
            skip_threshold=params.skip_threshold,
            skip_by=params.skip_by,
        )
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)

    def key_value_layout(self, form: KeyValueForm) -> KeyValueLayout:
        return key_value.layout(form)

    def prepare_key_value(
        self, key: Tensor, value: Tensor, query: Tensor | None, form: KeyValueForm
    ) -> Quantize:
        def quantize(key: Tensor, value: Tensor, query: Tensor | None) -> Tensor:
            kv = reference.quantize_kv(key, value, form.precision, smoothing=form.smoothing, query=query)
            return key_value.pack(kv, form)

        return quantize

    def prepare_prequantized(
        self,
        query: Tensor,
        form: KeyValueForm,
        kv_len: int,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor,
    ) -> Attend:
        def attend(query: Tensor, packed: Tensor, out: Tensor, lse: Tensor) -> None:
            result, result_lse = reference.attention_prequantized(
                query,
                key_value.unpack(packed, form, kv_len),
                bounds=params.bounds(query.shape[2], kv_len),
                scale=params.scale,
                precision=params.precision,
            )
            out.copy_(result)
            lse.copy_(result_lse)

        return attend
