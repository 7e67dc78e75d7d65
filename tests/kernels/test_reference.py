"""The oracle against float64 attention. Bounds are those the README documents; normal inputs stay within
them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.measurement.ground_truth import DOCUMENTED as BOUNDS
from sage_inductor.testing import max_error, relative_l2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and LSE in float64, written out; fully masked rows give 0 and -inf."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v, scores.logsumexp(-1)


def band(q_len: int, kv_len: int, low: int | None, high: int | None) -> Tensor:
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    allowed = torch.ones(q_len, kv_len, dtype=torch.bool)
    if low is not None:
        allowed &= distance >= low
    if high is not None:
        allowed &= distance <= high
    return allowed


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_normal_inputs_stay_within_the_documented_bound(
    precision: str, head_dim: int, is_causal: bool
) -> None:
    q, k, v = (normal(1, 2, 1024, head_dim) for _ in range(3))
    bounds = (None, 0 if is_causal else None)
    out, lse = reference.attention(q, k, v, bounds=bounds, precision=precision)
    expected, expected_lse = exact(q, k, v, band(1024, 1024, *bounds))
    assert relative_l2(out, expected) <= BOUNDS[precision]
    # Scores carry the INT8 error alone: 1/254 of the largest value, summed at random over head_dim products.
    assert (lse - expected_lse).abs().max() < 0.05
    # The metric sees a fault: the same output computed without the mask is far outside.
    if is_causal:
        unmasked, _ = reference.attention(q, k, v, precision=precision)
        assert relative_l2(unmasked, expected) > 3 * BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("kv_len", [1, 2, 12, 65, 127, 129, 200, 257])
def test_ragged_lengths(precision: str, kv_len: int) -> None:
    q, k, v = normal(1, 2, 33, 64), normal(1, 2, kv_len, 64), normal(1, 2, kv_len, 64)
    out, lse = reference.attention(q, k, v, precision=precision)
    expected, expected_lse = exact(q, k, v)
    assert relative_l2(out, expected) <= BOUNDS[precision]
    assert (lse - expected_lse).abs().max() < 0.05


@pytest.mark.parametrize(
    ("q_len", "kv_len", "params"),
    [
        (40, 40, AttentionParams(is_causal=True)),
        (20, 50, AttentionParams(is_causal=True)),
        (20, 50, AttentionParams(is_causal=True, bottom_right=True)),
        (50, 20, AttentionParams(is_causal=True, bottom_right=True)),
        (150, 150, AttentionParams(is_causal=True, window_left=16)),
        (60, 60, AttentionParams(window_left=5, window_right=7)),
        (30, 90, AttentionParams(bottom_right=True, window_left=10, window_right=3)),
    ],
)
def test_bands(q_len: int, kv_len: int, params: AttentionParams) -> None:
    q, k, v = normal(2, 4, q_len, 64), normal(2, 2, kv_len, 64), normal(2, 2, kv_len, 32)
    bounds = params.bounds(q_len, kv_len)
    out, lse = reference.attention(q, k, v, bounds=bounds, precision="accurate")
    allowed = band(q_len, kv_len, *bounds)
    expected, expected_lse = exact(q, k, v, allowed)
    assert relative_l2(out, expected) <= BOUNDS["accurate"]
    blind = ~allowed.any(-1)
    assert bool((out[:, :, blind] == 0).all())
    assert bool((lse[:, :, blind] == -math.inf).all())
    assert (lse - expected_lse)[:, :, ~blind].abs().max() < 0.05


def test_bool_mask_with_blind_rows() -> None:
    q, k, v = (normal(2, 3, 70, 64) for _ in range(3))
    allowed = torch.rand(2, 1, 70, 70) > 0.5
    allowed[1, :, 7] = False
    out, lse = reference.attention(q, k, v, allowed, precision="accurate")
    expected, _ = exact(q, k, v, allowed)
    assert relative_l2(out, expected) <= BOUNDS["accurate"]
    assert bool((out[1, :, 7] == 0).all()) and bool((lse[1, :, 7] == -math.inf).all())


def test_additive_mask() -> None:
    q, k, v = (normal(1, 2, 40, 64) for _ in range(3))
    bias = torch.randn(2, 40, 40)
    bias[:, :, 30:] = -math.inf
    out, _ = reference.attention(q, k, v, bias, precision="accurate")
    assert relative_l2(out, exact(q, k, v, bias=bias)[0]) <= BOUNDS["accurate"]


def test_a_row_of_finite_minima_attends_to_all_keys_alike_as_in_sdpa() -> None:
    q, k, v = (normal(1, 2, 150, 64) for _ in range(3))
    bias = torch.zeros(150, 150)
    bias[5] = torch.finfo(torch.float32).min
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    assert max_error(expected[:, :, 5], v.double().mean(2)) < 1e-6  # what SDPA does
    out, _ = reference.attention(q, k, v, bias, precision="accurate")
    assert relative_l2(out[:, :, 5], expected[:, :, 5]) < 0.01


@pytest.mark.parametrize("precision", BOUNDS)
def test_smoothing_makes_k_bias_harmless(precision: str) -> None:
    q, k, v = (normal(1, 2, 512, 64) for _ in range(3))
    biased = k + 5 * normal(1, 2, 1, 64)
    out, lse = reference.attention(q, biased, v, precision=precision)
    expected, expected_lse = exact(q, biased, v)
    assert relative_l2(out, expected) <= BOUNDS[precision]
    assert (lse - expected_lse).abs().max() < 0.1  # the removed mean is added back


@pytest.mark.parametrize("precision", BOUNDS)
def test_outlier_tokens_and_a_mean_in_v(precision: str) -> None:
    q, k, v = (normal(1, 2, 512, 64) for _ in range(3))
    v = (v + 3 * normal(1, 2, 1, 64)) * (1 + 20 * (torch.rand(1, 2, 512, 1) > 0.99))
    out, _ = reference.attention(q, k, v, precision=precision)
    assert relative_l2(out, exact(q, k, v)[0]) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", ["fast", "balanced"])
@pytest.mark.parametrize("outlier", [1.0, 10000.0])
def test_a_mean_in_v_costs_no_accuracy(precision: str, outlier: float) -> None:
    """The error is as large as without it. That holds for the queries before an outlier token, too: it does not carry
    the mean off. A tenth more: other numbers are rounded."""
    q, k, v = (normal(1, 2, 512, 64) for _ in range(3))
    mean = 2 * normal(1, 2, 1, 64)
    bounds = (None, 0)
    v[:, :, 500] *= outlier
    expected = exact(q, k, v, band(512, 512, *bounds))[0][:, :, :384]

    def error(mean: Tensor | float) -> float:
        out, _ = reference.attention(q, k, v + mean, bounds=bounds, precision=precision)
        return relative_l2((out.double() - mean)[:, :, :384], expected)

    assert error(mean) <= 1.1 * error(0.0)


def test_a_mean_that_v_does_not_have_is_not_subtracted() -> None:
    """An output that averages over many keys is smaller than a sample's mean."""
    k, v = normal(1, 2, 4096, 64), normal(1, 2, 4096, 64)
    kv = reference.quantize_kv(k, v, "fast")
    assert (kv.v_mean != 0).float().mean() < 0.05  # 3.8 standard errors
    kv = reference.quantize_kv(k, v + 1, "fast")
    assert (kv.v_mean - 1).abs().max() < 0.3


