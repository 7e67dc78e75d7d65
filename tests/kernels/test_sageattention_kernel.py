"""The `sageattention` kernel family: 1.0.x through its real kernels (on a GPU, or in Triton's CPU
interpreter), 2.x through a stand-in for its CUDA functions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec, sageattention
from sage_inductor.kernels.sageattention import SageAttentionKernel

KERNEL = SageAttentionKernel()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V1_REASONS = (
    KERNEL.unavailable_reasons(DEVICE)
    if sageattention.limits_of(sageattention.installed_version()) is sageattention.V1
    else ["not 1.0.x"]
)
needs_v1 = pytest.mark.skipif(bool(V1_REASONS), reason="; ".join(V1_REASONS))
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from Triton's interpreter


def inputs(
    q_len: int,
    kv_len: int,
    head_dim: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v in NHD memory; K has a channel bias, as real ones do."""
    generator = torch.Generator().manual_seed(seed)

    def make(length: int, count: int) -> Tensor:
        return (
            torch.randn(batch, length, count, head_dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        )

    query, key, value = make(q_len, heads), make(kv_len, kv_heads), make(kv_len, kv_heads)
    key += 4 * torch.randn(head_dim, generator=generator).to(DEVICE, dtype)
    return query, key, value


def run(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    out = torch.full_like(query, math.nan)
    KERNEL.run(
        query,
        key,
        value,
        None,
        AttentionParams(is_causal=is_causal, scale=scale, precision="accurate"),
        out,
        None,
    )
    return out


def exact(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    doubles = (tensor.double() for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*doubles, is_causal=is_causal, scale=scale, enable_gqa=True)


def int8_scores_only(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Float64 attention with Q in INT8 per 128 queries and smoothed K in INT8 per 64 keys: the algorithm's
    error without that of FP16 arithmetic."""

    def rounded(x: Tensor, block: int) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
        step = padded.abs().amax((3, 4), keepdim=True) / 127
        return ((padded / torch.where(step > 0, step, 1.0)).round() * step).flatten(2, 3)[:, :, : x.shape[2]]

    key = key.double()
    return exact(
        rounded(query.double(), 128), rounded(key - key.mean(2, keepdim=True), 64), value, is_causal, scale
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def largest(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def check(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> None:
    """Against float64 no worse than INT8 scores are by themselves, and close to the algorithm in float64: P
    in FP16, sums of 64 products in FP16 (2^-11 each, random) and the output's own rounding."""
    actual = run(query, key, value, is_causal, scale)
    truth = exact(query, key, value, is_causal, scale)
    algorithm = int8_scores_only(query, key, value, is_causal, scale)
    arithmetic = 2**-10 + torch.finfo(query.dtype).eps / 2
    assert relative(actual, truth) <= 1.1 * relative(algorithm, truth) + arithmetic
    assert largest(actual, truth) <= 1.25 * largest(algorithm, truth) + 2 * arithmetic
    # The package scales in another order than the oracle: values on the edge between two integers may fall
    # either way.
    assert relative(actual, algorithm) <= 0.25 * relative(algorithm, truth) + 2 * arithmetic


@needs_v1
@quiet
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.float16),
        (64, torch.bfloat16),
        (64, torch.float32),
        (96, torch.bfloat16),
        (128, torch.float16),
    ],
)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "is_causal"), [(130, 192, False), (64, 77, False), (200, 200, True)]
)
def test_error_is_that_of_int8_scores(
    head_dim: int, dtype: torch.dtype, q_len: int, kv_len: int, is_causal: bool
) -> None:
    check(*inputs(q_len, kv_len, head_dim, heads=4, kv_heads=2, dtype=dtype), is_causal)


@needs_v1
@quiet
@pytest.mark.parametrize("scale", [0.02, 0.5, -0.1])
def test_scale(scale: float) -> None:
    check(*inputs(64, 100), scale=scale)


@needs_v1
@quiet
@pytest.mark.parametrize("kv_len", [1, 12, 65, 77, 200, 1000, 4095])
def test_padded_keys_take_no_part(kv_len: int) -> None:
    check(*inputs(40, kv_len, heads=1))


