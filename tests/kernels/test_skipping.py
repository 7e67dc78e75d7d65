"""skip_threshold: what is left out, by the oracle against its definition and by the other kernels against the oracle."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import DEVICE, check, margins_of, oracle, run, skip_tile_of, untied_threshold, without
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams, AttentionProblem, Kernel, Segments, TensorSpec
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.reference.tiles import margins, skipped_share
from sage_inductor.kernels.skipping import SkipTile, log2_threshold, threshold_problem
from sage_inductor.measurement.ground_truth import DOCUMENTED, float64_attention
from sage_inductor.measurement.metrics import relative_l2

HOPPER = kernels.get("hopper")
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(HOPPER.unavailable_reasons()), reason="needs a Hopper GPU"),
]
AGAINST_THE_ORACLE = [kernels.get("triton"), pytest.param(HOPPER, marks=on_hopper)]
of_kernel = pytest.mark.parametrize("kernel", AGAINST_THE_ORACLE, ids=lambda kernel: kernel.name)
of_all = pytest.mark.parametrize(
    "kernel", [kernels.get("reference"), *AGAINST_THE_ORACLE], ids=lambda kernel: kernel.name
)


def planted(
    q_len: int = 100, kv_len: int = 450, heads: int = 2, kv_heads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, head_dim 16. Each 64 queries and each 128 keys are about one of three topics in turn, and a score is
    higher by 5 where the two are the same."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, *shape, 16, device=DEVICE)
        for shape in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    for tensor, run_length in ((q, 64), (k, 128)):
        topic = torch.arange(tensor.shape[2], device=DEVICE) // run_length % 3
        tensor *= 0.5
        tensor += 20**0.5 * torch.nn.functional.one_hot(topic, 16)
    return q, k, v


def left_out_by_definition(scores: Tensor, threshold: float, tile: SkipTile, high: int | None) -> Tensor:
    """kernels/skipping.py, tile by tile, of natural scores `[rows, keys]` with -inf where a row sees no key."""
    rows, keys = scores.shape
    left_out = torch.zeros(rows, keys, dtype=torch.bool)
    for first in range(0, rows, tile.rows):
        own = scores[first : first + tile.rows]
        for begin in range(0, keys, tile.keys):
            here = own[:, begin : begin + tile.keys].amax(1)
            before = own[:, :begin].amax(1) if begin else torch.full_like(here, -math.inf)
            sees = here > -math.inf
            on_diagonal = high is not None and begin + tile.keys > first + high + 1
            if not on_diagonal and bool(((here - before).exp() < threshold)[sees].all()):
                left_out[first : first + tile.rows, begin : begin + tile.keys] = True
    return left_out


# ---------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize(
    ("tile", "is_causal"), [(SkipTile(64, 128), True), (SkipTile(128, 64), False)], ids=str
)
def test_oracle_leaves_out_what_the_definition_does(tile: SkipTile, is_causal: bool) -> None:
    q, k, v = planted(300, 500, kv_heads=2)
    params = AttentionParams(is_causal=is_causal, bottom_right=True, precision="accurate")
    low_high = params.bounds(300, 500)
    margins = margins_of(q, k, None, params, skip_tile=tile)
    threshold = 0.1
    scores = (q.double() @ k.double().mT) * 0.25
    if is_causal:
        scores = scores.masked_fill(
            ~torch.ones(300, 500, dtype=torch.bool, device=DEVICE).tril(200), -math.inf
        )
    wanted = torch.stack(
        [left_out_by_definition(head.cpu(), threshold, tile, low_high[1]) for head in scores[0]]
    )
    found = reference.by_element(margins < log2_threshold(threshold), tile, torch.empty(1, 2, 300, 4, 128))
    found = found.flatten(3)[0, :, :, :500].cpu()
    visible = scores[0].cpu() > -math.inf
    # INT8 moves a margin: of tiles that lie that near the definition says nothing.
    near = (margins - log2_threshold(threshold)).abs() < 0.1
    near = reference.by_element(near, tile, torch.empty(1, 2, 300, 4, 128)).flatten(3)[0, :, :, :500].cpu()
    assert torch.equal((found & visible)[~near], (wanted & visible)[~near])
    assert 0.1 < skipped_share(margins, threshold) < 0.9
    assert near.float().mean() < 0.1

    # What is left is attention over the other keys, and its LSE is that of their weights.
    params = replace(params, skip_threshold=threshold)
    out, lse = oracle(q, k, v, None, params, skip_tile=tile)
    expected, expected_lse = float64_attention(q, k, v, without(None, found[None].to(DEVICE)), params)
    assert relative_l2(out, expected) < 2 * DOCUMENTED["accurate"]  # scores are larger than normal ones
    assert (lse - expected_lse).abs().max() < 0.1
    whole, _ = float64_attention(q, k, v, None, params)
    assert relative_l2(expected, whole) > 0.005
    assert relative_l2(out, whole) > 1.02 * relative_l2(out, expected)


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_nothing_is_left_out_below_every_margin(precision: str) -> None:
    q, k, v = planted()
    off, least = (AttentionParams(precision=precision, skip_threshold=value) for value in (0.0, 2.0**-100))
    for one, other in zip(oracle(q, k, v, None, off), oracle(q, k, v, None, least), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_parts_of_the_keys_stand_by_themselves() -> None:
    torch.manual_seed(0)
    x = 20 * torch.randn(2, 3, 300, 6, 128)
    x[..., 2, :] = -math.inf
    tile = SkipTile(64, 64)
    starts = torch.zeros(2, 3, 5, 12, dtype=torch.bool)
    starts[:, :, 1:, 4] = True
    starts[1, 2, 3:, 10] = True
    for high in (None, 500):
        # Of queries from the second tile on, as the oracle takes them: some after others.
        found = margins(x[:, :, 64:], tile._replace(starts=starts), 64, high)
        at_once, first, second, third = (
            margins(x[:, :, 64:, part], tile, 64, None if high is None else high - 128 * part.start)
            for part in (slice(0, 6), slice(0, 2), slice(2, 6), slice(5, 6))
        )
        expected = torch.cat([first, second], -1)
        expected[1, 2, 2:, 10:] = third[1, 2, 2:]
        assert torch.equal(found, expected) and not torch.equal(found, at_once)


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@of_all
def test_values_that_are_not_finite_show_only_where_they_are_kept(kernel: Kernel, precision: str) -> None:
    q, k, v = planted(64, 384, heads=1)
    v[:, :, 130] = math.nan
    params = AttentionParams(precision=precision, skip_threshold=0.1)
    assert margins_of(q, k, None, params)[0, 0, 0, 1] < log2_threshold(0.1)
    assert run(kernel, q, k, v, None, params)[0].isfinite().all()
    assert run(kernels.get("reference"), q, k, v, None, replace(params, skip_threshold=0.0))[0].isnan().any()


@of_all
def test_nan_in_a_query_keeps_its_tiles(kernel: Kernel) -> None:
    q, k, v = planted(64, 512, heads=1)
    params = AttentionParams(precision="accurate", skip_threshold=0.5)
    assert skipped_share(margins_of(q, k, None, params), 0.5) > 0
    q[0, 0, 5, 3] = math.nan
    assert (margins_of(q, k, None, params) == math.inf).all()
    out = kernel_output(kernel, q, k, v, params)
    assert out[0, 0, 5].isnan().all() and out[0, 0, 6:].isfinite().all()


def kernel_output(kernel: Any, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    out = torch.empty_like(q)
    kernel.run(q, k, v, None, params, out, None)
    return out


# --------------------------------------------------------------------------------------------- Triton, Hopper


FOR_TRITON = ("queries", "additive")  # masks that Hopper leaves to it


def masked(name: str, q_len: int, kv_len: int) -> tuple[Tensor | None, AttentionParams, Segments | None]:
    params, mask, segments = AttentionParams(precision="accurate"), None, None
    if name == "causal":
        params = replace(params, is_causal=True, bottom_right=True)
    elif name == "window":
        params = replace(params, window_left=300, window_right=40, bottom_right=True)
    elif name == "keys":
        mask = torch.arange(kv_len, device=DEVICE) < kv_len - 70
        mask = mask[None, None, None]
    elif name == "queries":
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=DEVICE).tril(kv_len - q_len)[None, None]
        mask[..., 40:60] = False
    elif name == "additive":
        mask = torch.randn(1, 1, q_len, kv_len, device=DEVICE)
        mask[..., :30] = -math.inf
    elif name == "segments":
        lengths = (q_len, kv_len)
        segments = Segments(*[(torch.arange(n, device=DEVICE)[None] > 0.6 * n).int() for n in lengths])
    return mask, params, segments


@pytest.mark.parametrize("name", ["none", "causal", "window", "keys", "queries", "additive", "segments"])
@of_kernel
def test_a_kernel_leaves_out_the_tiles_that_the_oracle_does(kernel: Kernel, name: str) -> None:
    check_tiles(kernel, name, 100, 450)


def check_tiles(kernel: Kernel, name: str, q_len: int, kv_len: int, heads: int = 2) -> None:
    """Tile by tile: V says which step of keys a weight belongs to, so that a step that is left out is exactly 0."""
    q, k, _ = planted(q_len, kv_len, heads)
    mask, params, segments = masked(name, q_len, kv_len)
    if (segments is not None and not kernel.takes_segments) or (name in FOR_TRITON and kernel is HOPPER):
        pytest.skip(f"{kernel.name} does not take them")
    # A channel for each 128 keys: steps are no shorter on Hopper, and elsewhere these problems have no more than 16.
    v = torch.zeros(1, 1, kv_len, max(16, 8 * math.ceil(kv_len / 1024)), device=DEVICE)
    tile = skip_tile_of(kernel, q, k, v, mask, params, segments)
    step = torch.arange(kv_len, device=DEVICE) // tile.keys
    v[0, 0, torch.arange(kv_len), step] = 1.0
    margins = margins_of(q, k, mask, params, segments, tile)
    threshold = untied_threshold(margins, random.Random(0))
    params = replace(params, skip_threshold=threshold)
    weights, _ = run(kernel, q, k, v, mask, params, None, segments)
    rows = torch.nn.functional.pad(weights, (0, 0, 0, -q_len % tile.rows)).unflatten(2, (-1, tile.rows))
    steps = -(-kv_len // tile.keys)
    assert torch.equal(rows.amax(3)[..., :steps] > 0, margins[..., :steps] >= log2_threshold(threshold))
    assert 0.02 < skipped_share(margins, threshold) < 0.8


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@of_kernel
def test_a_kernel_agrees_with_the_oracle(kernel: Kernel, precision: str) -> None:
    q, k, v = planted()
    mask, params, _ = masked("causal", 100, 450)
    check_agreement(kernel, q, k, v, mask, replace(params, precision=precision))


def check_agreement(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, params: AttentionParams
) -> None:
    tile = skip_tile_of(kernel, q, k, v, mask, params)
    threshold = untied_threshold(margins_of(q, k, mask, params, None, tile), random.Random(0))
    assert threshold > 0
    params = replace(params, skip_threshold=threshold)
    check(kernel, q, k, v, mask, params, steps_of_64=kernel.oracle_distance > 1)


class TestOnHopper:
    """What only this kernel does: several tiles and rounds of K and V, tiles in parts."""

    pytestmark = on_hopper

    @pytest.mark.parametrize("name", ["none", "causal", "window", "keys"])
    def test_many_blocks(self, name: str) -> None:
        check_tiles(HOPPER, name, 700, 8000, 30)

    @pytest.mark.parametrize("heads", [2, 140])
    def test_tiles_in_parts(self, heads: int) -> None:
        q, k, v = planted(128, 8192, heads)
        assert skip_tile_of(HOPPER, q, k, v, None, AttentionParams()).starts is not None
        check_tiles(HOPPER, "none", 128, 8192, heads)

    @pytest.mark.parametrize("precision", kernels.PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
    @pytest.mark.parametrize("name", ["none", "causal", "window", "keys"])
    def test_agrees_with_the_oracle(self, precision: str, dim: int, name: str) -> None:
        q, k, v = (torch.nn.functional.pad(x, (0, dim - 16)).bfloat16() for x in planted(700, 3000, 6, 2))
        v[..., 16:] = torch.randn_like(v[..., 16:])
        mask, params, _ = masked(name, 700, 3000)
        check_agreement(HOPPER, q, k, v, mask, replace(params, precision=precision, scale=0.25))

    @pytest.mark.parametrize("precision", kernels.PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 128, 256])
    def test_the_same_bits_every_time(self, precision: str, dim: int) -> None:
        """Which warpgroup asks for V differs from run to run, and nothing else."""
        q, k, v = (torch.nn.functional.pad(x, (0, dim - 16)).half() for x in planted(4000, 8192, 40, 40))
        v[..., 16:] = torch.randn_like(v[..., 16:])
        params = AttentionParams(precision=precision, scale=0.25, skip_threshold=0.05)
        first, *others = (run(HOPPER, q, k, v, None, params) for _ in range(5))
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["hopper", "triton", "sageattention"])
def test_kernels_say_what_they_cannot_do_and_what_was_not_measured(name: str) -> None:
    spec = TensorSpec((1, 2, 256, 64), (32768, 16384, 64, 1), torch.bfloat16, torch.device("cuda", 0))
    refused = ["skip_threshold=0.01 (supported: 0)"] if name == "sageattention" else []
    unmeasured = [f'skip_threshold=0.01 (not measured yet: by tune="measure", or kernel="{name}")']
    for threshold, expected in ((0.0, []), (0.01, refused)):
        problem = AttentionProblem(spec, spec, spec, None, AttentionParams(skip_threshold=threshold))
        reasons = kernels.get(name).not_supported_reasons(problem)
        assert [text for text in reasons if text.startswith("skip_threshold")] == expected
        if not refused:
            assert kernels.get(name).unmeasured_reasons(problem) == (unmeasured if threshold else [])


@pytest.mark.parametrize("value", [1, 1.0, -0.1, math.nan, math.inf, "0.1", True, None])
def test_a_threshold_lies_below_1(value: object) -> None:
    assert str(threshold_problem(value)).startswith(f"skip_threshold={value!r} (valid: ")


@pytest.mark.parametrize("value", [0, 0.0, 1e-300, 0.5, 0.999])
def test_a_threshold_from_0_on_is_valid(value: float) -> None:
    assert threshold_problem(value) is None
