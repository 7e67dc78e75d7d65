"""SageAttention in Triton: the package's own portable kernel family (NVIDIA Ampere and newer).

This module is torch only. The device code beside it is imported at the first run, because that imports
triton, which CPU wheels of torch do not bring.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base import (
    AttentionParams,
    AttentionProblem,
    Kernel,
    Prepared,
    Segments,
    gradient_problem,
    mark_written,
    output_problem,
    reason,
)
from ..cache import Cache
from ..device import capability, capability_reasons, has_gpu, interpreted
from ..key_value import Attend, KeyValueForm, KeyValueLayout, Quantize
from ..skipping import threshold_problem, unmeasured_skipping
from ..smoothing import SMOOTHINGS
from .crossover import slower_than_sdpa

if TYPE_CHECKING:
    from .launch import TritonAttention
    from .prequantized import KeyValueQuantization, PrequantizedAttention

# The least compute capability of each precision: INT8 tensor cores came with Ampere, FP8 ones with Ada.
MIN_CAPABILITY: dict[str, tuple[int, int]] = {"fast": (8, 9), "balanced": (8, 0), "accurate": (8, 0)}

MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)

# Rows of K's workspace are counted in 32 bits by the tensor descriptors.
MAX_KEYS = 2**31 - 2**20

__all__ = ["MIN_CAPABILITY", "TritonKernel", "attention_varlen"]


class TritonKernel(Kernel):
    """INT8 QK^T and FP8, INT8 or 16-bit PV; `attention.py` describes the algorithm."""

    name: ClassVar[str] = "triton"
    precisions: ClassVar[Collection[str]] = ("fast", "balanced", "accurate")
    dtypes: ClassVar[Collection[torch.dtype]] = (torch.float16, torch.bfloat16, torch.float32)
    device_types: ClassVar[Collection[str]] = ("cuda",)
    head_dims: ClassVar[Collection[int]] = range(16, 257, 8)
    takes_segments: ClassVar[bool] = True
    prequantizes: ClassVar[bool] = True
    smoothings: ClassVar[Collection[str]] = tuple(SMOOTHINGS)
    skips: ClassVar[bool] = True

    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        if find_spec("triton") is None:
            return ["triton=not installed (supported: 3.6 and newer)"]
        if interpreted():
            return []
        if device is not None and device.type != "cuda":
            return [reason("device", device.type, self.device_types)]
        if torch.version.cuda is None or not torch.cuda.is_available():
            return [reason("device", "no NVIDIA GPU", self.device_types)]
        indices = range(torch.cuda.device_count()) if device is None else [device.index]
        return capability_reasons(max(capability(index) for index in indices), min(MIN_CAPABILITY.values()))

    def not_supported_reasons(self, problem: AttentionProblem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        device = problem.query.device
        if interpreted() and device.type == "cpu":
            reasons = [text for text in reasons if not text.startswith("device=")]
        elif (
            problem.params.precision in self.precisions
            and problem.params.precision not in self.precisions_on(device)
        ):
            reasons += capability_reasons(capability(device.index), MIN_CAPABILITY[problem.params.precision])
        for name, spec in (("key dtype", problem.key), ("value dtype", problem.value)):
            if spec.dtype != problem.query.dtype:
                reasons.append(
                    reason(name, spec.dtype, f"query's, {problem.query.dtype}".replace("torch.", ""))
                )
        if problem.attn_mask is not None and problem.attn_mask.dtype not in MASK_DTYPES:
            reasons.append(reason("attn_mask dtype", problem.attn_mask.dtype, MASK_DTYPES))
        keys = [problem.key.shape[0], problem.key.shape[1], problem.key.shape[2]]
        if all(type(size) is int for size in keys) and keys[0] * keys[1] * (keys[2] + 127) > MAX_KEYS:
            reasons.append(
                reason("batch * kv_heads * kv_len", keys[0] * keys[1] * keys[2], f"up to {MAX_KEYS}")
            )
        return reasons

    def precisions_on(self, device: torch.device) -> Collection[str]:
        if device.type != "cuda" or not has_gpu():
            return self.precisions
        found = capability(device.index)
        return tuple(name for name in self.precisions if found >= MIN_CAPABILITY[name])

    def unmeasured_reasons(self, problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.query_segments is not None:
            reasons.append(f'segments (not measured yet: by tune="measure", or kernel="{self.name}")')
        return reasons + unmeasured_skipping(problem, self.name)

    def not_chosen_reasons(self, problem: AttentionProblem) -> list[str]:
        if unmeasured := self.unmeasured_reasons(problem):
            return unmeasured
        device = problem.query.device
        if device.type != "cuda" or not has_gpu():
            return []
        return slower_than_sdpa(problem, capability(device.index))

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
        call = self.prepare(query, key, value, attn_mask, params, out, lse, segments)
        call(query, key, value, attn_mask, out, lse, segments=segments)

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
        from .launch import prepare

        return prepare(query, key, value, attn_mask, params, out, lse, segments=segments)

    def key_value_layout(self, form: KeyValueForm) -> KeyValueLayout:
        from .prequantized import layout

        return layout(form)

    def prepare_key_value(
        self, key: Tensor, value: Tensor, query: Tensor | None, form: KeyValueForm
    ) -> Quantize:
        return self._halves()[0](key, value, query, form).run

    def prepare_prequantized(
        self,
        query: Tensor,
        form: KeyValueForm,
        kv_len: int,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor,
    ) -> Attend:
        return self._halves()[1](query, form, kv_len, params, out, lse).run

    def _halves(self) -> tuple[type[KeyValueQuantization], type[PrequantizedAttention]]:
        """What quantises K and V apart, and what attends to them."""
        from .prequantized import KeyValueQuantization, PrequantizedAttention

        return KeyValueQuantization, PrequantizedAttention


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    precision: str = "fast",
    smoothing: str = "auto",
    return_lse: bool = False,
    out: Tensor | None = None,
    skip_threshold: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of several sequences of different lengths, packed one after another.

    Inference only. query `[total_q, heads, head_dim]`, key `[total_k, kv_heads, head_dim]`, value `[total_k, kv_heads,
    value_head_dim]`, in any strides; sequence b owns rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of query
    and likewise of key and value (int32 `[batch + 1]`, on the inputs' device, never read by the host).
    `max_seqlen_q` and `max_seqlen_k` are upper bounds of the lengths: queries and keys beyond them are not looked at. K and V are smoothed and quantised
    per sequence, K as `smoothing` says (`Config.smoothing`). `is_causal`, `bottom_right`, `window` (left, right; negative: no bound) and
    `skip_threshold` as in `AttentionParams`.

    Returns the output `[total_q, heads, value_head_dim]` in query's dtype (`out` if given), and with
    `return_lse` the natural-log LSE, fp32 `[heads, total_q]`. Rows that belong to no sequence are left as
    they were. Raises ValueError for what the kernel does not support, gradients among it.
    """
    # The kernels read memory as it is: numbers without a sign that is still to be turned, and lengths one behind the other.
    query, key, value = query.resolve_neg(), key.resolve_neg(), value.resolve_neg()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    kind = (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        cu_seqlens_q.shape, cu_seqlens_q.dtype, cu_seqlens_q.device,
        cu_seqlens_k.shape, cu_seqlens_k.dtype, cu_seqlens_k.device,
        max_seqlen_q, max_seqlen_k, is_causal, bottom_right, *window, scale, precision, smoothing, return_lse,
        skip_threshold,
        None if out is None else (out.shape, out.stride(), out.dtype),
    )  # fmt: skip
    try:
        call = _varlen_calls.get(kind)
    except TypeError:  # an argument that has no hash is not valid: the checks name it
        call = None
    shape = (*query.shape[:2], value.shape[-1])
    if call is None:
        longest = max_seqlen_q, max_seqlen_k
        _check_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            longest,
            window,
            precision,
            smoothing,
            skip_threshold,
        )
        if out is not None and (out.shape != shape or out.dtype != query.dtype):
            raise ValueError(f"out: {tuple(out.shape)} {out.dtype}, expected {shape} {query.dtype}")
    if problem := gradient_problem(query=query, key=key, value=value):
        raise ValueError(f"attention_varlen: {problem}")
    given = out is not None
    if out is None:
        out = query.new_empty(shape)
    elif problem := output_problem(out, query=query, key=key, value=value):
        raise ValueError(problem)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32) if return_lse else None
    if out.numel() > 0:
        if call is None:
            from .launch import TritonAttention

            params = AttentionParams(
                is_causal, bottom_right, *window, scale, precision, smoothing, skip_threshold
            )
            varlen = cu_seqlens_k.shape[0] - 1, max_seqlen_q, max_seqlen_k
            call = _varlen_calls.keep(
                kind, TritonAttention(query, key, value, None, params, out, lse, varlen=varlen)
            )
        call(query, key, value, None, out, lse, cu_seqlens_q, cu_seqlens_k)
    if given:
        mark_written(out)
    return out if lse is None else (out, lse)


