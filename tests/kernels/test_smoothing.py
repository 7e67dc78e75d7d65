"""Outliers: what is done to Q and K before they are rounded, in the oracle, in Triton, and from Config down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import agreement
import pytest
import torch
from agreement import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import sage_inductor
from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.smoothing import SMOOTHINGS, blocks, rotation
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.testing import RewritingBackend

# (times in K, times in Q, channels), as in trained models: what stands out in K is small in Q.
PLANTED = [(10, 1 / 3, 4), (30, 0.1, 4), (50, 0.1, 1)]
EVENED = [name for name in SMOOTHINGS if name != "mean"]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def planted(in_key: float, in_query: float, channels: int, length: int = 1024) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)  # the same numbers everywhere, but for what is planted
    q, k, v = (torch.randn(1, 2, length, 128, generator=generator).to(DEVICE) for _ in range(3))
    k[..., :channels] *= in_key
    q[..., :channels] *= in_query
    return q, k, v


def error(q: Tensor, k: Tensor, v: Tensor, precision: str, smoothing: str) -> float:
    out, _ = reference.attention(q, k, v, precision=precision, smoothing=smoothing)
    exact, _ = float64_attention(q, k, v)
    return relative_l2(out, exact)


# ------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_the_rotation_is_orthogonal_and_even(head_dim: int) -> None:
    matrix = rotation(head_dim, torch.device("cpu")).double()
    assert (matrix @ matrix.T - torch.eye(head_dim)).abs().max() < 1e-6
    # Every channel spreads over all of its block, alike.
    sizes = {block.size for block in blocks(head_dim)}
    assert sum(block.size for block in blocks(head_dim)) == head_dim and len(blocks(head_dim)) <= 2
    assert min(sizes) >= min(head_dim, 24)
    nonzero = matrix.abs()[matrix != 0]
    assert {round(1 / entry**2, 3) for entry in nonzero.tolist()} == sizes


def test_head_dims_of_other_sizes_are_rotated_too() -> None:
    for head_dim in (1, 2, 7, 33, 100, 300, 1000):
        matrix = rotation(head_dim, torch.device("cpu")).double()
        assert (matrix @ matrix.T - torch.eye(head_dim)).abs().max() < 1e-6


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_stay_what_they_are(smoothing: str, dtype: torch.dtype) -> None:
    # 181/128 * 181/256 is 1 - 2.1e-4; float32 is rounded to TF32, within 2^-12 of each operand.
    bound = 2.2e-4 if dtype != torch.float32 else 2.2e-4 + 2 * 2.0**-12
    for mean in (0, 100):
        q, k, _ = (t.to(dtype) for t in planted(20, 0.2, 5, 256))
        k += mean
        smooth = reference.smoothing_of(k, smoothing, q, None)
        scores = smooth.query(q).double() @ smooth.key(k).double().mT
        exact = q.double() @ (k.double() - smooth.mean.double()).mT
        assert relative_l2(scores, exact) < bound, mean


# -------------------------------------------------------------------------------------------------- outliers


# Measured: 1.101, 1.117 and 1.001 times the error of normal inputs. The scores of what is planted spread wider.
@pytest.mark.parametrize(("precision", "most"), [("accurate", 1.11), ("balanced", 1.125), ("fast", 1.01)])
def test_outliers_cost_next_to_nothing(precision: str, most: float) -> None:
    normal = error(*planted(1, 1, 0), precision, "mean")
    # A rotation rounds other numbers: 0.976 to 1.018 times over three draws.
    assert error(*planted(1, 1, 0), precision, "both") < 1.03 * normal
    for case in PLANTED:
        assert error(*planted(*case), precision, "both") < most * normal, case
        assert error(*planted(*case), precision, "mean") > 2 * normal, case  # else nothing was planted


def test_each_half_helps_by_itself() -> None:
    for case in PLANTED:
        inputs = planted(*case)
        mean, equalise, rotate = (error(*inputs, "accurate", name) for name in ("mean", "equalise", "rotate"))
        assert equalise < 0.35 * mean and rotate < 0.35 * mean


@pytest.mark.parametrize("smoothing", EVENED)
def test_statistics_are_those_of_the_tokens_that_count(smoothing: str) -> None:
    """Padding may hold anything, in Q too where queries and keys are the same tokens."""
    inputs = planted(30, 0.1, 4, 300)
    for used in (slice(0, 200), slice(50, 300)):
        padding = torch.ones(300, 1, dtype=torch.bool, device=DEVICE)
        padding[used] = False
        mask = (~padding.T).expand(1, 2, 300, 300)
        zeros, nans = (
            reference.attention(*(x.masked_fill(padding, content) for x in inputs), mask, smoothing=smoothing)
            for content in (0.0, math.nan)
        )
        for got, expected in zip(nans, zeros, strict=True):
            assert torch.equal(got[:, :, used], expected[:, :, used])
    # The blocks of keys are the same where padding is behind them.
    used = slice(0, 200)
    mask = (torch.arange(300, device=DEVICE) < 200).expand(1, 2, 300, 300)
    got = reference.attention(*inputs, mask, smoothing=smoothing)
    expected = reference.attention(*(x[:, :, used] for x in inputs), smoothing=smoothing)
    assert relative_l2(got[0][:, :, used], expected[0]) < 1e-6
    assert (got[1][:, :, used] - expected[1]).abs().max() < 1e-5


@pytest.mark.parametrize("smoothing", EVENED)
def test_queries_that_are_other_tokens_all_count(smoothing: str) -> None:
    q, k, v = planted(30, 0.1, 4, 300)
    q, mask = q[:, :, :280], torch.arange(300, device=DEVICE) < 200
    padding = ~mask[:, None]
    expected = reference.attention(q, k[:, :, :200], v[:, :, :200], smoothing=smoothing)
    padded = (x.masked_fill(padding, math.nan) for x in (k, v))
    got = reference.attention(q, *padded, mask.expand(1, 2, 280, 300), smoothing=smoothing)
    assert relative_l2(got[0], expected[0]) < 1e-6
    assert (got[1] - expected[1]).abs().max() < 1e-5


@pytest.mark.parametrize("smoothing", EVENED)
def test_channels_without_size_and_numbers_without_bounds(smoothing: str) -> None:
    q, k, v = (torch.randn(1, 2, 200, 64, device=DEVICE) for _ in range(3))
    k[..., 3], q[..., 5], k[..., 7] = 0.0, 0.0, 4.0  # zero in K, zero in Q, constant in K
    assert error(q, k, v, "accurate", smoothing) < 0.02
    assert error(q, k[:, :, :1], v[:, :, :1], "accurate", smoothing) < 0.01  # one key
    assert error(q * 0, k, v, "accurate", smoothing) < 0.01
    for size in (1e-25, 1e15):  # far from 1: squares would leave float32's range
        assert error(q / size, k * size, v, "accurate", smoothing) < 0.02
    k[0, 0, 10, 3], q[0, 1, 20, 0] = math.inf, math.nan
    out, _ = reference.attention(q, k, v, smoothing=smoothing)
    assert out[0, 0].isnan().all() and out[0, 1, 20].isnan().all()
    assert out[0, 1, :20].isfinite().all()


# ---------------------------------------------------------------------------------------------------- Triton

triton_kernel = pytest.mark.skipif(
    bool(kernels.get("triton").unavailable_reasons()), reason="needs triton, on a GPU or in its interpreter"
)


@triton_kernel
@pytest.mark.parametrize(
    ("head_dim", "dtype", "smoothing", "precision"),
    [
        (64, torch.bfloat16, "both", "accurate"),
        (40, torch.float32, "rotate", "fast"),
        (72, torch.float16, "equalise", "balanced"),
        (184, torch.bfloat16, "both", "fast"),
    ],
)
def test_triton_agrees_with_the_oracle(
    head_dim: int, dtype: torch.dtype, smoothing: str, precision: str
) -> None:
    _agree(head_dim, dtype, smoothing, precision)


@triton_kernel
@pytest.mark.slow
@pytest.mark.parametrize("smoothing", EVENED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 24, 56, 80, 96, 112, 128, 136, 192, 256])
def test_triton_agrees_with_the_oracle_everywhere(head_dim: int, dtype: torch.dtype, smoothing: str) -> None:
    for precision in agreement.PRECISIONS:
        _agree(head_dim, dtype, smoothing, precision)


def _agree(head_dim: int, dtype: torch.dtype, smoothing: str, precision: str) -> None:
    q = torch.randn(1, 2, 40, head_dim, device=DEVICE)
    k, v = (torch.randn(1, 1, 140, head_dim, device=DEVICE) for _ in range(2))
    k[..., ::7] *= 20
    q[..., ::7] /= 5
    # float32 has digits for it, TF32 has not.
    k += (300 if dtype == torch.float32 else 3) * torch.randn(head_dim, device=DEVICE)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    kernel, params = kernels.get("triton"), AttentionParams(precision=precision, smoothing=smoothing)
    agreement.check(kernel, q, k, v, params=params)


@triton_kernel
def test_the_output_is_the_same_without_the_lse() -> None:
    q, k, v = (torch.randn(1, 1, 40, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    kernel, params = kernels.get("triton"), AttentionParams(precision="accurate", smoothing="both")
    out, silent = torch.empty_like(q), torch.empty_like(q)
    kernel.run(q, k, v, None, params, out, torch.empty(q.shape[:3], device=DEVICE))
    kernel.run(q, k, v, None, params, silent, None)
    assert torch.equal(out, silent)


@triton_kernel
def test_triton_writes_the_oracles_rotation() -> None:
    from sage_inductor.kernels.triton.launch import TritonAttention

    for head_dim in (24, 56, 72, 184):
        q = torch.randn(1, 1, 5, head_dim, device=DEVICE, dtype=torch.bfloat16)
        params = AttentionParams(smoothing="rotate")
        call = TritonAttention(q, q, q, None, params, torch.empty_like(q), None)
        workspace = call.quantize(q, q, q, None)
        part, width = call.rotation, call.plan.rotation_width
        assert part is not None
        written = workspace[part.offset : part.offset + 2 * part.elements].view(torch.bfloat16)
        tiles = written.view(-1, width, width).float()
        expected = rotation(head_dim, torch.device(DEVICE)).sign()
        first = 0
        for tile in tiles:
            size = min(head_dim - first, width) if len(tiles) == 1 else blocks(head_dim)[first > 0].size
            inside = slice(first, first + size)
            assert torch.equal(tile[:size, :size], expected[inside, inside])
            assert tile[size:].count_nonzero() == 0 == tile[:, size:].count_nonzero()
            first += size
        assert first == head_dim


@triton_kernel
@pytest.mark.parametrize("head_dim", [40, 136, 200, 216])
def test_nothing_is_read_that_was_not_written(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch.empty gives holds numbers that would show, as it does where it was used before."""
    from sage_inductor.kernels.triton import launch

    given: list[Tensor] = []

    def used_before(*size: int, **options: Any) -> Tensor:
        given.append(torch.zeros(*size, **options).fill_(90))
        return given[-1]

    q, k, v = (torch.randn(1, 1, 140, head_dim, device=DEVICE) for _ in range(3))
    monkeypatch.setattr(launch.torch, "empty", used_before)
    got = agreement.run(kernels.get("triton"), q, k, v, None, AttentionParams(precision="accurate"))
    monkeypatch.undo()
    assert any(tensor.dtype == torch.uint8 for tensor in given)
    params = AttentionParams(precision="accurate", smoothing="both")
    assert agreement.disagreements(*got, q, k, v, None, params) == []


