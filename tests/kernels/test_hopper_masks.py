"""Masks of a row per query in the Hopper kernel: what it is given of them, read as hopper/attention.cu reads it, index by index. That
needs no GPU: the kernels that read the mask run in Triton's interpreter. What it computes, on a Hopper GPU."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import agreement
import pytest
import torch
from hopper_reader import Reader, items_of, seen_by
from torch import Tensor

pytest.importorskip("triton")

from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.hopper import HopperKernel
from sage_inductor.kernels.hopper import launch as hopper_launch
from sage_inductor.kernels.hopper.launch import HopperAttention
from sage_inductor.kernels.triton.block_list import HEADER

KERNEL = HopperKernel()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSORS = 12  # few, so that small problems have whole tiles and tiles in parts

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(KERNEL.unavailable_reasons()), reason="needs a Hopper GPU"),
]


def read_back(
    mask: Tensor, shape: tuple[int, int, int, int], params: AttentionParams, head_dim: int = 64
) -> tuple[Tensor, Reader]:
    """What all programs let pass of a problem [batch, heads, q_len, kv_len]: int of that shape, how many times each pair."""
    batch, heads, q_len, kv_len = shape
    q = torch.randn(batch, heads, q_len, head_dim, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(batch, heads, kv_len, head_dim, device=DEVICE, dtype=torch.bfloat16)
    call = HopperAttention(q, k, k, mask.to(DEVICE), params, torch.empty_like(q), None)
    workspace = torch.full((call.workspace_bytes,), 0x7F, dtype=torch.uint8, device=DEVICE)
    call._look_at_mask(call.stream(), mask.to(DEVICE), workspace)
    reader = Reader(call, workspace)
    return seen_by(reader), reader


def drawn(shape: tuple[int, ...], kind: str) -> Tensor:
    """A bool mask of `shape`, [..., q_len, kv_len]."""
    torch.manual_seed(sum(shape))
    i, j = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    heads = torch.arange(shape[1])[None, :, None, None] if len(shape) == 4 else torch.zeros(())
    masks = {
        "random": torch.rand(shape) > 0.5,
        "causal": i >= j,
        "documents": i // 170 == j // 170,
        "a run, another for each head": (j >= 130 * heads) & (j < 130 * heads + 200),
        "nothing": torch.zeros(shape, dtype=torch.bool),
        "everything": torch.ones(shape, dtype=torch.bool),
    }
    return masks[kind].expand(shape).contiguous()


SHAPES: list[tuple[tuple[int, int, int, int], tuple[int, ...]]] = [
    ((2, 3, 330, 700), (2, 3, 330, 700)),
    ((2, 3, 330, 700), (2, 1, 330, 700)),
    ((2, 3, 330, 700), (1, 3, 330, 700)),
    ((1, 2, 65, 5000), (65, 5000)),  # in parts
    ((1, 1, 200, 4100), (1, 1, 200, 4100)),
    ((2, 4, 1, 300), (2, 4, 1, 300)),
    ((2, 4, 150, 300), (2, 4, 1, 300)),  # over keys, of each head its own
    ((1, 2, 128, 128), (1, 1, 128, 128)),
]


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "multiprocessors", lambda index: PROCESSORS)


KINDS = ("random", "causal", "documents", "a run, another for each head", "nothing", "everything")


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "fast") for kind in KINDS), ("documents", "balanced"), ("nothing", "balanced")],
)
@pytest.mark.parametrize(("shape", "mask_shape"), SHAPES)
def test_what_a_mask_leaves_is_read_once(
    processors: None, kind: str, shape: tuple[int, int, int, int], mask_shape: tuple[int, ...], precision: str
) -> None:
    """With tiles of two warpgroups and of three."""
    mask = drawn(mask_shape, kind)
    seen, reader = read_back(mask, shape, AttentionParams(precision=precision))
    assert torch.equal(seen, mask.expand(shape).int())
    assert reader.variant.consumers == (3 if precision == "balanced" and shape[2] in (150, 330) else 2)
    if kind == "everything":
        blocks = -(-shape[3] // 128)
        assert not (reader.list[:-1].view(-1, HEADER + blocks)[:, HEADER:] & 1).any()
    if kind == "nothing":
        assert reader.steps == len(list(items_of(reader.call)))  # one for each tile, or part of a tile


@pytest.mark.parametrize(
    "band",
    [
        {"is_causal": True},
        {"is_causal": True, "bottom_right": True},
        {"window_left": 90, "window_right": 200},
        {"window_left": 0},
    ],
)
@pytest.mark.parametrize(("shape", "mask_shape"), SHAPES[:4])
def test_bounds_hold_beside_a_mask(
    processors: None,
    band: dict[str, Any],
    shape: tuple[int, int, int, int],
    mask_shape: tuple[int, ...],
) -> None:
    params = AttentionParams(**band)
    low, high = params.bounds(*shape[2:])
    i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])
    within = (j >= i + (-shape[3] * 9 if low is None else low)) & (
        j <= i + (shape[3] * 9 if high is None else high)
    )
    for kind in ("random", "documents"):
        mask = drawn(mask_shape, kind)
        seen, reader = read_back(mask, shape, params)
        assert torch.equal(seen, (mask.expand(shape) & within).int())
        assert reader.numbers.units == 0  # tiles of different lengths are not split


def test_tiles_in_parts_are_meant(processors: None) -> None:
    """So that the cases above do have parts, some of which get no block."""
    _, reader = read_back(drawn((65, 5000), "documents"), (1, 2, 65, 5000), AttentionParams())
    tiles = [reader.tile(item) for item in items_of(reader.call)]
    assert reader.numbers.units and any(t["begin"] == t["end"] for t in tiles)
    # Which keys a part begins with would depend on the mask, and a threshold keeps those.
    skipping = AttentionParams(skip_threshold=0.1)
    _, reader = read_back(drawn((65, 5000), "documents"), (1, 2, 65, 5000), skipping)
    assert reader.numbers.units == 0 and reader.variant.skip


def test_masks_over_keys_stay_as_they_were(processors: None) -> None:
    q = torch.randn(2, 2, 200, 64, device=DEVICE, dtype=torch.bfloat16)
    for mask in (torch.ones(2, 1, 1, 200).bool(), torch.ones(200).bool().expand(200, 200)):
        call = HopperAttention(q, q, q, mask.to(DEVICE), AttentionParams(), torch.empty_like(q), None)
        assert call.block_list is None and call.mask_bits is None
        assert call.variant.key_mask and not call.variant.block_list


# -------------------------------------------------------------------------------------------------- on the GPU


def blocky(name: str, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """bool `[batch or 1, heads or 1, q_len, kv_len]` on the GPU: one kind that models make, or a random one."""
    i, j = torch.arange(q_len, device="cuda")[:, None], torch.arange(kv_len, device="cuda")[None]
    padding = 190 * torch.arange(batch, device="cuda").view(batch, 1, 1, 1)
    if name == "random":
        return torch.rand(batch, 1, q_len, kv_len, device="cuda") > 0.5
    if name == "random, one a head":
        return torch.rand(1, heads, q_len, kv_len, device="cuda") > 0.95
    if name == "one key each":
        return (j == 7 * i % kv_len).view(1, 1, q_len, kv_len)
    return {
        "causal": (i >= j).view(1, 1, q_len, kv_len),
        "causal, padded on the left": (i >= j) & (j >= padding),
        "a window": ((i - j).abs() < 140).view(1, 1, q_len, kv_len),
        "documents": (i // 170 == j // 170).expand(batch, 1, q_len, kv_len),
        "a prefix": ((j < 260) | (i >= j)).view(1, 1, q_len, kv_len),
        "blocks here and there": ((i // 128 * 7 + j // 128 * 5) % 3 == 0).view(1, 1, q_len, kv_len),
    }[name]


BLOCKY = (
    "random", "random, one a head", "one key each", "causal", "causal, padded on the left", "a window", "documents", "a prefix",
    "blocks here and there",
)  # fmt: skip


class TestOnHopper:
    """Few variants, as each is compiled, which takes seconds: several problems for each."""

    pytestmark = on_hopper

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 128])
    def test_agrees_with_the_oracle(self, dim: int, precision: str) -> None:
        q = torch.randn(3, 4, 700, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(3, 2, 1100, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for name in BLOCKY:
            mask = blocky(name, 3, 4, 700, 1100)
            agreement.check(KERNEL, q, k, v, mask, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize(
        ("precision", "dim", "v_dim"),
        [
            ("balanced", 16, 16),
            ("fast", 40, 40),
            ("accurate", 72, 96),
            ("balanced", 120, 136),
            ("fast", 160, 160),
            ("accurate", 192, 192),
            ("fast", 256, 256),
            ("balanced", 256, 256),
            ("accurate", 64, 256),
        ],
    )
    def test_other_head_dims(self, dim: int, v_dim: int, precision: str) -> None:
        q = torch.randn(2, 4, 330, dim, device="cuda", dtype=torch.float16)
        k = torch.randn(2, 2, 515, dim, device="cuda", dtype=torch.float16)
        v = torch.randn(2, 2, 515, v_dim, device="cuda", dtype=torch.float16)
        for name in ("random", "documents"):
            mask = blocky(name, 2, 4, 330, 515)
            agreement.check(KERNEL, q, k, v, mask, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    def test_lengths(self, precision: str) -> None:
        """In parts, too, and with fewer keys than a block."""
        for q_len, kv_len in ((1, 1), (1, 300), (64, 8000), (200, 8192), (129, 128), (2000, 65)):
            q = torch.randn(1, 2, q_len, 128, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(1, 2, kv_len, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            for name in ("random", "random, one a head", "documents", "one key each"):
                mask = blocky(name, 1, 2, q_len, kv_len)
                agreement.check(KERNEL, q, k, v, mask, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("band", [{"is_causal": True}, {"window_left": 300, "window_right": 20}], ids=str)
    def test_beside_causality_and_windows(self, band: dict[str, Any], precision: str) -> None:
        q, k, v = (torch.randn(2, 2, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        params = AttentionParams(precision=precision, **band)
        for name in ("random", "documents"):
            agreement.check(KERNEL, q, k, v, blocky(name, 2, 2, 1000, 1000), params, steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    def test_masks_over_keys_of_each_head(self, precision: str) -> None:
        q, k, v = (torch.randn(2, 3, 400, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        mask = torch.rand(2, 3, 1, 400, device="cuda") > 0.4
        mask[1, 2] = False
        agreement.check(KERNEL, q, k, v, mask, AttentionParams(precision=precision), steps_of_64=True)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    def test_weights_of_masked_scores_are_zero_at_any_scale(self, precision: str) -> None:
        """Where scales are tiny a masked score is not far enough below the others by itself. Keys that are masked are the large ones."""
        q, k, v = (torch.randn(1, 2, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        masked = (torch.arange(500, device="cuda") % 3 == 0)[:, None]
        random_mask = blocky("random", 1, 2, 500, 500)
        mask, large = random_mask & ~masked.T, (k * torch.where(masked, 40.0, 1.0)).bfloat16()
        for scale in (1e-6, 1e-3, 30.0):
            params = AttentionParams(precision=precision, scale=scale)
            agreement.check(KERNEL, q, k, v, random_mask, params, steps_of_64=True)
            agreement.check(KERNEL, q, large, v, mask, params, steps_of_64=True)

    @pytest.mark.parametrize(("dim", "precision"), [(64, "balanced"), (128, "fast"), (128, "accurate")])
    def test_a_threshold_beside_a_mask(self, dim: int, precision: str) -> None:
        q, k, v = (torch.randn(1, 4, 1000, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        q, k = (x + agreement.topics(x.shape, name, 3).bfloat16() for x, name in ((q, "query"), (k, "key")))
        for name in ("causal", "random", "documents", "a prefix"):
            mask, params = (
                blocky(name, 1, 4, 1000, 1000),
                AttentionParams(precision=precision, smoothing="mean"),
            )
            tile = agreement.skip_tile_of(KERNEL, q, k, v, mask, params)
            margins = agreement.margins_of(q, k, mask, params, None, tile)
            threshold = agreement.untied_threshold(margins, random.Random(0))
            params = dataclasses.replace(params, skip_threshold=threshold)
            agreement.check(KERNEL, q, k, v, mask, params, steps_of_64=True)

    @pytest.mark.parametrize(("dim", "precision"), [(64, "balanced"), (128, "fast"), (256, "accurate")])
    def test_the_same_bits_every_time(self, dim: int, precision: str) -> None:
        q, k, v = (torch.randn(1, 16, 4096, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for name in ("random", "blocks here and there"):
            mask = blocky(name, 1, 16, 4096, 4096)
            outs = [torch.empty_like(q) for _ in range(5)]
            for out in outs:
                KERNEL.run(q, k, v, mask, AttentionParams(precision=precision), out, None)
            assert all(torch.equal(out, outs[0]) for out in outs), name

    def test_a_graph_follows_its_mask(self) -> None:
        """Lists are made on the device: another mask in the same memory is another list."""
        q, k, v = (torch.randn(1, 4, 1024, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        mask, out, params = blocky("random", 1, 4, 1024, 1024), torch.empty_like(q), AttentionParams()
        KERNEL.run(q, k, v, mask, params, out, None)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            KERNEL.run(q, k, v, mask, params, out, None)
        for name in (*BLOCKY[:1], *BLOCKY[2:]):
            mask.copy_(blocky(name, 1, 4, 1024, 1024))
            expected = torch.empty_like(q)
            KERNEL.run(q, k, v, mask, params, expected, None)
            graph.replay()
            assert torch.equal(out, expected), name

    def test_masks_in_any_memory(self) -> None:
        """Rows at any bytes, and columns one behind the other."""
        q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for mask in (
            (torch.rand(300, 311, device="cuda") > 0.5)[:, 3:303],
            (torch.rand(300, 300, device="cuda") > 0.5).T,
            (torch.rand(300, 1, device="cuda") > 0.5).expand(300, 300),
        ):
            agreement.check(KERNEL, q, k, v, mask, AttentionParams(), steps_of_64=True)