_varlen_calls: Cache[tuple[object, ...], TritonAttention] = Cache(1024)


def _check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    window: tuple[int, int],
    precision: str,
    smoothing: str,
    skip_threshold: float,
) -> None:
    problems = []
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        problems.append("query, key and value must be [total, heads, head_dim]")
    elif (
        key.shape[:2] != value.shape[:2]
        or not key.shape[1]
        or query.shape[1] % key.shape[1]
        or query.shape[2] != key.shape[2]
    ):
        problems.append(f"shapes do not fit: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    else:
        for name, tensor in (("query", query), ("value", value)):
            if tensor.shape[2] not in TritonKernel.head_dims:
                problems.append(reason(f"{name} head_dim", tensor.shape[2], TritonKernel.head_dims))
    if query.dtype not in TritonKernel.dtypes or {key.dtype, value.dtype} != {query.dtype}:
        problems.append(reason("dtype", (query.dtype, key.dtype, value.dtype), TritonKernel.dtypes))
    if cu_seqlens_q.dtype != torch.int32 or cu_seqlens_k.dtype != torch.int32:
        problems.append(reason("cu_seqlens dtype", (cu_seqlens_q.dtype, cu_seqlens_k.dtype), torch.int32))
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.dim() != 1:
        problems.append("cu_seqlens_q and cu_seqlens_k must be [batch + 1]")
    devices = [tensor.device for tensor in (query, key, value, cu_seqlens_q, cu_seqlens_k)]
    if any(device != query.device for device in devices):
        problems.append(reason("devices", devices, "one"))
    if len(window) != 2:
        problems.append(f"window={window} (supported: (left, right))")
    for name, length in zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True):
        if not isinstance(length, Integral) or length < 0:
            problems.append(f"{name}={length!r} (supported: an int from 0)")
    if problem := threshold_problem(skip_threshold):
        problems.append(problem)
    if smoothing not in tuple(SMOOTHINGS):
        problems.append(reason("smoothing", smoothing, SMOOTHINGS))
    if precision not in tuple(MIN_CAPABILITY):
        problems.append(reason("precision", repr(precision), TritonKernel.precisions))
    elif query.device.type == "cuda":
        problems += capability_reasons(capability(query.device.index), MIN_CAPABILITY[precision])
    elif not interpreted():
        problems.append(reason("device", query.device.type, TritonKernel.device_types))
    if problems:
        raise ValueError("attention_varlen: " + "; ".join(problems))
