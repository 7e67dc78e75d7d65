"""The kernels of the `sageattention` package, whichever version is installed: 1.0.x (Triton) or 2.2 (CUDA).

SageAttention, arXiv:2410.02367, and SageAttention2, arXiv:2411.10958. Faults of those packages are made good here:

1.0.x  K is smoothed in a copy (the package subtracts the mean from the caller's K). Padded keys of a ragged
       kv_len are taken out of the softmax (`_run_v1`). K, its scales and V are padded, so that nothing is
       read out of bounds. V is scaled per head, so that neither its FP16 form nor the FP16 sum over 64 keys
       overflows or vanishes.
2.x    All work runs on the legacy default stream, ordered against the current one: the package's CUDA kernels
       launch there whatever the current stream is. CUDA graph capture would miss them and is refused. LSE is
       corrected in float32 (the package rounds the correction to the input's dtype). An all-zero channel of V
       gives 0 (FP8 kernels: 0 / 0). A kernel that fails its self-test on this GPU is not used (some 2.2.0 wheels
       leave the output unwritten on Hopper).
both   NaN and inf in Q or K make the whole head's output NaN: the packages' maxima skip NaN and would hide it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.sizes import known, size_hint
from sage_inductor.kernels.base import AttentionParams, AttentionProblem, Kernel, Segments, reason
from sage_inductor.kernels.device import interpreted
from sage_inductor.kernels.installed import package_version
from sage_inductor.torch_internals.dispatch import outside_fake_tensors
from sage_inductor.torch_internals.sdpa import builtin_sdpa

QUERY_BLOCK, KEY_BLOCK = 128, 64  # tile of the 1.0.x kernels: fixed by the scales their quantisation writes
# 64 probabilities of at most 1 are summed with V in FP16: 64 * 512 stays below 65504.
V_LARGEST = 512.0
# Largest share of the softmax that padded keys may keep, a tenth of the INT8 error; see `_padded_share`.
PADDED_SHARE = 2.0**-10
INT32_ELEMENTS = 2**31  # the kernels multiply indices and strides in 32 bits
GRID_LIMIT = 65535  # CUDA's largest grid in y and z, where heads and batch go
SELF_TEST_ERROR = 0.2  # relative L2; FP8 kernels have .04, an unwritten output about 1


@dataclass(frozen=True)
class Limits:
    """What one version of the package can run."""

    versions: str
    precisions: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    returns_lse: bool


V1 = Limits(
    "1.0.6", ("accurate",), (torch.float16, torch.bfloat16, torch.float32), (64, 96, 128), returns_lse=False
)
V2 = Limits("2.2", ("fast", "accurate"), (torch.float16, torch.bfloat16), (64, 96, 128), returns_lse=True)


@dataclass(frozen=True)
class CudaFunction:
    """A function of sageattention 2.x, for one compute capability."""

    name: str
    flag: str  # of sageattention.core: whether the extension was built
    precision: str


V2_FUNCTIONS = {
    (8, 0): CudaFunction("sageattn_qk_int8_pv_fp16_cuda", "SM80_ENABLED", "accurate"),
    (8, 9): CudaFunction("sageattn_qk_int8_pv_fp8_cuda", "SM89_ENABLED", "fast"),
    (9, 0): CudaFunction("sageattn_qk_int8_pv_fp8_cuda_sm90", "SM90_ENABLED", "fast"),
}
NO_CAPTURE = "CUDA graph capture (supported: none; sageattention 2.x launches on the default stream)"
PV_ACCUMULATORS = {"fast": "fp32+fp32", "accurate": "fp32"}  # the most precise that 2.x offers for each


class SageAttentionKernel(Kernel):
    """`sageattention` as the user installed it. Unavailable without the package, and without a GPU that it has kernels for."""

    name = "sageattention"
    precisions = ("fast", "accurate")
    dtypes = V1.dtypes
    device_types = ("cuda",)  # and "cpu" when Triton interprets (TRITON_INTERPRET=1), for 1.0.x
    head_dims = (64, 96, 128)
    oracle_distance = 2.0  # scales per 64 keys and per tile of queries, not the oracle's

    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        version = installed_version()
        if version is None:
            return ["sageattention is not installed (supported: 1.0.6, 2.2)"]
        limits = limits_of(version)
        if limits is None:
            return [reason("sageattention version", version, (V1.versions, V2.versions))]
        if limits is V1 and (device is None or device.type == "cpu") and interpreted():
            return []
        if device is not None and device.type != "cuda":
            return [reason("device", device.type, self.device_types)]
        if not torch.cuda.is_available():
            return ["no CUDA device (supported: compute capability 8.0 and above)"]
        if limits is V2 and torch.cuda.is_current_stream_capturing():
            return [NO_CAPTURE]
        indices = range(torch.cuda.device_count()) if device is None else [_index(device)]
        reasons = [_device_reasons(limits, index) for index in indices]
        return [] if any(not found for found in reasons) else list(dict.fromkeys(sum(reasons, [])))

    def broken_reasons(self, device: torch.device | None = None) -> list[str]:
        """All that `_device_reasons` finds wrong with the installed 2.x on GPUs that it has kernels for."""
        limits = limits_of(installed_version())
        if limits is not V2 or not torch.cuda.is_available() or (device and device.type != "cuda"):
            return []
        indices = range(torch.cuda.device_count()) if device is None else [_index(device)]
        served = [index for index in indices if torch.cuda.get_device_capability(index) in V2_FUNCTIONS]
        return list(dict.fromkeys(sum((_device_reasons(limits, index) for index in served), [])))

    def not_supported_reasons(self, problem: AttentionProblem) -> list[str]:
        limits = limits_of(installed_version())
        query, key, value, params = problem.query, problem.key, problem.value, problem.params
        on_cpu = query.device.type == "cpu" and limits is V1 and interpreted()
        reasons = []
        if query.device.type not in self.device_types and not on_cpu:
            reasons.append(reason("device", query.device.type, self.device_types))
        dtypes = self.dtypes if limits is None else limits.dtypes
        if query.dtype not in dtypes:
            reasons.append(reason("dtype", query.dtype, dtypes))
        precisions = self.precisions if limits is None else _precisions(limits, query.device)
        if params.precision not in precisions:
            reasons.append(reason("precision", params.precision, precisions))
        if params.smoothing not in self.smoothings:
            reasons.append(reason("smoothing", params.smoothing, self.smoothings))
        if size_hint(query.shape[-1]) not in self.head_dims:
            reasons.append(reason("head_dim", query.shape[-1], self.head_dims))
        if known(value.shape[-1]) != known(query.shape[-1]):
            reasons.append(reason("value_head_dim", value.shape[-1], f"head_dim, {query.shape[-1]}"))
        if problem.attn_mask is not None:
            reasons.append(reason("attn_mask", problem.attn_mask.dtype, "none"))
        if problem.return_lse and limits is not None and not limits.returns_lse:
            reasons.append(reason("return_lse", True, False))
        reasons += _band_reasons(params, query.shape[2], key.shape[2])
        reasons += self.segment_reasons(problem) + self.skip_reasons(problem)
        for name, size in (("batch", query.shape[0]), ("heads", query.shape[1])):
            if (size_hint(size) or 0) > GRID_LIMIT:
                reasons.append(reason(name, size, f"up to {GRID_LIMIT}"))
        # The 1.0.x kernel for head_dim 96 puts batch and heads into one grid dimension.
        grid = math.prod(size_hint(size) or 1 for size in query.shape[:2])
        if size_hint(query.shape[-1]) == 96 and grid > GRID_LIMIT:
            reasons.append(reason("batch * heads at head_dim 96", grid, f"up to {GRID_LIMIT}"))
        for name, shape in (("query", query.shape), ("key", key.shape)):
            batch, heads, length, dim = (size_hint(size) or 1 for size in shape)
            elements = batch * heads * (length + QUERY_BLOCK) * dim
            if elements >= INT32_ELEMENTS:
                reasons.append(reason(f"elements of {name}, padded", elements, "below 2**31"))
        return reasons

    def precisions_on(self, device: torch.device) -> tuple[str, ...]:
        limits = limits_of(installed_version())
        return self.precisions if limits is None else _precisions(limits, device)

    def only_by_name_reasons(self) -> list[str]:
        if limits_of(installed_version()) is V2:
            return ["sageattention 2.x launches on the default stream, which CUDA graphs miss: only by name"]
        return []

    def not_chosen_reasons(self, problem: AttentionProblem) -> list[str]:
        if _capability(problem.query.device) == (9, 0):
            # The kernel alone on an H100, head_dim 128, 4096 tokens, torch 2.11; every size from 1k to 32k, causal
            # or not, was slower. With quantisation, on an H200 at 16384 tokens: 380 against 655.
            speeds = "446 against 602 TFLOP/s"
            return [f"sageattention 1.0.6 is slower than SDPA on compute capability 9.0 ({speeds})"]
        capability = _text_capability(problem.query.device)
        return [f"sageattention 1.0.6 was not measured against SDPA on compute capability {capability}"]

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
        is_causal = params.bounds(query.shape[2], key.shape[2])[1] is not None
        scale = query.shape[-1] ** -0.5 if params.scale is None else params.scale
        on_cuda = query.device.type == "cuda"
        with torch.cuda.device(query.device) if on_cuda else contextlib.nullcontext():
            if limits_of(installed_version()) is V2:
                _run_v2(query, key, value, is_causal, scale, out, lse)
            else:
                _run_v1(query, key, value, is_causal, scale, out)


# What is installed and what it runs on.


@cache
def installed_version() -> str | None:
    """The version of the installed package: None where it is not installed, "unknown" where it has no metadata."""
    if importlib.util.find_spec("sageattention") is None:
        return None
    return package_version("sageattention") or "unknown"


def limits_of(version: str | None) -> Limits | None:
    numbers = [int(part) for part in (version or "").split("+")[0].split(".") if part.isdigit()]
    if numbers[:2] == [1, 0] and numbers[2:] >= [6]:
        return V1
    return V2 if numbers[:1] == [2] and numbers[1:] >= [2] else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _text_capability(device: torch.device) -> str:
    capability = _capability(device)
    return "unknown" if capability is None else ".".join(str(number) for number in capability)


def _precisions(limits: Limits, device: torch.device) -> tuple[str, ...]:
    function = V2_FUNCTIONS.get(_capability(device) or (0, 0)) if limits is V2 else None
    return limits.precisions if function is None else (function.precision,)


@cache
def _device_reasons(limits: Limits, index: int) -> list[str]:
    capability = torch.cuda.get_device_capability(index)
    text = ".".join(str(number) for number in capability)
    if limits is V1:
        return [] if capability >= (8, 0) else [reason("compute_capability", text, "8.0 and above")]
    function = V2_FUNCTIONS.get(capability)
    if function is None:
        return [reason("compute_capability", text, [f"{major}.{minor}" for major, minor in V2_FUNCTIONS])]
    try:
        core = importlib.import_module("sageattention.core")
    except Exception as error:  # a CUDA extension built for another torch fails in many ways
        return [f"sageattention {installed_version()} cannot be imported: {error!r}"]
    if not getattr(core, function.flag, False):
        return [
            f"sageattention {installed_version()} was built without kernels for compute capability {text}"
        ]
    return _self_test_reasons(torch.device("cuda", index))


def _self_test_reasons(device: torch.device) -> list[str]:
    """One small problem against SDPA."""
    no_autocast = torch.autocast(device.type, enabled=False)
    with outside_fake_tensors(), torch.no_grad(), no_autocast, torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = torch.randn(
            3, 1, 2, 256, 128, generator=generator, device=device, dtype=torch.float16
        )
        out = torch.empty_like(query)
        _run_v2(query, key, value, False, 128**-0.5, out, None)
        exact = builtin_sdpa(query, key, value)
        error = ((out - exact).float().norm() / exact.float().norm()).item()
    if error < SELF_TEST_ERROR:
        return []
    name = f"self-test error of sageattention {installed_version()}"
    return [reason(name, f"{error:.2f}", f"below {SELF_TEST_ERROR}")]


def _band_reasons(params: AttentionParams, q_len: int, kv_len: int) -> list[str]:
    low, high = params.bounds(q_len, kv_len)
    if low is not None or params.window_right > 0:
        return [reason("window", (params.window_left, params.window_right), "none")]
    if high is not None and known(q_len) != known(kv_len):
        return [reason("q_len", q_len, f"kv_len under a causal mask, {kv_len}")]
    return []


# What both versions need.


def _smoothed(key: Tensor, padded_len: int) -> tuple[Tensor, Tensor]:
    """K minus its mean, padded with zeros to `[batch, kv_heads, padded_len, head_dim]`, and the mean (fp32).

    The mean is exact, not sampled: `_padded_share` rests on it.
    """
    mean = key.mean(2, keepdim=True, dtype=torch.float32)
    kv_len = key.shape[2]
    smoothed = key.new_empty((*key.shape[:2], padded_len, key.shape[3]))
    smoothed[:, :, kv_len:].zero_()
    torch.sub(key, mean, out=smoothed[:, :, :kv_len])
    return smoothed, mean


def _v_scale(value: Tensor) -> Tensor:
    """The power of two that brings a head's largest element of V into (256, 512]; fp32
    `[batch, kv_heads, 1, 1]`."""
    largest = torch.linalg.vector_norm(value, float("inf"), (2, 3), keepdim=True, dtype=torch.float32)
    exponent = torch.log2(largest / V_LARGEST).ceil()
    return torch.exp2(exponent.clamp(min=-100.0))  # V may be zero


def _not_finite(query: Tensor, key_mean: Tensor) -> Tensor:
    """0 for each head, or NaN where its Q or K hold NaN or inf; fp32 `[batch, heads, 1, 1]`."""
    groups = query.shape[1] // key_mean.shape[1]
    of_query = query.sum((2, 3), keepdim=True, dtype=torch.float32) * 0.0
    return of_query + (key_mean.sum(3, keepdim=True) * 0.0).repeat_interleave(groups, 1)


def _is_addressable(tensor: Tensor) -> bool:
    """Whether the last dim has stride 1, and all offsets fit in 32 bits."""
    largest = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.stride(-1) == 1 and largest < INT32_ELEMENTS


def _readable(tensor: Tensor, alignment: int = 1) -> Tensor:
    """`tensor`, or a contiguous copy where the kernels cannot address it, or where its rows do not start at
    multiples of `alignment` elements."""
    fits = _is_addressable(tensor)
    if alignment > 1:
        fits = fits and all(stride % alignment == 0 for stride in tensor.stride()[:-1])
        fits = fits and tensor.data_ptr() % (alignment * tensor.element_size()) == 0
    return tensor if fits else tensor.contiguous()


# 1.0.x


def _run_v1(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, out: Tensor) -> None:
    batch, heads, _, head_dim = query.shape
    kv_len = key.shape[2]
    # Causal tiles are 128 queries wide and read as many keys, up to the end of the last tile.
    padded_len = _round_up(kv_len, QUERY_BLOCK if is_causal else KEY_BLOCK)
    key, key_mean = _smoothed(key, padded_len)
    v_scale = _v_scale(value)
    v = value.new_empty((*value.shape[:2], padded_len, head_dim), dtype=torch.float16)
    v[:, :, kv_len:].zero_()
    torch.div(value, v_scale, out=v[:, :, :kv_len])

    query = _readable(query)
    q_int8, q_scale, k_int8, k_scale = _quantize_v1(query, key, scale)
    target = out if _is_addressable(out) else torch.empty_like(q_int8, dtype=out.dtype)
    _attend_v1(q_int8, k_int8, v, q_scale, k_scale, target, is_causal)

    factor = v_scale.repeat_interleave(heads // key.shape[1], 1) + _not_finite(query, key_mean)
    if not is_causal and _padded_share(kv_len, padded_len) > PADDED_SHARE:
        # The share of the real keys is the attention to a V of ones, with zeros for the padded keys.
        ones = v.new_zeros(padded_len, head_dim)
        ones[:kv_len] = 1.0
        share = torch.empty_like(q_int8, dtype=torch.float16)
        _attend_v1(q_int8, k_int8, ones.expand(batch, heads, -1, -1), q_scale, k_scale, share, is_causal)
        factor = factor / share[..., :1]
    torch.mul(target, factor, out=target)
    if target is not out:
        out.copy_(target)


def _padded_share(kv_len: int, padded_len: int) -> float:
    """The largest share of the softmax that padded keys may take.

    The kernel gives padded keys score 0 instead of leaving them out, so the sum of their exponentials is their number. The
    scores of the real keys have mean 0, because K has. The sum of their exponentials is at least kv_len, because the
    arithmetic mean is no less than the geometric one. The bound is reached when all scores are equal.
    """
    return (padded_len - kv_len) / padded_len


def _quantize_v1(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """INT8 Q per 128 queries and K per 64 keys, contiguous, and their scales."""
    if query.shape[-1] == 96:
        quantize = _load("quant_per_block_hd96").per_block_int8_hd96
    else:
        quantize = _load("quant_per_block").per_block_int8
    quantized: tuple[Tensor, Tensor, Tensor, Tensor] = quantize(
        query, key, sm_scale=scale, tensor_layout="HND"
    )
    return quantized


def _attend_v1(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, out: Tensor, is_causal: bool
) -> None:
    """The package's kernel, launched as its own `forward` does but into `out` and with any kv_len."""
    batch, heads, q_len, head_dim = q.shape
    suffix = "_causal" if is_causal else ""
    kernel = _load(f"attn_qk_int8_per_block{'_h96' if head_dim == 96 else ''}{suffix}")._attn_fwd
    q_blocks = -(-q_len // QUERY_BLOCK)
    grid = (q_blocks, batch * heads, 1) if head_dim == 96 else (q_blocks, heads, batch)
    lengths = {"qo_len": q_len, "kv_len": k.shape[2], "H": heads, "num_kv_groups": heads // k.shape[1]}
    strides = [stride for tensor in (q, k, v, out) for stride in tensor.stride()[:3]]
    names = [f"stride_{tensor}{dim}" for tensor in "qkvo" for dim in "zhn"]
    kernel[grid](
        q, k, v, q_scale, k_scale, out,
        **dict(zip(names, strides, strict=True)),
        **lengths,
        HEAD_DIM=head_dim,
        BLOCK_M=QUERY_BLOCK,
        BLOCK_N=KEY_BLOCK,
        STAGE=3 if is_causal else 1,
        num_warps=4 if head_dim == 64 else 8,
        num_stages=3 if head_dim == 64 and not is_causal else 4,
    )  # fmt: skip


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _load(module: str) -> Any:
    return importlib.import_module(f"sageattention.{module}")


# 2.x


def _run_v2(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, out: Tensor, lse: Tensor | None
) -> None:
    capability = _capability(query.device)
    function = V2_FUNCTIONS[capability or (9, 0)]
    groups = query.shape[1] // key.shape[1]
    with legacy_stream(query.device):
        query = _readable(query, alignment=8)  # CUDA kernels load 16 bytes at a time
        key, key_mean = _smoothed(key, key.shape[2])
        factor = _not_finite(query, key_mean)
        if function.precision == "accurate":  # V goes through FP16
            v_scale = _v_scale(value)
            value = (value / v_scale).to(value.dtype)
            empty_channel = None
            factor = factor + v_scale.repeat_interleave(groups, 1)
        else:
            largest = torch.linalg.vector_norm(value, float("inf"), 2, keepdim=True, dtype=torch.float32)
            empty_channel = (largest == 0).repeat_interleave(groups, 1)
            factor = factor + 1.0
        result = getattr(importlib.import_module("sageattention.core"), function.name)(
            query,
            key,
            _readable(value, alignment=8),
            tensor_layout="HND",
            is_causal=is_causal,
            sm_scale=scale,
            pv_accum_dtype=PV_ACCUMULATORS[function.precision],
            smooth_k=False,  # done above
            return_lse=lse is not None,
        )
        output, smoothed_lse = result if lse is not None else (result, None)
        output = output * factor
        if empty_channel is not None:
            output = torch.where(empty_channel, factor * 0.0, output)
        out.copy_(output)
        if lse is not None and smoothed_lse is not None:
            mean = key_mean.repeat_interleave(groups, 1)
            torch.add(smoothed_lse, (query.float() @ mean.mT)[..., 0], alpha=scale, out=lse)


@contextlib.contextmanager
def legacy_stream(device: torch.device) -> Iterator[None]:
    """Run the body on the default stream of `device`: after the work that the current stream has, before its later work.

    sageattention 2.x launches its CUDA kernels without naming a stream, and its Triton kernels on the current one. Tensors
    made in the body belong to the default stream: none may leave the body. Raises NotEligibleError while a CUDA graph is
    captured.
    """
    if device.type != "cuda":
        yield
        return
    if torch.cuda.is_current_stream_capturing():
        raise NotEligibleError("kernel=sageattention", [NO_CAPTURE])
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current == default:
        yield
        return
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
