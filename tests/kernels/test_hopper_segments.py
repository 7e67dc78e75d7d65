"""Segments in the Hopper kernel: the lists of blocks that are made of ids, and what its tiles make of them, read as hopper/attention.cu
reads it. That needs no GPU: the kernels that look at ids run in Triton's interpreter. What is compiled, here; what it computes, on a
Hopper GPU."""

from __future__ import annotations

import dataclasses
import random
from itertools import product
from pathlib import Path
from typing import Any

import agreement
import pytest
import sass
import torch
from torch import Tensor

pytest.importorskip("triton")

from hopper_reader import Reader, items_of, seen_by

from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.base import Segments
from sage_inductor.kernels.hopper import HopperKernel, compiler_reasons
from sage_inductor.kernels.hopper import compile as compilation
from sage_inductor.kernels.hopper import launch as hopper_launch
from sage_inductor.kernels.hopper.compile import choose_variant
from sage_inductor.kernels.hopper.launch import HopperAttention
from sage_inductor.kernels.triton.block_list import HEADER, segment_list_kernel
from sage_inductor.kernels.triton.segments import segments_kernel, segments_size

KERNEL = HopperKernel()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSORS = 12  # few, so that small problems have whole tiles and tiles in parts


def packed(batch: int, length: int, seed: int = 0) -> Tensor:
    """int32 [batch, length]: documents of 1 to 300 tokens, others in each sequence."""
    draw = random.Random(seed)
    rows = []
    for _ in range(batch):
        ids: list[int] = []
        while len(ids) < length:
            ids += [len(set(ids))] * draw.randint(1, 300)
        rows.append(ids[:length])
    return torch.tensor(rows, dtype=torch.int32)


def layout(name: str, batch: int, q_len: int, kv_len: int) -> Segments:
    torch.manual_seed(q_len + kv_len)
    longest = packed(batch, max(q_len, kv_len))
    if name == "random":
        return Segments(*(torch.randint(-2, 3, (batch, n), dtype=torch.int32) for n in (q_len, kv_len)))
    if name == "an id comes back":
        return Segments(*(ids % 2 for ids in (longest[:, :q_len], longest[:, :kv_len])))
    if name == "descending, of all sizes":
        extremes = torch.tensor([2**31 - 1, 9, 0, -1, -(2**31)], dtype=torch.int32)
        return Segments(*(extremes[longest[:, :n].long() % 5] for n in (q_len, kv_len)))
    found = {
        "packed": (longest[:, :q_len], longest[:, :kv_len]),
        "packed, the last queries": (longest[:, -q_len:], longest[:, :kv_len]),
        "one document": (torch.zeros(batch, q_len), torch.zeros(batch, kv_len)),
        "disjoint": (torch.zeros(batch, q_len), torch.ones(batch, kv_len)),
        "every token its own": (
            torch.arange(q_len).expand(batch, -1),
            torch.arange(kv_len).expand(batch, -1),
        ),
    }[name]
    return Segments(*(ids.int() for ids in found))


LAYOUTS = (
    "packed", "packed, the last queries", "random", "an id comes back", "descending, of all sizes", "one document", "disjoint",
    "every token its own",
)  # fmt: skip
SHAPES = [(2, 3, 330, 700), (1, 2, 65, 5000), (2, 1, 700, 300), (3, 2, 1, 130), (1, 1, 128, 128)]


# --------------------------------------------------------------------------------------------------- the lists