@needs_v1
@quiet
@pytest.mark.parametrize("kv_len", [1, 65, 127, 4095])
def test_padded_keys_when_all_scores_are_equal(kv_len: int) -> None:
    """Their share is the largest possible then. 4095 keys are below the bound where it is left in."""
    query, key, value = inputs(32, kv_len, heads=1)
    out = run(torch.zeros_like(query), key, torch.ones_like(value))
    assert (out - 1).abs().max() <= sageattention.PADDED_SHARE + 2**-10


@needs_v1
@quiet
def test_the_package_itself_gets_ragged_lengths_wrong() -> None:
    """If this fails, the package was mended and the second pass over ragged keys can go."""
    quantize = sageattention._load("quant_per_block").per_block_int8
    attend = sageattention._load("attn_qk_int8_per_block").forward
    query, key, value = inputs(64, 77, heads=1)
    smoothed = key - key.mean(2, keepdim=True)
    q, q_scale, k, k_scale = quantize(query, smoothed)
    naive = attend(q, k, value, q_scale, k_scale)
    truth = exact(query, key, value)
    assert relative(naive, truth) > 10 * relative(run(query, key, value), truth)


@needs_v1
@quiet
def test_inputs_are_not_written() -> None:
    qkv = torch.randn(1, 100, 3, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    before = qkv.clone()
    check(query, key, value)
    assert torch.equal(qkv, before)


@needs_v1
@quiet
@pytest.mark.parametrize("length", [40, 129])  # an odd number of 64-key blocks
def test_causal_reads_no_scale_of_another_head(length: int) -> None:
    query, key, value = inputs(length, length, heads=2, kv_heads=2)
    key[:, 1] = math.inf
    out = run(query, key, value, is_causal=True)
    assert relative(out[:, :1], exact(query[:, :1], key[:, :1], value[:, :1], is_causal=True)) < 0.02
    assert out[:, 1].isnan().all()


@needs_v1
@quiet
@pytest.mark.parametrize("length", [1, 64, 129])
def test_causal_scales_cover_all_tiles(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = sageattention._attend_v1
    scales = []

    def recording(*args: Any) -> None:
        scales.append((args[4].shape[2], args[1].shape[2], args[2].shape[2]))
        attend(*args)

    monkeypatch.setattr(sageattention, "_attend_v1", recording)
    check(*inputs(length, length, heads=1), is_causal=True)
    keys_read = -(-length // 128) * 128
    assert scales == [(keys_read // 64, keys_read, keys_read)]


@needs_v1
@quiet
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.bfloat16, 1e6),
        (torch.float32, 1e30),
        (torch.float16, 3e4),
        (torch.bfloat16, 1e-9),
        (torch.float16, 1e-3),
    ],
)
@pytest.mark.parametrize("kv_len", [64, 100])
def test_v_of_any_magnitude(dtype: torch.dtype, magnitude: float, kv_len: int) -> None:
    """V alone above 65504 becomes inf in FP16, 64 values above 1023 may when summed, small ones vanish."""
    query, key, value = inputs(16, kv_len, heads=1, dtype=dtype)
    value = (value.sigmoid() * magnitude).to(dtype)
    query = query * 0.1  # nearly uniform weights: the largest sums
    check(query, key, value)


@needs_v1
@quiet
def test_each_head_has_its_own_v_scale() -> None:
    query, key, value = inputs(16, 64, heads=4, kv_heads=2, dtype=torch.bfloat16)
    value = value * torch.tensor([1e-6, 1e6], device=DEVICE, dtype=value.dtype)[:, None, None]
    for head in range(2):
        check(query[:, 2 * head : 2 * head + 2], key[:, head : head + 1], value[:, head : head + 1])
    out, truth = run(query, key, value), exact(query, key, value)
    for head in range(4):
        assert relative(out[:, head], truth[:, head]) < 0.02


@needs_v1
@quiet
@pytest.mark.parametrize("kv_len", [128, 100])
def test_zero_blocks(kv_len: int) -> None:
    query, key, value = inputs(130, kv_len, heads=1)
    for changed in (
        (query * 0, key, value),
        (query, key * 0, value),
        (query, key[:, :, :1].expand_as(key), value),
    ):
        check(*changed)
    query[:, :, 128:] = 0
    check(query, key, value)
    assert torch.equal(run(query, key, value * 0), query * 0)


@needs_v1
@quiet
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_not_finite_in_not_finite_out(bad: float, position: int) -> None:
    tensors = inputs(70, 100, heads=2, kv_heads=2)
    tensors[position][0, 1, 5, 3] = bad
    out = run(*tensors)
    assert out[:, 0].isfinite().all()
    seen = out[:, 1, :, 3] if position == 2 else out[:, 1]
    assert not seen.isfinite().any()


@needs_v1
@quiet
@pytest.mark.parametrize("head_dim", [64, 96])
def test_query_head_uses_its_group(head_dim: int) -> None:
    query, key, value = inputs(8, 64, head_dim, heads=6, kv_heads=3, batch=2)
    value = torch.arange(6.0, device=DEVICE, dtype=value.dtype).view(2, 3, 1, 1).expand_as(value)
    expected = torch.arange(6.0, device=DEVICE).repeat_interleave(2).view(2, 6, 1, 1).expand(query.shape)
    torch.testing.assert_close(run(query, key, value).float(), expected, atol=0.01, rtol=0)


@needs_v1
@quiet
@pytest.mark.parametrize("kv_len", [64, 100])
def test_any_output_and_input_layout(kv_len: int) -> None:
    query, key, value = inputs(30, kv_len, heads=2, kv_heads=2)
    expected = run(query, key, value)
    params = AttentionParams(precision="accurate")
    buffer = torch.full((1, 30, 2, 80), 7.0, device=DEVICE, dtype=query.dtype)
    out = buffer[..., :64].transpose(1, 2)
    KERNEL.run(query, key, value, None, params, out, None)
    assert torch.equal(out, expected) and (buffer[..., 64:] == 7).all()
    column_major = torch.empty_like(query).mT.contiguous().mT
    turned = [tensor.mT.contiguous().mT for tensor in (query, key, value)]
    KERNEL.run(*turned, None, params, column_major, None)
    assert torch.equal(column_major, expected)


@needs_v1
@quiet
def test_offsets_beyond_32_bits_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(30, 64, heads=2, kv_heads=2)
    expected = run(query, key, value)
    monkeypatch.setattr(sageattention, "INT32_ELEMENTS", 30 * 64)
    quantized = []
    quantize = sageattention._quantize_v1
    monkeypatch.setattr(
        sageattention,
        "_quantize_v1",
        lambda query, *rest: (quantized.append(query), quantize(query, *rest))[1],
    )
    assert torch.equal(run(query, key, value), expected)
    assert quantized[0].is_contiguous() and not query.is_contiguous()


# What it refuses.

CAUSAL_REASON = "q_len=512 (supported: kv_len under a causal mask, 640)"


def problem(
    q: tuple[int, ...] = (1, 8, 512, 64),
    kv: tuple[int, ...] | None = None,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mask: torch.dtype | None = None,
    device: str = "cuda",
    return_lse: bool = False,
    **params: Any,
) -> AttentionProblem:
    def spec(shape: tuple[int, ...], spec_dtype: torch.dtype = dtype) -> TensorSpec:
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return TensorSpec(shape, tuple(strides), spec_dtype, torch.device(device))

    kv = q if kv is None else kv
    value = (*kv[:3], kv[3] if v_dim is None else v_dim)
    attn_mask = None if mask is None else spec((1, 1, q[2], kv[2]), mask)
    return AttentionProblem(
        spec(q),
        spec(kv),
        spec(value),
        attn_mask,
        AttentionParams(**{"precision": "accurate", **params}),
        return_lse,
    )


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]) -> Any:
    def pretend(
        text: str | None, capability: tuple[int, int] | None = None, interpreted: bool = False
    ) -> None:
        monkeypatch.setattr(sageattention, "installed_version", lambda: text)
        monkeypatch.setattr(sageattention, "interpreted", lambda: interpreted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        new_process()  # what a device can run is found out once

    return pretend


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"is_causal": True}, []),
        ({"is_causal": True, "bottom_right": True}, []),
        ({"window_right": 0}, []),
        ({"q": (1, 8, 511, 64), "kv": (1, 2, 1000, 64)}, []),
        ({"dtype": torch.float64}, ["dtype=float64 (supported: float16, bfloat16, float32)"]),
        ({"q": (1, 8, 512, 80)}, ["head_dim=80 (supported: 64, 96, 128)"]),
        ({"v_dim": 128}, ["value_head_dim=128 (supported: head_dim, 64)"]),
        ({"precision": "fast"}, ["precision=fast (supported: accurate)"]),
        ({"mask": torch.bool}, ["attn_mask=bool (supported: none)"]),
        ({"return_lse": True}, ["return_lse=True (supported: False)"]),
        ({"device": "cpu"}, ["device=cpu (supported: cuda)"]),
        ({"is_causal": True, "kv": (1, 8, 640, 64)}, [CAUSAL_REASON]),
        ({"is_causal": True, "bottom_right": True, "kv": (1, 8, 640, 64)}, [CAUSAL_REASON]),
        ({"window_left": 128, "window_right": 0}, ["window=128, 0 (supported: none)"]),
        ({"window_right": 5}, ["window=-1, 5 (supported: none)"]),
        ({"q": (70000, 1, 1, 64), "kv": (70000, 1, 1, 64)}, ["batch=70000 (supported: up to 65535)"]),
        ({"q": (300, 300, 1, 96)}, ["batch * heads at head_dim 96=90000 (supported: up to 65535)"]),
        (
            {"q": (1, 56, 300000, 128), "kv": (1, 56, 64, 128)},
            [f"elements of query, padded={56 * 300128 * 128} (supported: below 2**31)"],
        ),
        (
            {"q": (1, 8, 512, 80), "mask": torch.bfloat16, "precision": "balanced"},
            [
                "precision=balanced (supported: accurate)",
                "head_dim=80 (supported: 64, 96, 128)",
                "attn_mask=bfloat16 (supported: none)",
            ],
        ),
    ],
)  # fmt: skip
def test_reasons(changes: dict[str, Any], expected: list[str], version: Any) -> None:
    version("1.0.6", (8, 0))
    assert KERNEL.not_supported_reasons(problem(**changes)) == expected