@pytest.mark.parametrize("place", [0, 300])
def test_attention_sink(place: int) -> None:
    """What the README says: a key of little value that draws nearly all weight costs nothing where it is the first of all, and
    INT8 P the small weights beside it where it is not. The worst of six draws, in half of which V has a mean."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for mean in (0.0, 1.0) * 3:
        direction = F.normalize(normal(64), dim=0)
        q = normal(1, 2, 1024, 64) + 4 * direction
        k, v = normal(1, 2, 1024, 64), normal(1, 2, 1024, 64) + mean * normal(1, 2, 1, 64)
        k[:, :, place] += 24 * direction
        v[:, :, place] *= 0.05
        expected, _ = exact(q, k, v)
        for precision in BOUNDS:
            out, _ = reference.attention(q, k, v, precision=precision)
            worst[precision] = max(worst[precision], relative_l2(out, expected))
    if place == 0:
        assert all(worst[precision] < 0.016 for precision in BOUNDS), worst
    else:
        assert worst["accurate"] < 0.014 and worst["fast"] < 0.14 and 0.15 < worst["balanced"] < 0.25, worst


@pytest.mark.parametrize("precision", ["fast", "balanced"])
@pytest.mark.parametrize("weight", [0.5, 0.99, 0.99999])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_first_key_costs_the_others_nothing(precision: str, weight: float, mean: float) -> None:
    """However much of the weight it draws, and however little of V's mean it has: here it is 0, so that all of the output is what
    the others make of it. A tenth more: what rounding makes of all their scores alike does not cancel beside that key's."""
    q, k, v = (normal(1, 2, 512, 64) for _ in range(3))
    v += mean
    k[:, :, 0], v[:, :, 0] = 0.0, 0.0
    bias = torch.zeros(1, 2, 512, 512)
    others = torch.logsumexp((q @ k.mT / 8)[..., 1:], -1)
    bias[..., 0] = others + math.log(weight / (1 - weight))
    out, lse = reference.attention(q, k, v, bias, precision=precision)
    expected, expected_lse = exact(q, k, v, bias=bias)
    assert relative_l2(out, expected) <= 1.1 * BOUNDS[precision]
    assert (lse - expected_lse).abs().max() < 0.1