def made(
    segments: Segments,
    stripes_of_tile: int,
    low: int | None,
    high: int | None,
    key_mask: bool = False,
    with_bounds: bool = False,
) -> tuple[Tensor, Tensor]:
    """int32 [batch, tiles, HEADER + blocks], -1 where nothing was written; and, if asked for, the bounds of the rows, int32 [batch, q_len, 2]."""
    q_ids, k_ids = segments
    batch, q_len, kv_len = *q_ids.shape, k_ids.shape[1]
    ranges = torch.empty(segments_size(batch, q_len, kv_len, 64, 128), dtype=torch.int32, device=DEVICE)
    programs = batch * (-(-q_len // 64) + -(-kv_len // 128))
    strides = q_ids.stride(0), k_ids.stride(0), q_ids.stride(1), k_ids.stride(1)
    sizes = {"BLOCK_M": 64, "BLOCK_N": 128}
    segments_kernel[(programs,)](
        q_ids.to(DEVICE), k_ids.to(DEVICE), ranges, batch, q_len, kv_len, *strides, **sizes
    )
    tiles = -(-q_len // (64 * stripes_of_tile))
    entries = torch.full((batch, tiles, HEADER + -(-kv_len // 128)), -1, dtype=torch.int32, device=DEVICE)
    bounds = low or 0, high or 0, low is not None, high is not None
    row_bounds = torch.empty(batch, -(-q_len // 64) * 64, 2, dtype=torch.int32, device=DEVICE)
    stripes = row_bounds.shape[1] // 64 * batch if with_bounds else 0
    segment_list_kernel[(batch * tiles + stripes,)](
        ranges,
        row_bounds,
        entries,
        batch,
        q_len,
        kv_len,
        *bounds,
        key_mask,
        STRIPES=stripes_of_tile,
        ASCENDING=False,
        **sizes,
    )
    return entries.cpu(), row_bounds[:, :q_len].cpu()


def expected(
    segments: Segments, stripes: int, low: int | None, high: int | None
) -> list[tuple[list[int], list[int]]]:
    """For each tile of each sequence in order, the entries of whole blocks and the others, both in ascending order."""
    lists = []
    for q_ids, k_ids in zip(*(ids.tolist() for ids in segments), strict=True):
        for m0 in range(0, len(q_ids), 64 * stripes):
            tile = [q_ids[m : m + 64] for m in range(m0, min(m0 + 64 * stripes, len(q_ids)), 64)]
            last_row = min(m0 + 64 * stripes, len(q_ids)) - 1
            whole, others = [], []
            for n in range(0, len(k_ids), 128):
                keys = k_ids[n : n + 128]
                within = low is None or n + 127 >= m0 + low
                within = within and (high is None or n <= last_row + high)
                if within and any(min(keys) <= max(own) and max(keys) >= min(own) for own in tile):
                    partly = len({*keys, *(i for own in tile for i in own)}) > 1
                    cut = n == 0 or partly or len(keys) < 128
                    cut = cut or (low is not None and n < last_row + low)
                    cut = cut or (high is not None and n + 127 > m0 + high)
                    (others if cut else whole).append(2 * (n // 128) + partly)
            lists.append((whole, others))
    return lists


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stripes", [2, 3])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "low", "high"),
    [
        (640, 1280, None, None),
        (1, 130, None, None),
        (200, 128 * 130 + 5, None, None),  # more ranges than are read at a time
        (450, 900, None, 0),
        (450, 900, -70, 33),
        (900, 300, 500, None),  # the last queries see no key
    ],
)
def test_lists_are_those_of_the_ranges(
    q_len: int, kv_len: int, low: int | None, high: int | None, stripes: int, name: str
) -> None:
    segments = layout(name, 2, q_len, kv_len)
    lists = made(segments, stripes, low, high)[0].flatten(0, 1)
    wanted = expected(segments, stripes, low, high)
    for got, (whole, others) in zip(lists.tolist(), wanted, strict=True):
        assert got[:HEADER] == [len(whole) + len(others), len(whole)]
        assert got[HEADER : HEADER + got[0]] == whole + others[::-1]
        assert got[HEADER] >= 0  # is read even where the list is empty
    if name != "packed":
        return
    masked = made(segments, stripes, low, high, key_mask=True)[0].flatten(0, 1)
    for got, (whole, others) in zip(masked.tolist(), wanted, strict=True):
        assert got[:HEADER] == [len(whole) + len(others), 0]
        assert got[HEADER : HEADER + got[0]] == sorted(whole + others, reverse=True)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(640, 1280), (1, 130), (70, 128 * 130 + 5), (900, 300)])
def test_bounds_of_rows_are_those_of_their_ids(q_len: int, kv_len: int, name: str) -> None:
    segments = layout(name, 2, q_len, kv_len)
    _, found = made(segments, 2, None, None, with_bounds=True)
    for b in range(2):
        keys: dict[int, list[int]] = {}
        for n, key_id in enumerate(segments[1][b].tolist()):
            keys.setdefault(key_id, []).append(n)
        for own, bounds in zip(segments[0][b].tolist(), found[b].tolist(), strict=True):
            of_own = keys.get(own, [])
            together = not of_own or of_own[-1] + 1 - of_own[0] == len(of_own)
            wanted = [of_own[0], of_own[-1] + 1] if of_own else [0, 0]
            assert bounds == (wanted if together else [-1, -1])


# ------------------------------------------------------------------------------------------ what tiles make of them


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "multiprocessors", lambda index: PROCESSORS)


def read_back(
    segments: Segments, shape: tuple[int, int, int, int], params: AttentionParams
) -> tuple[Tensor, Reader]:
    """What all programs let pass of a problem [batch, heads, q_len, kv_len]: int of that shape, how many times each pair."""
    batch, heads, q_len, kv_len = shape
    q = torch.randn(batch, heads, q_len, 64, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(batch, heads, kv_len, 64, device=DEVICE, dtype=torch.bfloat16)
    given = Segments(*(ids.to(DEVICE) for ids in segments))
    call = HopperAttention(q, k, k, None, params, torch.empty_like(q), None, segments=given)
    workspace = torch.full((call.workspace_bytes,), 0x7F, dtype=torch.uint8, device=DEVICE)
    call._look_at_segments(call.stream(), given, workspace)
    reader = Reader(call, workspace)
    return seen_by(reader), reader


@pytest.mark.parametrize("precision", ["fast", "balanced"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_segments_leave_is_read_once(
    processors: None, name: str, shape: tuple[int, int, int, int], precision: str
) -> None:
    """With tiles of two warpgroups and of three."""
    q_ids, k_ids = segments = layout(name, shape[0], *shape[2:])
    seen, reader = read_back(segments, shape, AttentionParams(precision=precision))
    assert torch.equal(seen, (q_ids[:, None, :, None] == k_ids[:, None, None, :]).expand(shape).int())
    assert reader.bounds is not None
    of_queries = reader.bounds.view(shape[0], -1, 2)[:, : shape[2]]
    assert not reader.compares or (of_queries < 0).any()
    if name.startswith("packed"):
        assert not reader.compares
    if name == "random" and shape[2] > 1:
        assert reader.compares
    if name == "disjoint":
        assert reader.steps == len(list(items_of(reader.call)))  # one for each tile, or part of a tile


@pytest.mark.parametrize(
    "band", [{"is_causal": True}, {"is_causal": True, "bottom_right": True}, {"window_left": 90, "window_right": 200}]
)  # fmt: skip
@pytest.mark.parametrize("name", ["packed", "random"])
def test_bounds_hold_beside_segments(processors: None, name: str, band: dict[str, Any]) -> None:
    params = AttentionParams(**band)
    for shape in SHAPES[:3]:
        q_ids, k_ids = segments = layout(name, shape[0], *shape[2:])
        low, high = params.bounds(*shape[2:])
        i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])
        within = (j >= i + (-9999 if low is None else low)) & (j <= i + (9999 if high is None else high))
        seen, reader = read_back(segments, shape, params)
        assert torch.equal(
            seen, ((q_ids[:, None, :, None] == k_ids[:, None, None, :]) & within).expand(shape).int()
        )
        assert reader.numbers.units == 0  # tiles of different lengths are not split


def test_tiles_in_parts_are_meant(processors: None) -> None:
    """So that the cases above do have parts, some of which get no block."""
    _, reader = read_back(layout("packed", 1, 65, 5000), (1, 2, 65, 5000), AttentionParams())
    tiles = [reader.tile(item) for item in items_of(reader.call)]
    assert reader.numbers.units and any(t["begin"] == t["end"] for t in tiles)


def test_other_documents_are_not_read(processors: None) -> None:
    """64 documents of 128 tokens: each tile reads its own block, and compares no ids for it."""
    ids = (torch.arange(8192) // 128)[None].int()
    _, reader = read_back(Segments(ids, ids), (1, 1, 8192, 8192), AttentionParams())
    lists = reader.list[:-1].view(64, HEADER + 64)
    assert lists[:, 0].tolist() == [1] * 64 and lists[:, HEADER].tolist() == list(range(0, 128, 2))


def test_a_mask_of_more_than_keys_beside_segments_goes_to_triton() -> None:
    def problem(mask: Tensor | None) -> AttentionProblem:
        spec = TensorSpec((2, 4, 256, 64), (65536, 16384, 64, 1), torch.bfloat16, torch.device("cuda"))
        ids = TensorSpec((2, 256), (256, 1), torch.int32, torch.device("cuda"))
        given = None if mask is None else TensorSpec.of(mask).as_4d()
        return AttentionProblem(
            spec, spec, spec, given, AttentionParams(), query_segments=ids, key_segments=ids
        )

    refused = "attn_mask of more than keys beside segments (supported: one of both)"
    for mask in (None, torch.ones(2, 1, 1, 256).bool(), torch.ones(256).bool().expand(256, 256)):
        assert refused not in KERNEL.not_supported_reasons(problem(mask))
    for mask in (torch.ones(2, 1, 256, 256).bool(), torch.ones(2, 4, 1, 256).bool()):
        assert refused in KERNEL.not_supported_reasons(problem(mask))
    assert KERNEL.unmeasured_reasons(problem(None)) == [
        'segments (not measured yet: by tune="measure", or kernel="hopper")'
    ]


# --------------------------------------------------------------------------------------------- what is compiled


# Each precision at the head dims of most models, and the widest.
COMPILED = (
    ("segments", 64, "fast"), ("segments", 64, "accurate"),
    ("segments", 128, "fast"), ("segments", 128, "balanced"), ("segments", 128, "accurate"),
    ("segments", 256, "balanced"),
    ("mask_bits", 128, "fast"),
)  # fmt: skip


@pytest.mark.xdist_group("hopper segments, compiled")
@pytest.mark.parametrize(
    ("part", "dim", "precision"),
    [
        pytest.param(*case, marks=[] if case in COMPILED else [pytest.mark.slow])
        for case in (
            *product(("segments",), (64, 96, 128, 256), agreement.PRECISIONS),
            *product(("mask_bits",), (64, 128), agreement.PRECISIONS),
        )
    ],
)
def test_main_loop(part: str, dim: int, precision: str, tmp_path: Path) -> None:
    """The iteration over a whole block keeps all but one word of `fast` in registers, waits for two scales and an entry only, and compares no ids."""
    if reasons := compiler_reasons():
        pytest.skip("; ".join(reasons))
    variant = choose_variant(
        precision, "bf16", dim, dim, has_high=True, q_len=8192, block_list=True, **{part: True}
    )
    result = compilation.compile_variant(variant)
    code = sass.disassemble(result.cubin, tmp_path)
    loop = code.main_loop()
    assert sum("MUFU.EX2" in line for line in loop) >= 64  # it is the one that was meant
    spilled = [line for line in loop if "STL" in line or "LDL" in line]
    assert len(spilled) <= (precision == "fast" and dim >= 128), spilled
    assert sum(line.startswith("LDG") for line in loop) <= 3  # words of bits are loaded by a predicate
    assert code.early_writes() == set() and not compilation.is_serialized(result.log)


# -------------------------------------------------------------------------------------------------- on the GPU


class TestOnHopper:
    """Few variants, as each is compiled: several problems for each."""

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(bool(KERNEL.unavailable_reasons()), reason="needs a Hopper GPU"),
    ]

    def check(
        self,
        name: str,
        shape: tuple[int, int, int, int],
        dim: int,
        params: AttentionParams,
        mask: Tensor | None = None,
    ) -> None:
        batch, heads, q_len, kv_len = shape
        q = torch.randn(batch, heads, q_len, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randn(batch, max(heads // 2, 1), kv_len, dim, device="cuda", dtype=torch.bfloat16)
            for _ in "kv"
        )
        segments = Segments(*(ids.cuda() for ids in layout(name, batch, q_len, kv_len)))
        agreement.check(KERNEL, q, k, v, mask, params, steps_of_64=True, segments=segments)

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("dim", [64, 128])
    def test_agrees_with_the_oracle(self, dim: int, precision: str) -> None:
        params = AttentionParams(precision=precision)
        for name in LAYOUTS:
            self.check(name, (3, 4, 700, 1100), dim, params)
        for q_len, kv_len in ((1, 1), (1, 300), (129, 128), (2000, 65)):
            self.check("packed", (1, 2, q_len, kv_len), dim, params)
        self.check("packed", (1, 2, 200, 8192), dim, params)  # in parts
        self.check("an id comes back", (1, 2, 64, 8000), dim, params)
        for scale in (
            1e-6,
            30.0,
        ):  # the least integer alone does not make a weight zero where scales are tiny
            self.check("random", (1, 2, 500, 500), dim, dataclasses.replace(params, scale=scale))

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    @pytest.mark.parametrize("band", [{"is_causal": True}, {"window_left": 300, "window_right": 20}], ids=str)
    def test_beside_causality_and_windows(self, band: dict[str, Any], precision: str) -> None:
        for name in ("packed", "random", "one document", "disjoint"):
            for shape in ((2, 4, 1000, 1000), (1, 2, 300, 1300), (1, 2, 1300, 300)):
                self.check(name, shape, 128, AttentionParams(precision=precision, **band))

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    def test_beside_a_mask_over_keys(self, precision: str) -> None:
        mask = torch.rand(2, 1, 1, 900, device="cuda") > 0.3
        mask[1, ..., :300] = False
        for name in ("packed", "random"):
            self.check(name, (2, 4, 500, 900), 128, AttentionParams(precision=precision), mask)

    @pytest.mark.parametrize(("dim", "precision"), [(40, "fast"), (96, "accurate"), (256, "fast"), (160, "balanced")])  # fmt: skip
    def test_other_head_dims(self, dim: int, precision: str) -> None:
        for name in ("packed", "random"):
            self.check(name, (2, 4, 330, 515), dim, AttentionParams(precision=precision))

    @pytest.mark.parametrize("precision", agreement.PRECISIONS)
    def test_a_threshold_beside_segments(self, precision: str) -> None:
        q, k, v = (torch.randn(1, 4, 1000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        q, k = (x + agreement.topics(x.shape, name, 3).bfloat16() for x, name in ((q, "query"), (k, "key")))
        params = AttentionParams(precision=precision, smoothing="mean")
        for name in ("packed", "random", "one document"):
            segments = Segments(*(ids.cuda() for ids in layout(name, 1, 1000, 1000)))
            tile = agreement.skip_tile_of(KERNEL, q, k, v, None, params, segments)
            margins = agreement.margins_of(q, k, None, params, segments, tile)
            threshold = agreement.untied_threshold(margins, random.Random(0))
            skipping = dataclasses.replace(params, skip_threshold=threshold)
            agreement.check(KERNEL, q, k, v, None, skipping, steps_of_64=True, segments=segments)

    def test_ids_in_any_memory_and_a_graph_follows_them(self) -> None:
        """Lists are made on the device: other ids in the same memory are another list."""
        q, k, v = (torch.randn(2, 4, 1024, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out, expected, params = torch.empty_like(q), torch.empty_like(q), AttentionParams()
        ids = torch.zeros(1024, 2, dtype=torch.int32, device="cuda").T
        KERNEL.run(q, k, v, None, params, out, None, Segments(ids, ids))  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            KERNEL.run(q, k, v, None, params, out, None, Segments(ids, ids))
        for name in LAYOUTS:
            found = layout(name, 2, 1024, 1024).query.cuda()
            ids.copy_(found)
            KERNEL.run(q, k, v, None, params, expected, None, Segments(found, found))
            graph.replay()
            assert torch.equal(out, expected), name
