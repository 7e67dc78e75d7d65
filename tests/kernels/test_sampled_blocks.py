"""skip_by="sample": the blocks that a sample of the queries rules out, by the oracle against its definition and by kernels against
the oracle."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from agreement import DEVICE, check, margins_of, oracle, run, untied_threshold, without
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams, AttentionProblem, Kernel, TensorSpec
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import (
    GROUP_ROWS,
    PROBE_SHARE,
    PROBE_STEP,
    PROBED_GROUPS,
    SAMPLE_LIFT,
    SAMPLE_STEP,
    SAMPLED_TILE,
    decider_problem,
    log2_threshold,
)
from sage_inductor.kernels.triton.block_list import HEADER
from sage_inductor.kernels.triton.launch import TritonAttention
from sage_inductor.measurement.ground_truth import DOCUMENTED, float64_attention
from sage_inductor.measurement.metrics import relative_l2

HOPPER = kernels.get("hopper")
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(HOPPER.unavailable_reasons()), reason="needs a Hopper GPU"),
]
of_kernel = pytest.mark.parametrize(
    "kernel", [kernels.get("triton"), pytest.param(HOPPER, marks=on_hopper)], ids=lambda kernel: kernel.name
)
SAMPLED = AttentionParams(precision="accurate", smoothing="mean", skip_by="sample")
FORMS = {
    "none": SAMPLED,
    "causal": replace(SAMPLED, is_causal=True, bottom_right=True),
    "causal, top left": replace(SAMPLED, is_causal=True),
    "window": replace(SAMPLED, window_left=300, window_right=140, bottom_right=True),
    "narrow window": replace(SAMPLED, window_left=20, window_right=30),
    "keys": SAMPLED,
}
TILE, BLOCK = SAMPLED_TILE.rows, SAMPLED_TILE.keys


def planted(
    q_len: int, kv_len: int, heads: int = 2, kv_heads: int = 1, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, head_dim 16, and value, of which channel n is 1 for the keys of block n: an output says which blocks count. Each
    128 queries or keys are about one of three topics in turn, and a score is higher by 8 where the two are the same."""
    torch.manual_seed(0)
    q, k = (
        torch.randn(batch, *shape, 16, device=DEVICE) * 0.5 for shape in ((heads, q_len), (kv_heads, kv_len))
    )
    for tensor in (q, k):
        topic = torch.arange(tensor.shape[2], device=DEVICE) // 128 % 3
        tensor += 32**0.5 * torch.nn.functional.one_hot(topic, 16)
    k[batch - 1] = k[batch - 1].roll(200, 1)
    v = torch.zeros(batch, kv_heads, kv_len, max(16, 8 * math.ceil(kv_len / 1024)), device=DEVICE)
    v[:, :, torch.arange(kv_len), torch.arange(kv_len) // BLOCK] = 1.0
    return q, k, v


def key_mask(name: str, batch: int, kv_len: int) -> Tensor | None:
    """Keys in front and behind that do not count, of each sequence others."""
    if name != "keys":
        return None
    n = torch.arange(kv_len, device=DEVICE)
    rows = [(n >= 40 + 100 * b) & (n < kv_len - 70 - 150 * b) for b in range(batch)]
    return torch.stack(rows)[:, None, None]


def visible(params: AttentionParams, mask: Tensor | None, b: int, q_len: int, kv_len: int) -> Tensor:
    low, high = params.bounds(q_len, kv_len)
    i, j = torch.arange(q_len, device=DEVICE)[:, None], torch.arange(kv_len, device=DEVICE)[None]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=DEVICE)
    if low is not None:
        seen &= j >= i + low
    if high is not None:
        seen &= j <= i + high
    return seen if mask is None else seen & mask[b, 0, 0]