@pytest.mark.parametrize("precision", ["fast", "balanced"])
def test_a_first_key_that_is_not_finite_stays_with_those_that_see_it(precision: str) -> None:
    q, k, v = (normal(1, 2, 200, 64) for _ in range(3))
    v[:, :, 0] = math.inf
    out, _ = reference.attention(q, k, v, bounds=(-50, 0), precision=precision)
    assert not out[:, :, :51].isfinite().any() and out[:, :, 51:].isfinite().all()


@pytest.mark.parametrize("precision", BOUNDS)
def test_rows_without_keys_stay_0_beside_a_mean_in_v(precision: str) -> None:
    q, k, v = (normal(2, 2, 150, 64) for _ in range(3))
    keys = torch.tensor([[True], [False]]).expand(2, 150)[:, None, None]
    for v_mean in (0.0, 3.0, -1e30):
        out, _ = reference.attention(q, k, v + v_mean, keys, bounds=(20, None), precision=precision)
        assert out[1].count_nonzero() == 0 and out[0, :, 130:].count_nonzero() == 0
        assert out[0, :, :130].count_nonzero() > 0


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("garbage", [1e4, 1e30])
def test_what_padding_holds_does_not_matter(precision: str, garbage: float) -> None:
    """Behind the keys of a sequence it changes no number that is quantised, so that the output is the same but for the
    order of sums. Before them it moves the blocks, which have the documented error wherever they begin."""
    q, k, v = (
        normal(2, 2, 70, 64),
        normal(2, 2, 300, 64) + 2 * normal(64),
        normal(2, 2, 300, 64) + 2 * normal(64),
    )
    alone, alone_lse = reference.attention(q, k, v, precision=precision)
    for before, after in ((0, 400), (400, 0), (37, 200)):
        mask = F.pad(torch.ones(2, 1, 1, 300, dtype=torch.bool), (before, after))
        padded = [F.pad(x, (0, 0, before, after), value=garbage) for x in (k, v)]
        for attn_mask in (mask, torch.where(mask, 0.0, -math.inf)):
            out, lse = reference.attention(q, *padded, attn_mask, precision=precision)
            if before == 0:
                assert relative_l2(out, alone) < 1e-6 and (lse - alone_lse).abs().max() < 1e-5
            assert relative_l2(out, exact(q, k, v)[0]) <= BOUNDS[precision]