@triton_kernel
@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_triton_with_masks_over_keys_and_packed_sequences(kind: str) -> None:
    kernel = kernels.get("triton")
    cases = (agreement.draw_case(seed, kernel) for seed in range(0, 8000, agreement.SEEDS_PER_VARIANT))
    fitting = [
        case
        for case in cases
        if case.variant.smoothing == "both"
        and case.variant.head_dim <= 96
        and case.batch * case.kv_heads * case.groups <= 4
        and (case.variant.varlen if kind == "packed" else _is_over_keys(case))
    ]
    assert fitting
    assert agreement.case_faults(kernel, fitting[0]) == []


def _is_over_keys(case: agreement.Case) -> bool:
    return case.variant.mask != "none" and not any(case.variant.mask_dims[1:])


@triton_kernel
@pytest.mark.parametrize("q_len", [140, 133])
def test_triton_samples_the_queries_of_tokens_that_count(q_len: int) -> None:
    """The first 30 and the last 10 keys are padding, and key 77; so are those queries where there are as many."""
    q, k, v = (torch.randn(2, heads, n, 32, device=DEVICE) for heads, n in ((4, q_len), (2, 140), (2, 140)))
    mask = torch.ones(2, 1, 1, 140, dtype=torch.bool, device=DEVICE)
    mask[1, ..., :30], mask[1, ..., 77], mask[1, ..., 130:] = False, False, False
    if q_len == 140:
        q[1].masked_fill_(~mask[1, 0, 0, :, None], 1e4)
    params = AttentionParams(precision="accurate", smoothing="both")
    agreement.check(kernels.get("triton"), q, k, v, mask, params)