def test_reasons_of_version_2(version: Any) -> None:
    version("2.2.0", (9, 0))
    assert KERNEL.not_supported_reasons(problem(precision="fast", return_lse=True)) == []
    assert KERNEL.not_supported_reasons(problem(precision="accurate")) == [
        "precision=accurate (supported: fast)"
    ]
    reasons = KERNEL.not_supported_reasons(problem(precision="fast", dtype=torch.float32))
    assert reasons == ["dtype=float32 (supported: float16, bfloat16)"]
    version("2.2.0", (8, 0))
    assert KERNEL.not_supported_reasons(problem(precision="accurate")) == []


@pytest.mark.parametrize(
    ("text", "capability", "interpreted", "device", "expected"),
    [
        (None, (9, 0), False, None, "sageattention is not installed"),
        ("1.0.5", (9, 0), False, None, "sageattention version=1.0.5 (supported: 1.0.6, 2.2)"),
        ("2.0.1", (9, 0), False, None, "sageattention version=2.0.1 (supported: 1.0.6, 2.2)"),
        ("3.0", (9, 0), False, None, "sageattention version=3.0 (supported: 1.0.6, 2.2)"),
        ("unknown", (9, 0), False, None, "sageattention version=unknown (supported: 1.0.6, 2.2)"),
        ("1.0.6", None, False, None, "no CUDA device (supported: compute capability 8.0 and above)"),
        ("1.0.6", (7, 5), False, "cuda", "compute_capability=7.5 (supported: 8.0 and above)"),
        ("1.0.6", (9, 0), False, "cpu", "device=cpu (supported: cuda)"),
        ("1.0.6", None, True, "cpu", ""),
        ("1.0.6", (8, 6), False, "cuda:0", ""),
        ("2.2.0", None, True, "cpu", "device=cpu (supported: cuda)"),
        ("2.2.0+cu130", (10, 0), False, "cuda", "compute_capability=10.0 (supported: 8.0, 8.9, 9.0)"),
    ],
)
def test_availability(
    text: str | None, capability: Any, interpreted: bool, device: str | None, expected: str, version: Any
) -> None:
    version(text, capability, interpreted)
    reasons = KERNEL.unavailable_reasons(None if device is None else torch.device(device))
    assert "; ".join(reasons).startswith(expected) and bool(reasons) == bool(expected)