def test_keys_count_if_a_mask_over_keys_leaves_them() -> None:
    keys = torch.rand(2, 1, 1, 90) > 0.5
    full = (2, 3, 20, 90)
    for mask in (keys.expand(full), torch.where(keys, 0.0, -math.inf).expand(full)):
        used = reference.used_keys(mask)
        assert used is not None and torch.equal(used, keys[:, 0, 0])
    assert reference.used_keys(keys.expand(full).contiguous()) is None  # it could differ from query to query
    assert reference.used_keys(keys[:, :, :, :0].expand(2, 3, 20, 0)) is None
    assert reference.used_keys(keys.expand(2, 1, 1, 90)) is not None


def test_large_bfloat16_values_do_not_overflow() -> None:
    q, k, v = (normal(1, 1, 64, 64).bfloat16() for _ in range(3))
    for precision, bound in BOUNDS.items():
        out, _ = reference.attention(q, k, v * 1e5, precision=precision)
        assert relative_l2(out, exact(q, k, v * 1e5)[0]) <= bound


def test_queries_are_processed_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(1, 8, 300, 64) for _ in range(3))
    whole, whole_lse = reference.attention(q, k, v, bounds=(-20, 0))
    largest = 0
    attend = reference._attend

    def spy(query: Tensor, kv: reference.QuantizedKV, *rest: object) -> tuple[Tensor, Tensor]:
        nonlocal largest
        largest = max(largest, query.shape[0] * query.shape[1] * query.shape[2] * kv.k.shape[2])
        return attend(query, kv, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 100_000)
    monkeypatch.setattr(reference, "_attend", spy)
    blocked, blocked_lse = reference.attention(q, k, v, bounds=(-20, 0))
    assert 0 < largest <= 100_000
    assert relative_l2(blocked, whole) < 1e-5 and (blocked_lse - whole_lse).abs().max() < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_inputs_show(bad: float) -> None:
    for which in range(3):
        tensors = [normal(1, 2, 300, 64) for _ in range(3)]
        tensors[which][0, 0, 5, 3] = bad
        out, _ = reference.attention(*tensors)
        rows = out[0, 0, 5] if which == 0 else out[0, 0]
        assert bool(rows.isnan().all())
        assert bool(out[0, 1].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_v_does_not_enter_the_mean(bad: float) -> None:
    value = normal(1, 2, 300, 64) + 2
    zeroed = value.clone()
    value[0, 0, 5, 3], zeroed[0, 0, 5, 3] = bad, 0.0
    means = [reference.quantize_kv(v, v, "fast").v_mean for v in (value, zeroed)]
    assert torch.equal(*means)


@pytest.mark.parametrize("precision", BOUNDS)
def test_zeros_give_zeros(precision: str) -> None:
    zeros = torch.zeros(1, 1, 130, 64)
    for q, k, v in ((zeros, normal(1, 1, 130, 64), zeros), (normal(1, 1, 130, 64), zeros, zeros)):
        assert bool((reference.attention(q, k, v, precision=precision)[0] == 0).all())


def test_another_default_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 70, 64) for _ in range(3))
    for precision in ("fast", "balanced", "accurate"):
        for smoothing in ("mean", "both"):
            expected = reference.attention(q, k, v, precision=precision, smoothing=smoothing)
            torch.set_default_dtype(torch.float64)
            try:
                got = reference.attention(q, k, v, precision=precision, smoothing=smoothing)
            finally:
                torch.set_default_dtype(torch.float32)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
