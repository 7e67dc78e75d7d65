"""SageAttention in CUDA C++ for Hopper (sm_90a): the fastest kernel family where it runs.

The Triton kernels quantise and look at masks, attention.cu attends. NVRTC, which comes with torch's CUDA wheels, compiles attention.cu when it is
first needed; the result is kept on disk. This module imports torch only.

Sources: SageAttention 1 and 2 (arXiv:2410.02367, 2411.10958), as in kernels/triton/attention.py.
"""

# cuda-bindings has no type information.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base import AttentionParams, AttentionProblem, Prepared, Segments, differs_by_query_or_head, reason
from ..device import capability, has_gpu, interpreted
from ..triton import MAX_KEYS, TritonKernel
from ..triton.crossover import slower_than_sdpa
from .crossover import MIN_KV_LEN

if TYPE_CHECKING:
    from ..triton.prequantized import KeyValueQuantization, PrequantizedAttention

CAPABILITY = (9, 0)

__all__ = ["CAPABILITY", "HopperKernel"]


class HopperKernel(TritonKernel):
    """INT8 QK^T and FP8, INT8 or 16-bit PV with wgmma; `attention.cu` describes the algorithm."""

    name: ClassVar[str] = "hopper"
    head_dims: ClassVar[Collection[int]] = range(16, 257, 8)
    # P is rounded against a maximum that lags behind, so its rounding errors are independent of the oracle's: their difference
    # has the norm of two.
    oracle_distance: ClassVar[float] = 2**0.5

    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        reasons = super().unavailable_reasons(device)
        if interpreted():
            return [*reasons, reason("TRITON_INTERPRET", "1", "a GPU")]
        if reasons:
            return reasons
        indices = range(torch.cuda.device_count()) if device is None else [device.index]
        if all(capability(index) != CAPABILITY for index in indices):
            return [_capability_reason(capability(next(iter(indices))))]
        return compiler_reasons()

    def not_supported_reasons(self, problem: AttentionProblem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        device = problem.query.device
        if device.type == "cuda" and has_gpu() and capability(device.index) != CAPABILITY:
            reasons.append(_capability_reason(capability(device.index)))
        mask = problem.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            reasons.append(reason("attn_mask dtype", mask.dtype, torch.bool))
        if mask is not None and problem.query_segments is not None and differs_by_query_or_head(mask):
            reasons.append("attn_mask of more than keys beside segments (supported: one of both)")
        queries = problem.query.shape[:3]
        if all(type(size) is int for size in queries):
            rows = queries[0] * queries[1] * (queries[2] + 127)
            if rows > MAX_KEYS:
                reasons.append(reason("batch * heads * q_len", rows, f"up to {MAX_KEYS}"))
        return reasons

    def unmeasured_reasons(self, problem: AttentionProblem) -> list[str]:
        reasons = super().unmeasured_reasons(problem)
        mask = problem.attn_mask
        if mask is not None and differs_by_query_or_head(mask):
            reasons.append(
                'attn_mask of more than keys (not measured yet: by tune="measure", or kernel="hopper")'
            )
        return reasons

    def not_chosen_reasons(self, problem: AttentionProblem) -> list[str]:
        if unmeasured := self.unmeasured_reasons(problem):
            return unmeasured
        device = problem.query.device
        if device.type != "cuda" or not has_gpu():
            return []
        return slower_than_sdpa(problem, capability(device.index), MIN_KV_LEN)

    def prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor | None,
        segments: Segments | None = None,
    ) -> Prepared:
        from ..triton.launch import prepare
        from .launch import HopperAttention

        return prepare(query, key, value, attn_mask, params, out, lse, HopperAttention, segments)

    def _halves(self) -> tuple[type[KeyValueQuantization], type[PrequantizedAttention]]:
        from .launch import HopperKeyValueQuantization, PrequantizedHopperAttention

        return HopperKeyValueQuantization, PrequantizedHopperAttention


@cache
def compiler_reasons() -> list[str]:
    """Why attention.cu cannot be compiled here; empty when it can."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return ["cuda-bindings=not installed (supported: 12.9 and newer; torch's CUDA wheels bring it)"]
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        return [f"NVRTC=not found ({str(error).splitlines()[0]})"]
    if major < 12:
        return [reason("NVRTC", f"{major}.{minor}", "12.0 and newer")]
    return []


def _capability_reason(found: tuple[int, int]) -> str:
    return reason("compute capability", "{}.{}".format(*found), "9.0")