def test_auto_does_not_choose_it(version: Any) -> None:
    version("1.0.6", (9, 0))
    assert "slower than SDPA" in KERNEL.not_chosen_reasons(problem())[0]
    assert KERNEL.only_by_name_reasons() == []
    version("1.0.6", (8, 9))
    assert "not measured against SDPA on compute capability 8.9" in KERNEL.not_chosen_reasons(problem())[0]
    version("2.2.0", (9, 0))
    assert KERNEL.only_by_name_reasons() and "default stream" in KERNEL.only_by_name_reasons()[0]


def test_importing_loads_no_package() -> None:
    code = (
        "import sys, sage_inductor; loaded = set(sys.modules);"
        "import sage_inductor.kernels.sageattention as s; s.SageAttentionKernel();"
        "assert not {'sageattention', 'triton'} & (set(sys.modules) - loaded)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# 2.x: no build of it here, so a stand-in that computes what the real functions promise.


class Stand:
    """Stands in for `sageattention.core`."""

    SM80_ENABLED = SM89_ENABLED = SM90_ENABLED = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = []
        self.wrong = False
        for function in sageattention.V2_FUNCTIONS.values():
            setattr(self, function.name, self._function(function.name))

    def _function(self, name: str) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            self.calls.append((name, (q, k, v), dict(options)))
            assert q.dtype == k.dtype == v.dtype and all(tensor.stride(-1) == 1 for tensor in (q, k, v))
            out = exact(q, k, v, options["is_causal"], options["sm_scale"])
            if "fp8" in name:  # the scale of an empty channel is 0
                groups = q.shape[1] // k.shape[1]
                out = out.masked_fill((v == 0).all(2, keepdim=True).repeat_interleave(groups, 1), math.nan)
            out = torch.zeros_like(out) if self.wrong else out
            if not options["return_lse"]:
                return out.to(q.dtype)
            keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
            return out.to(q.dtype), (q.double() @ keys.mT * options["sm_scale"]).logsumexp(-1).float()

        return attend


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setitem(sys.modules, "sageattention", types.ModuleType("sageattention"))
    monkeypatch.setitem(sys.modules, "sageattention.core", stand)  # type: ignore[arg-type]
    return stand


@pytest.mark.parametrize("capability", sageattention.V2_FUNCTIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_v2_call(
    capability: tuple[int, int], is_causal: bool, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sageattention, "_capability", lambda device: capability)
    query, key, value = inputs(50, 50, heads=4, kv_heads=2, dtype=torch.bfloat16)
    value[..., 7] = 0
    key_before = key.clone()
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device=DEVICE)
    with torch.cuda.device(DEVICE) if DEVICE.type == "cuda" else contextlib.nullcontext():
        sageattention._run_v2(query, key, value, is_causal, 0.2, out, None if is_causal else lse)
    name, (_, passed_key, _), options = stand.calls[0]
    assert name == sageattention.V2_FUNCTIONS[capability].name
    expected_options = {"tensor_layout": "HND", "is_causal": is_causal, "sm_scale": 0.2, "smooth_k": False}
    assert expected_options.items() <= options.items() and options["return_lse"] is not is_causal
    assert torch.equal(key, key_before)
    assert passed_key.double().mean(2).abs().max() < 0.02
    # K is rounded to bfloat16 after smoothing and so is the output
    assert relative(out, exact(query, key, value, is_causal, 0.2)) < 4 * torch.finfo(torch.bfloat16).eps
    assert (out[..., 7] == 0).all()
    if not is_causal:
        keys = key.double().repeat_interleave(2, 1)
        true_lse = (query.double() @ keys.mT * 0.2).logsumexp(-1)
        assert (lse - true_lse).abs().max() < 0.02  # in bfloat16 the correction alone would be off by .1


def test_v2_scales_v_that_passes_through_fp16(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sageattention, "_capability", lambda device: (8, 0))
    query, key, value = inputs(16, 64, dtype=torch.bfloat16)
    out = torch.empty_like(query)
    sageattention._run_v2(query, key, value * 1e6, False, 0.125, out, None)
    assert stand.calls[0][1][2].abs().max() <= 512
    assert relative(out, exact(query, key, value * 1e6)) < 0.02


def test_v2_not_finite_in_not_finite_out(stand: Stand) -> None:
    query, key, value = inputs(16, 64, heads=2, kv_heads=2)
    query[0, 1, 3, 3] = math.nan
    out = torch.empty_like(query)
    sageattention._run_v2(query, key, value, False, 0.125, out, None)
    assert out[:, 0].isfinite().all() and out[:, 1].isnan().all()


def test_v2_aligns_rows(stand: Stand) -> None:
    query, key, value = inputs(16, 64)
    shifted = torch.empty(1, 2, 16, 68, device=DEVICE, dtype=query.dtype)[..., 3:67].copy_(query)
    sageattention._run_v2(shifted, key, value, False, 0.125, torch.empty_like(query), None)
    passed = stand.calls[0][1][0]
    assert passed.data_ptr() % 16 == 0 and passed.stride(2) % 8 == 0 and torch.equal(passed, query)


def test_v2_refuses_a_build_that_computes_wrong(
    stand: Stand, version: Any, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    version("2.2.0", (9, 0))
    reasons = sageattention._self_test_reasons
    monkeypatch.setattr(sageattention, "_self_test_reasons", lambda device: reasons(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert KERNEL.unavailable_reasons(torch.device("cuda")) == []
    assert KERNEL.broken_reasons(torch.device("cuda")) == []
    new_process()
    stand.wrong = True
    (reason,) = KERNEL.unavailable_reasons(torch.device("cuda"))
    assert reason == "self-test error of sageattention 2.2.0=1.00 (supported: below 0.2)"
    assert KERNEL.broken_reasons(torch.device("cuda")) == [reason]
    new_process()
    stand.SM90_ENABLED = False
    (reason,) = KERNEL.unavailable_reasons(torch.device("cuda"))
    assert "built without kernels for compute capability 9.0" in reason
    assert KERNEL.broken_reasons(torch.device("cuda")) == [reason]
    # A GPU that no version serves is no fault of the build.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert KERNEL.broken_reasons(torch.device("cuda")) == []


def test_v2_runs_on_the_default_stream_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @dataclasses.dataclass
    class Stream:
        name: str

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream: Stream) -> Any:
        log.append(f"enter {stream.name}")
        yield
        log.append("leave")

    current = Stream("side")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    with sageattention.legacy_stream(torch.device("cuda")):
        log.append("body")
    assert log == ["default waits for side", "enter default", "body", "leave", "side waits for default"]
    log.clear()
    current = Stream("default")
    with sageattention.legacy_stream(torch.device("cuda")):
        log.append("body")
    assert log == ["body"]


def test_v2_refuses_graph_capture(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version("2.2.0", (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with (
        pytest.raises(NotEligibleError, match="CUDA graph capture"),
        sageattention.legacy_stream(torch.device("cuda")),
    ):
        pass
    assert KERNEL.unavailable_reasons(torch.device("cuda")) == [sageattention.NO_CAPTURE]


@pytest.mark.gpu
@needs_v1
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("kv_len", [4096, 4000])
def test_graph_capture(kv_len: int) -> None:
    query, key, value = inputs(1024, kv_len, 128, heads=8, kv_heads=2, dtype=torch.bfloat16)
    expected = run(query, key, value)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(query)
    with torch.cuda.graph(graph):
        KERNEL.run(query, key, value, None, AttentionParams(precision="accurate"), out, None)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