# ------------------------------------------------------------------------------------------------ the way down


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_config_reaches_the_kernel_at_any_length() -> None:
    q, k, v = planted(30, 0.1, 4, 192)
    config = sage_inductor.Config(kernel="reference", precision="accurate", smoothing="both")
    backend, plain = RewritingBackend(config), CompileCounter()
    compiled = torch.compile(Attention(), backend=backend, dynamic=True)
    uncounted = torch.compile(Attention(), backend=plain, dynamic=True)
    for length in (192, 160, 130):
        inputs = [t[:, :, :length].contiguous() for t in (q, k, v)]
        exact, _ = float64_attention(*inputs)
        assert relative_l2(compiled(*inputs), exact) < 0.015
        assert relative_l2(uncounted(*inputs), exact) < 1e-5
    assert len(backend.graphs) == plain.frame_count
    assert "smoothing = 'both'" in backend.graphs[0].print_readable(print_output=False)
    report = sage_inductor.explain(Attention(), q, k, v, config=config)
    assert report.sites[0].smoothing == "both"
    assert "smoothing=both" in str(report.sites[0])


def test_values_that_are_not_valid() -> None:
    q, k, v = planted(1, 1, 0, 64)
    with pytest.raises(ValueError, match=r"smoothing='all' \(valid: auto, mean, equalise, rotate, both\)"):
        sage_inductor.Config(smoothing="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"smoothing='all' \(valid: mean, equalise, rotate, both, auto\)"):
        sage_inductor.sage_attention(q, k, v, smoothing="all")
    with pytest.raises(ValueError, match="smoothing='all'"):
        reference.attention(q, k, v, smoothing="all")
    if not kernels.get("triton").unavailable_reasons():
        from sage_inductor.kernels.triton import attention_varlen

        packed = [t[0].transpose(0, 1) for t in (q, k, v)]
        lengths = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
        with pytest.raises(
            ValueError, match=r"smoothing=all \(supported: mean, equalise, rotate, both, auto\)"
        ):
            attention_varlen(packed[0], packed[1], packed[2], lengths, lengths, 64, 64, smoothing="all")
    with pytest.raises(ValueError, match="smoothing='all'"):
        torch.ops.sage_inductor.attention(q, k, v, smoothing="all")


def test_kernels_that_have_the_mean_alone_say_so() -> None:
    q, k, v = planted(1, 1, 0, 64)
    with pytest.raises(sage_inductor.NotEligibleError, match=r"smoothing=both \(supported: mean, auto\)"):
        sage_inductor.sage_attention(q, k, v, kernel="sageattention", smoothing="both")


def test_the_direct_way() -> None:
    q, k, v = planted(30, 0.1, 4, 256)
    exact, _ = float64_attention(q, k, v)
    out = sage_inductor.sage_attention(q, k, v, kernel="reference", precision="accurate", smoothing="both")
    assert isinstance(out, Tensor) and relative_l2(out, exact) < 0.014


# ------------------------------------------------------------------------------------------------- calibration


class Layers(torch.nn.Module):
    """Two attentions, of which one has channels that stand out."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.outliers = Attention(), Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        standing_out = torch.ones(q.shape[-1])
        standing_out[:4] = 20.0
        even: Tensor = self.even(q, k, v)
        return even + self.outliers(q / standing_out, k * standing_out, v)


def test_calibration_smooths_where_it_has_to(tmp_path: Path) -> None:
    inputs = planted(1, 1, 0, 256)
    model = Layers().eval()
    plan = sage_inductor.calibrate(
        model,
        inputs,
        tolerance=0.045,
        effect="none",
        smoothings=("both", "mean"),
        config=sage_inductor.Config(kernel="reference"),
    )
    assert plan.decisions() == {"even": "fast+mean", "outliers": "fast+both"}
    measured = {site.name: {m.precision: m.rel_l2.worst for m in site.measured} for site in plan.sites}
    for errors in measured.values():
        assert list(errors) == [
            f"{p}+{s}" for p in ("fast", "balanced", "accurate") for s in ("mean", "both")
        ]
    assert measured["outliers"]["accurate+mean"] > 0.1 > 0.02 > measured["outliers"]["accurate+both"]
    assert "fast+both" in str(plan)
    outliers = {site.name: site.key_outlier for site in plan.sites}
    assert outliers["even"] is not None and outliers["even"] < 1.5
    assert outliers["outliers"] is not None and 15 < outliers["outliers"] < 25

    path = tmp_path / "plan.json"
    plan.save(path)
    assert sage_inductor.Plan.load(path) == plan
    backend = RewritingBackend(sage_inductor.Config(kernel="reference", plan=path))
    result = torch.compile(model, backend=backend)(*inputs)
    (graph,) = backend.graphs
    smoothed = [
        node.kwargs.get("smoothing", "auto") for node in graph.graph.nodes if "sage_site" in node.meta
    ]
    assert smoothed == ["mean", "both"]
    exact = model.double()(*(t.double() for t in inputs))
    assert relative_l2(result, exact) < 0.045


def test_smoothings_that_are_not_valid() -> None:
    for given in ((), "both", ("all",)):
        with pytest.raises(ValueError, match="valid: one or more of mean, equalise, rotate, both, auto"):
            sage_inductor.calibrate(Attention(), planted(1, 1, 0, 64), smoothings=given)