def listed_by_definition(scores: Tensor, by_bounds: Tensor, threshold: float) -> Tensor:
    """kernels/skipping.py, tile by tile, of natural scores `[rows, keys]` with -inf where a row sees no key, and of what it sees by
    its bounds: bool `[tiles, blocks]`, True where a block is kept. A block that no row sees is not."""
    rows, keys = scores.shape
    kept = torch.zeros(-(-rows // TILE), -(-keys // BLOCK), dtype=torch.bool)
    for t in range(kept.shape[0]):
        sample = [min(t * TILE + place, rows - 1) for place in range(SAMPLE_STEP // 2, TILE, SAMPLE_STEP)]
        own, bounds = scores[t * TILE : (t + 1) * TILE], by_bounds[t * TILE : (t + 1) * TILE]
        seen = [bool(bounds[:, n * BLOCK : (n + 1) * BLOCK].any()) for n in range(kept.shape[1])]
        for n in range(kept.shape[1]):
            here = slice(n * BLOCK, (n + 1) * BLOCK)
            if not bool((own[:, here] > -math.inf).any()):
                continue
            is_whole = bounds[:, here].shape[1] == BLOCK and bool(bounds[:, here].all())
            weights = [
                math.exp(scores[i, here].max() - scores[i].max())
                for i in sample
                if scores[i].max() > -math.inf
            ]
            kept[t, n] = not is_whole or n == seen.index(True) or SAMPLE_LIFT * max(weights) >= threshold
    return kept


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 900), (700, 650), (130, 1000)])
def test_oracle_keeps_what_the_definition_does(name: str, q_len: int, kv_len: int) -> None:
    batch, params = 2, FORMS[name]
    q, k, v = planted(q_len, kv_len, batch=batch)
    mask = key_mask(name, batch, kv_len)
    margins = margins_of(q, k, mask, params)
    threshold = 0.05
    scores = (q.double() @ k.double().mT) * 0.25
    for b in range(batch):
        by_bounds = visible(params, None, b, q_len, kv_len)
        for h in range(2):
            own = scores[b, h].masked_fill(~visible(params, mask, b, q_len, kv_len), -math.inf)
            wanted = listed_by_definition(own, by_bounds, threshold)
            # INT8 moves a margin: of tiles that lie that near the definition says nothing.
            near = (margins[b, h] - log2_threshold(threshold)).abs().cpu() < 0.15
            kept = (margins[b, h] >= log2_threshold(threshold)).cpu()
            assert torch.equal(kept[~near], wanted[~near])
            assert near.float().mean() < 0.2


def test_oracle_attends_to_the_blocks_that_are_kept() -> None:
    q, k, _ = planted(300, 900)
    v = torch.randn(1, 1, 900, 16, device=DEVICE)
    params = replace(FORMS["causal"], skip_threshold=0.05)
    margins = margins_of(q, k, None, params)
    assert 0.1 < skipped_share(margins, 0.05) < 0.9
    out, lse = oracle(q, k, v, None, params)
    left_out = (margins < log2_threshold(0.05)).repeat_interleave(TILE, 2)[:, :, :300]
    left_out = left_out.repeat_interleave(BLOCK, 3)[..., :900]
    expected, expected_lse = float64_attention(q, k, v, without(None, left_out), params)
    assert relative_l2(out, expected) < 2 * DOCUMENTED["accurate"]  # scores are larger than normal ones
    assert (lse - expected_lse).abs().max() < 0.1


def test_a_query_between_two_of_the_sample_may_lose_what_it_sees() -> None:
    """What sets it apart from skip_by="scores": it is an estimate."""
    q, k, v = (torch.zeros(1, 1, n, 16, device=DEVICE) for n in (128, 512, 512))
    q[..., 0], k[:, :, :128, 0], v[:, :, :128, 0] = 8.0, 8.0, 1.0
    v[:, :, 300, 1] = 1.0
    q[:, :, 5], k[:, :, 300, 1] = 0.0, 16.0
    q[:, :, 5, 1] = 8.0
    exact = run(
        kernels.get("reference"), q, k, v, None, replace(SAMPLED, skip_by="scores", skip_threshold=0.01)
    )
    estimated = run(kernels.get("reference"), q, k, v, None, replace(SAMPLED, skip_threshold=0.01))
    assert exact[0][0, 0, 5, 1] > 0.99 and estimated[0][0, 0, 5, 1] == 0
    # And where the sample has it, it is kept, for all.
    q[:, :, SAMPLE_STEP // 2] = q[:, :, 5]
    kept = run(kernels.get("reference"), q, k, v, None, replace(SAMPLED, skip_threshold=0.01))
    assert kept[0][0, 0, 5, 1] > 0.99


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "kv_heads", "batch"),
    [(300, 900, 2, 1, 2), (1100, 700, 2, 2, 1), (5, 450, 2, 1, 1), (1, 700, 1, 1, 1), (200, 60, 1, 1, 1)],
)
@of_kernel
def test_a_kernel_leaves_out_the_blocks_that_the_oracle_does(
    kernel: Kernel, name: str, q_len: int, kv_len: int, heads: int, kv_heads: int, batch: int
) -> None:
    check_blocks(kernel, name, q_len, kv_len, heads, kv_heads, batch)


def check_blocks(
    kernel: Kernel, name: str, q_len: int, kv_len: int, heads: int, kv_heads: int, batch: int
) -> float:
    """Block by block, by what of V an output has. Returns the share that is left out."""
    q, k, v = planted(q_len, kv_len, heads, kv_heads, batch)
    mask, params = key_mask(name, batch, kv_len), FORMS[name]
    margins = margins_of(q, k, mask, params)
    params = replace(params, skip_threshold=untied_threshold(margins, random.Random(0)) or 0.5)
    weights, lse = run(kernel, q, k, v, mask, params)
    rows = torch.nn.functional.pad(weights, (0, 0, 0, -q_len % TILE)).unflatten(2, (-1, TILE))
    blocks = -(-kv_len // BLOCK)
    kept = margins >= log2_threshold(params.skip_threshold)
    assert torch.equal(rows.amax(3)[..., :blocks] > 0, kept)
    expected_lse = oracle(q, k, v, mask, params)[1]
    torch.testing.assert_close(lse, expected_lse, atol=5e-2, rtol=0)
    return skipped_share(margins, params.skip_threshold)


@pytest.mark.parametrize("name", ["none", "causal", "window", "keys"])
@pytest.mark.parametrize("processors", [2, 132])
def test_lists_lie_where_hopper_reads_them(
    monkeypatch: pytest.MonkeyPatch, processors: int, name: str
) -> None:
    """Block by block, as attention.cu finds a tile's list; in parts of tiles, too, where multiprocessors are many."""
    from sage_inductor.kernels.hopper import launch as hopper

    monkeypatch.setattr(hopper, "multiprocessors", lambda index: processors)
    batch, heads, q_len, kv_len = 2, 2, 300, 900 if processors == 2 else 2600
    q, k, v = planted(q_len, kv_len, heads, 1, batch)
    mask, params = key_mask(name, batch, kv_len), FORMS[name]
    margins = margins_of(q, k, mask, params)
    params = replace(params, skip_threshold=untied_threshold(margins, random.Random(0)))
    call = hopper.HopperAttention(q, k, v, mask, params, torch.empty_like(q), None)
    assert (call.variant.block_list, call.variant.skip, call.variant.block_m) == (True, False, TILE)
    assert bool(call.numbers.units) == (name == "none" and processors == 132)
    assert call.skip_tile == SAMPLED_TILE and call.block_list is not None
    lists = call.block_list.of(call.quantize(q, k, v, mask)).tolist()
    kept, blocks = margins >= log2_threshold(params.skip_threshold), -(-kv_len // BLOCK)
    sees = torch.stack([visible(params, mask, b, q_len, kv_len) for b in range(batch)])
    sees = torch.nn.functional.pad(sees, (0, -kv_len % BLOCK))
    for b in range(batch):
        for h in range(heads):
            for tile in range(call.numbers.tiles_per_head):
                start = b * call.numbers.list_b + h * call.numbers.list_h + tile * (HEADER + blocks)
                listed, whole = lists[start : start + HEADER]
                entries = lists[start + HEADER : start + HEADER + listed]
                assert not any(entry % 2 for entry in entries) and len(set(entries)) == listed
                assert entries == sorted(entries[:whole]) + sorted(entries[whole:], reverse=True)
                named = {entry // 2 for entry in entries}
                rows = slice(tile * TILE, min((tile + 1) * TILE, q_len))
                sees_all = sees[b, rows].unflatten(1, (blocks, BLOCK)).all(0).all(1)
                in_full = [block for block in sorted(named) if block and sees_all[block]]
                assert [entry // 2 for entry in entries[:whole]] == in_full
                kept_here, seen = (
                    x[b, h, tile].nonzero().flatten().tolist() for x in (kept, margins > -math.inf)
                )
                assert named & set(seen) == set(kept_here)


@pytest.mark.parametrize("name", ["none", pytest.param("causal, top left", marks=pytest.mark.slow), "keys"])
def test_in_a_long_call_probes_decide_about_the_other_groups(name: str) -> None:
    """Heads of which much, nothing, and only outside of the probes something can be left out; and a head in which the probes
    leave out just enough."""
    q_len, kv_len = GROUP_ROWS * PROBED_GROUPS + 700, 900
    q, k, v = planted(q_len, kv_len, heads=4)
    group = torch.arange(q_len, device=DEVICE) // GROUP_ROWS
    is_probe = group % PROBE_STEP == PROBE_STEP - 1
    q[:, 1] = torch.randn_like(q[:, 1]) * 0.1
    q[:, 2, is_probe] = torch.randn_like(q[:, 2, is_probe]) * 0.1
    q[:, 3, is_probe & (group > PROBE_STEP)] = 0.0
    mask, params = key_mask(name, 1, kv_len), FORMS[name]
    threshold = 0.05
    params = replace(params, skip_threshold=threshold)
    call = TritonAttention(q, k, v, mask, params, torch.empty_like(q), None)
    assert len(call.sampling) == 2 and call.block_list is not None
    lists = call.block_list.of(call.quantize(q, k, v, mask))[:-1].view(4, -1, HEADER + -(-kv_len // BLOCK))
    margins = margins_of(q, k, mask, params)[0].cpu()
    kept = torch.zeros_like(margins, dtype=torch.bool)
    for head, tile, of_tile in (
        (h, t, lists[h, t].tolist()) for h in range(4) for t in range(lists.shape[1])
    ):
        for entry in of_tile[HEADER : HEADER + of_tile[0]]:
            kept[head, tile, entry // 2] = margins[head, tile, entry // 2] > -math.inf
    assert torch.equal(kept, margins >= log2_threshold(threshold))
    seen, of_group = margins > -math.inf, torch.arange(margins.shape[1]) * TILE // GROUP_ROWS
    of_probe = of_group % PROBE_STEP == PROBE_STEP - 1
    shares = [
        [float((seen & ~kept)[head, rows].sum() / seen[head, rows].sum()) for rows in (of_probe, ~of_probe)]
        for head in range(4)
    ]
    assert shares[0][0] > 0.2 and shares[0][1] > 0.2
    assert shares[1] == [0, 0] and shares[2] == [0, 0]
    assert 1 / PROBE_SHARE < shares[3][0] < 0.2 < shares[3][1]


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("name", ["causal", "keys"])
@of_kernel
def test_a_kernel_agrees_with_the_oracle(kernel: Kernel, precision: str, name: str) -> None:
    q, k, _ = planted(300, 900)
    v = torch.randn(1, 1, 900, 16, device=DEVICE)
    params, mask = replace(FORMS[name], precision=precision), key_mask(name, 1, 900)
    threshold = untied_threshold(margins_of(q, k, mask, params), random.Random(0))
    assert threshold > 0
    params = replace(params, skip_threshold=threshold)
    check(kernel, q, k, v, mask, params, steps_of_64=kernel.oracle_distance > 1)


@of_kernel
def test_nothing_is_left_out_of_normal_inputs_and_the_output_is_the_same(kernel: Kernel) -> None:
    """Bit by bit where both read the blocks in one order, as hopper does; else what one rounding of P differs from another by."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 700, 64, device=DEVICE) for _ in range(3))
    params = replace(SAMPLED, precision="fast", skip_threshold=1e-4)
    assert skipped_share(margins_of(q, k, None, params), 1e-4) == 0
    off = run(kernel, q, k, v, None, replace(params, skip_threshold=0.0))
    on = run(kernel, q, k, v, None, params)
    if kernel is HOPPER:
        assert torch.equal(off[0], on[0]) and torch.equal(off[1], on[1])
    else:
        assert relative_l2(on[0], off[0]) < DOCUMENTED["fast"]
        torch.testing.assert_close(on[1], off[1], atol=1e-5, rtol=0)


@of_kernel
def test_nan_keeps_its_blocks(kernel: Kernel) -> None:
    q, k, v = planted(128, 900, heads=1)
    params = replace(SAMPLED, skip_threshold=0.5)
    q[0, 0, 5, 3] = math.nan  # no row of the sample
    q[0, 0, SAMPLE_STEP // 2, 3] = math.nan  # one of it
    out = run(kernel, q, k, v, None, params)[0]
    rows = torch.arange(128, device=DEVICE)
    spoilt = (rows == 5) | (rows == SAMPLE_STEP // 2)
    assert out[0, 0, spoilt].isnan().all() and (out[0, 0, ~spoilt, :8] > 0).all()


@of_kernel
def test_an_additive_mask_over_keys(kernel: Kernel) -> None:
    if kernel is HOPPER:
        pytest.skip("hopper takes bool masks")
    q, k, v = planted(300, 900)
    mask = torch.zeros(1, 1, 1, 900, device=DEVICE)
    mask[..., 256:384], mask[..., 600:] = 9.0, -math.inf
    margins = margins_of(q, k, mask, SAMPLED)
    params = replace(SAMPLED, skip_threshold=untied_threshold(margins, random.Random(0)))
    assert 0 < skipped_share(margins, params.skip_threshold) < 1
    weights = run(kernel, q, k, v, mask, params)[0]
    rows = torch.nn.functional.pad(weights, (0, 0, 0, -300 % TILE)).unflatten(2, (-1, TILE))
    assert torch.equal(rows.amax(3)[..., :8] > 0, margins >= log2_threshold(params.skip_threshold))


@pytest.mark.parametrize("kernel", [kernels.get("triton"), HOPPER], ids=lambda kernel: kernel.name)
def test_what_a_sample_cannot_decide_about_is_refused(kernel: Kernel) -> None:
    spec = TensorSpec((1, 2, 256, 64), (32768, 16384, 64, 1), torch.bfloat16, torch.device("cuda", 0))
    ids = TensorSpec((1, 256), (256, 1), torch.int32, torch.device("cuda", 0))
    square = TensorSpec((1, 1, 256, 256), (65536, 65536, 256, 1), torch.bool, torch.device("cuda", 0))
    keys = TensorSpec((1, 1, 1, 256), (256, 256, 256, 1), torch.bool, torch.device("cuda", 0))
    params = AttentionParams(skip_threshold=0.01, skip_by="sample")

    def reasons(params: AttentionParams, mask: TensorSpec | None, ids: TensorSpec | None = None) -> list[str]:
        problem = AttentionProblem(spec, spec, spec, mask, params, False, ids, ids)
        return [text for text in kernel.not_supported_reasons(problem) if "skip_by" in text]

    assert reasons(params, None) == reasons(params, keys) == []
    assert reasons(params, square) == [
        'attn_mask with skip_by="sample"=1, 1, 256, 256 (supported: the same for all heads and queries)'
    ]
    assert reasons(params, None, ids) == ['segments with skip_by="sample" (supported: none)']
    for other in (replace(params, skip_by="scores"), replace(params, skip_threshold=0.0)):
        assert reasons(other, square) == reasons(other, None, ids) == []


@pytest.mark.parametrize("value", ["both", "", None, True, 0])
def test_what_decides_is_scores_or_a_sample(value: object) -> None:
    assert decider_problem(value) == f"skip_by={value!r} (valid: scores, sample)"
    assert decider_problem("sample") is None


class TestOnGPU:
    """What only a GPU shows: many blocks and programs, tiles in parts, graphs."""

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", FORMS)
    @of_kernel
    def test_many_blocks(self, kernel: Kernel, name: str) -> None:
        share = check_blocks(kernel, name, 3000, 8000, 30, 6, 2)
        if name == "narrow window":  # its edges cut every block that it has, and those are kept
            assert share == 0
        else:  # of a window, one block in five is not cut, and few of those are below the threshold
            assert (0 if name == "window" else 0.02) < share < 0.9

    @pytest.mark.gpu
    @pytest.mark.parametrize("heads", [2, 140])
    @of_kernel
    def test_tiles_in_parts(self, kernel: Kernel, heads: int) -> None:
        assert check_blocks(kernel, "none", 128, 8192, heads, 1, 1) > 0.1

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", kernels.PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
    @pytest.mark.parametrize("name", ["none", "causal", "window", "keys"])
    @of_kernel
    def test_agrees_with_the_oracle(self, kernel: Kernel, precision: str, dim: int, name: str) -> None:
        q, k, v = (torch.nn.functional.pad(x, (0, dim - x.shape[-1])) for x in planted(700, 3000, 6, 2))
        v = torch.randn_like(v)
        mask = key_mask(name, 1, 3000)
        params = replace(FORMS[name], precision=precision, scale=0.25)
        q, k, v = (x[..., :dim].bfloat16() for x in (q, k, v))
        threshold = untied_threshold(margins_of(q, k, mask, params), random.Random(0))
        check(kernel, q, k, v, mask, replace(params, skip_threshold=threshold), steps_of_64=True)

    @pytest.mark.gpu
    @of_kernel
    def test_a_graph_makes_its_lists_anew(self, kernel: Kernel) -> None:
        """Captured with inputs of which nothing is left out, replayed with others; and the same bits every time."""
        inputs = [x.bfloat16() for x in planted(3000, 8192, 8, 8)]
        params = replace(FORMS["causal"], skip_threshold=0.05)
        expected, expected_lse = run(kernel, *inputs, None, params)
        static = [torch.zeros_like(x) for x in inputs]
        out, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
        kernel.run(*static, None, params, out, lse)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.run(*static, None, params, out, lse)
        for tensor, data in zip(static, inputs, strict=True):
            tensor.copy_(data)
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
