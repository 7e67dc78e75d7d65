"""attention.cu executed where there is no GPU (tests/helpers/hopper_emulator), against the oracle: each loop over blocks of keys, and what
comes before and after it. Barriers and asynchronous copies and products take another order in every test, which its name decides."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import agreement
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hopper_emulator import emulated, missing

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams, Segments
from sage_inductor.kernels.device import interpreted
from sage_inductor.kernels.key_value import KeyValueForm
from sage_inductor.kernels.skipping import log2_threshold

MISSING = [*missing(), *([] if interpreted() else ["no interpreter: Triton compiles for a GPU here"])]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=", ".join(MISSING))

KERNEL = kernels.get("hopper")
BLOCK, STRIPE = 128, 64  # keys of a block, queries of a warpgroup
BANDS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "bottom_right": True},
    "window": {"window_left": 190, "window_right": 150},
}
of_precision = pytest.mark.parametrize("precision", kernels.PRECISIONS)


def with_precision(name: str, always: set[tuple[str, Any]], values: Iterable[Any]) -> pytest.MarkDecorator:
    """Each precision with each value, of which those that are not in `always` are slow: g++ takes half a second for a variant."""
    pairs = itertools.product(kernels.PRECISIONS, values)
    marked = [pytest.param(*pair, marks=() if pair in always else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("precision", name), marked)


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulated(processors=3, seed=zlib.crc32(request.node.name.encode())):
        yield


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles are split however short they are, between many multiprocessors."""
    from sage_inductor.kernels.hopper import launch, share

    monkeypatch.setattr(launch, "multiprocessors", lambda index: 11)
    monkeypatch.setattr(share, "_SPLIT_BLOCKS", 1)
    monkeypatch.setattr(share, "_LEAST_BLOCKS", 2)
    share.share.cache_clear()
    yield
    share.share.cache_clear()


def inputs(
    q_len: int, kv_len: int, dim: int = 64, heads: int = 1, kv_heads: int = 1, batch: int = 1,
    dtype: torch.dtype = torch.bfloat16, v_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = torch.randn(batch, heads, q_len, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, size, dtype=dtype) for size in (dim, v_dim or dim))
    return q, k, v


def check(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None, *, out: Tensor | None = None,
    segments: Segments | None = None, **options: Any,
) -> None:  # fmt: skip
    params = AttentionParams(**{"smoothing": "mean", **options})
    agreement.check(KERNEL, *tensors, mask, params, out, steps_of_64=True, segments=segments)


def call_of(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None, lse: bool = True, **options: Any
) -> Any:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q, _, v = tensors
    out = q.new_empty(*q.shape[:3], v.shape[3])
    params = AttentionParams(smoothing="mean", **options)
    return HopperAttention(*tensors, mask, params, out, q.new_empty(q.shape[:3]) if lse else None)


# ----------------------------------------------------------------------------------------------- bands and lengths


@of_precision
@pytest.mark.parametrize("band", BANDS)
def test_bands(precision: str, band: str) -> None:
    """With blocks before, between and behind those that are whole. Tiles of two warpgroups, or mostly of three."""
    options = {"precision": precision, **BANDS[band]}
    if band != "causal":
        check(inputs(250, 900), **options)
    if band != "causal, bottom right":
        check(inputs(700, 650), **options)


@of_precision
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths(precision: str, dim: int) -> None:
    for q_len, kv_len in ((1, 1), (5, 127), (127, 128), (129, 130), (64, 257)):
        check(inputs(q_len, kv_len, dim), precision=precision)


def key_masks(kv_len: int) -> Tensor:
    """Of each sequence another: padding behind, in front, on both sides; a gap nearer to the end, or to the beginning; the first key alone;
    here and there; none. Of blocks at an edge most is masked: a masked key is a zero in 8 bits, and few of those make no difference."""
    n = torch.arange(kv_len)
    rows = [
        n < kv_len - 250,
        n >= 240,
        (n >= 370) & (n < kv_len - 130),
        (n < 530) | (n >= 590),
        (n < 140) | (n >= 256),
        n == 0,
        n % 7 != 3,
        n < 0,
    ]
    return torch.stack(rows)[:, None, None]


@with_precision(
    "band",
    {("fast", "none"), ("balanced", "none"), ("accurate", "none")}
    | {("fast", "window"), ("balanced", "causal, bottom right"), ("accurate", "window")},
    BANDS,
)
def test_masks_over_keys(precision: str, band: str) -> None:
    mask = key_masks(900)
    check(inputs(140, 900, batch=len(mask)), mask, precision=precision, **BANDS[band])


# -------------------------------------------------------------------------------------------------- tiles and programs


@with_precision(
    "dim",
    {("fast", 64), ("fast", 256), ("balanced", 64), ("balanced", 128), ("accurate", 64)},
    (64, 128, 256),
)
def test_tiles_in_parts(in_parts: None, precision: str, dim: int) -> None:
    dtype = torch.float32 if dim == 128 else torch.bfloat16
    tensors = inputs(140, 1100, dim, heads=2, dtype=dtype)
    assert call_of(tensors, precision=precision).split_tiles
    check(tensors, precision=precision)


def test_warpgroups() -> None:
    """What `test_bands` and `test_tiles_in_parts` run: products that go on during the next softmax, and warpgroups that take turns."""
    found = {
        (precision, dim, q_len): call_of(inputs(q_len, 600, dim), precision=precision).variant
        for precision in kernels.PRECISIONS
        for dim, q_len in ((64, 250), (64, 700), (128, 140), (256, 140))
    }
    assert [variant.consumers for variant in found.values()] == [2] * 4 + [2, 3, 3, 3] + [2, 3, 2, 2]
    assert {variant.pieces for (_, dim, _), variant in found.items() if dim == 256} == {2}


@of_precision
def test_programs_of_many_tiles(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several heads, the longest first, for two multiprocessors."""
    monkeypatch.setattr("sage_inductor.kernels.triton.launch.TOGETHER_BYTES", 2 * 290 * 2 * 64)
    check(inputs(400, 290, heads=6, kv_heads=2, batch=2), precision=precision, is_causal=True)


@pytest.mark.parametrize(
    ("precision", "dim", "v_dim", "dtype"),
    [
        ("balanced", 128, 128, torch.bfloat16),  # three warpgroups, scores and product in the same registers
        ("balanced", 96, 96, torch.float16),
        ("fast", 96, 96, torch.bfloat16),  # the output in two passes
        ("accurate", 128, 128, torch.float16),
        ("accurate", 192, 192, torch.bfloat16),
        ("fast", 64, 256, torch.float16),  # V in two pieces
        ("fast", 136, 40, torch.bfloat16),
        ("balanced", 32, 32, torch.float32),
        ("accurate", 64, 64, torch.float32),
        ("fast", 128, 128, torch.float32),
    ],
)
def test_head_dims_and_dtypes(precision: str, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    check(inputs(330, 400, dim, v_dim=v_dim, dtype=dtype), precision=precision, is_causal=True)


@pytest.mark.parametrize("extra", [2, 1])
@pytest.mark.parametrize(("precision", "dim"), [("fast", 64), ("balanced", 256)])
def test_output_whose_rows_lie_anywhere(precision: str, dim: int, extra: int) -> None:
    """At multiples of four bytes they are written in smaller pieces, elsewhere copied."""
    out = torch.empty(1, 1, 150, dim + extra, dtype=torch.bfloat16)[..., :dim]
    check(inputs(150, 200, dim), out=out, precision=precision)


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("precision", ["fast", "balanced"])
@pytest.mark.parametrize("band", ["none", "causal, bottom right", "window"])
def test_attention_sink(precision: str, band: str) -> None:
    """The first key, whose block comes last in some loops, has most of the weight."""
    tensors = inputs(250, 500)
    for data, name in zip(tensors, ("query", "key", "value"), strict=True):
        agreement.plant_sink(data, name, seed=1)
    check(tensors, precision=precision, **BANDS[band])


@of_precision
def test_maxima_that_keep_growing(precision: str) -> None:
    q, k, v = inputs(140, 900)
    k *= torch.linspace(0.1, 4, 900)[:, None].bfloat16()
    v[:, :, 300] *= 3000.0 if precision == "fast" else 1.0  # a block with a unit of its own
    check((q, k, v), precision=precision)


@of_precision
def test_non_finite_inputs_show(precision: str) -> None:
    q, k, v = inputs(140, 500)
    for inputs_with_nan in ((q, _with_nan(k), v), (q, k, _with_nan(v))):
        out, _ = agreement.run(KERNEL, *inputs_with_nan, None, AttentionParams(precision=precision))
        assert out.isnan().any(-1).all()
    out, _ = agreement.run(KERNEL, _with_nan(q), k, v, None, AttentionParams(precision=precision))
    rows = out.isnan().any(-1).flatten()
    assert rows.nonzero().flatten().tolist() == [137]


def _with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0, min(400, tensor.shape[2] - 3), 3] = math.nan
    return tensor


# ------------------------------------------------------------------------------------------------- what is left out


def planted(
    q_len: int, kv_len: int, dim: int = 64, heads: int = 1, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Each 64 queries and each 128 keys are about one of three topics in turn, and scores are higher by 6 where the two are the same.
    Channel n of value is 1 for keys of block n and others are 0: an output says which blocks count."""
    q, k, v = inputs(q_len, kv_len, dim, heads, batch=batch, dtype=torch.float32)
    for tensor, run in ((q, STRIPE), (k, BLOCK)):
        topic = torch.arange(tensor.shape[2]) // run % 3
        tensor *= 0.5
        tensor += (6 * dim**0.5) ** 0.5 * torch.nn.functional.one_hot(topic, dim)
    n = torch.arange(kv_len)
    v = torch.zeros_like(v)
    v[:, :, n, n // BLOCK] = 1.0
    return q, k, v


LENGTHS = {"none": (300, 900), "causal": (520, 560), "causal, bottom right": (300, 900), "window": (300, 900)}


def check_left_out(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None, segments: Segments | None = None, **options: Any
) -> None:  # fmt: skip
    """The tiles that the oracle leaves out, some of them, and no others. What is left agrees with it for normal values, too."""
    q, k, v = tensors
    params = AttentionParams(smoothing="mean", **options)
    tile = agreement.skip_tile_of(KERNEL, q, k, v, mask, params, segments)
    margins = agreement.margins_of(q, k, mask, params, segments, tile)
    threshold = agreement.untied_threshold(margins, random.Random(0))
    assert threshold > 0
    params = replace(params, skip_threshold=threshold)
    kept = margins >= log2_threshold(threshold)
    assert 0 < int(kept.sum()) < int((margins > -math.inf).sum())
    if params.precision == "accurate":  # in 8 bits something of V's mean is in every output
        weights, _ = agreement.run(KERNEL, q, k, v, mask, params, None, segments)
        rows = torch.nn.functional.pad(weights, (0, 0, 0, -q.shape[2] % tile.rows))
        rows = rows.unflatten(2, (-1, tile.rows)).amax(3)
        assert torch.equal(rows[..., : kept.shape[3]] > 0, kept)
    agreement.check(KERNEL, q, k, torch.randn_like(v), mask, params, steps_of_64=True, segments=segments)


@with_precision(
    "band",
    set(itertools.product(kernels.PRECISIONS, BANDS)) - {("fast", "causal"), ("balanced", "causal")},
    BANDS,
)
def test_a_threshold(precision: str, band: str) -> None:
    check_left_out(planted(*LENGTHS[band]), precision=precision, **BANDS[band])


@of_precision
def test_a_threshold_beside_a_mask_over_keys(precision: str) -> None:
    mask = key_masks(900)[:5]
    check_left_out(planted(140, 900, batch=5), mask, precision=precision)
    check(inputs(140, 900, batch=5, dtype=torch.float32), mask, precision=precision, skip_threshold=2.0**-40)


@pytest.mark.parametrize(("precision", "dim"), [("fast", 64), ("balanced", 64), ("accurate", 128)])
def test_a_threshold_where_tiles_are_in_parts(in_parts: None, precision: str, dim: int) -> None:
    tensors = planted(140, 1500, dim)
    assert call_of(tensors, precision=precision, skip_threshold=0.1).split_tiles
    check_left_out(tensors, precision=precision)


@with_precision(
    "band",
    {
        ("fast", "none"), ("fast", "window"), ("balanced", "none"), ("balanced", "causal"), ("accurate", "causal, bottom right"),
        ("accurate", "window"),
    },
    BANDS,
)  # fmt: skip
def test_a_sample_decides(precision: str, band: str) -> None:
    check_left_out(planted(*LENGTHS[band]), precision=precision, skip_by="sample", **BANDS[band])


def test_a_sample_decides_about_parts_and_beside_a_mask(in_parts: None) -> None:
    check_left_out(planted(140, 1500), precision="fast", skip_by="sample")
    check_left_out(planted(140, 900, batch=5), key_masks(900)[:5], precision="balanced", skip_by="sample")


@of_precision
@pytest.mark.parametrize("skip_threshold", [0.0, 0.2])
def test_the_same_bits_in_any_order(precision: str, skip_threshold: float) -> None:
    """Which warpgroup comes first, and when what is asynchronous happens, changes nothing."""
    q, k, _ = (tensor.bfloat16() for tensor in planted(250, 700))
    params = AttentionParams(precision=precision, smoothing="mean", skip_threshold=skip_threshold)
    v = torch.randn_like(k)
    call = call_of((q, k, v), precision=precision, skip_threshold=skip_threshold)
    workspace = call.quantize(q, k, v, None)
    found = []
    for seed in range(12):
        out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan)
        with emulated(processors=3, seed=seed):
            call.attend(workspace, None, out, lse)
        found.append((out, lse))
    assert agreement.disagreements(*found[0], q, k, v, None, params, steps_of_64=True) == []
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))


# ----------------------------------------------------------------------------------------------- masks and segments


def masks_by_query(heads: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return {
        "random": torch.rand(1, heads, q_len, kv_len) > 0.6,
        "documents": (i // 170 == j // 170)[None, None],
        "a prefix of each head": ((j < 300) | (i >= j)).expand(1, heads, -1, -1)
        & (j % 3 < 3 - torch.arange(heads)[None, :, None, None]),
        "nothing for some": ((i % 5 > 0) & (j >= 256) & (j < 500))[None, None],
    }


@of_precision
@pytest.mark.parametrize("dim", [64, 128])
def test_masks_of_a_row_per_query(precision: str, dim: int) -> None:
    tensors = inputs(250, 600, dim, heads=2)
    masks = masks_by_query(2, 250, 600)
    for name in masks if dim == 64 else ["random", "documents"]:
        check(tensors, masks[name], precision=precision)


@of_precision
def test_masks_of_a_row_per_query_beside_others(precision: str) -> None:
    mask = masks_by_query(1, 300, 700)["documents"]
    check(inputs(300, 700), mask, precision=precision, is_causal=True)
    check_left_out(planted(300, 700), masks_by_query(1, 300, 700)["random"], precision=precision)


@of_precision
def test_masks_of_a_row_per_query_in_parts(in_parts: None, precision: str) -> None:
    tensors, mask = inputs(140, 1100), masks_by_query(1, 140, 1100)["random"]
    assert call_of(tensors, mask, precision=precision).split_tiles
    check(tensors, mask, precision=precision)


@with_precision(
    "band",
    {("fast", "none"), ("balanced", "none"), ("accurate", "none"), ("fast", "window")},
    ("none", "window"),
)
def test_segments(precision: str, band: str) -> None:
    tensors = inputs(300, 650, batch=2)
    ids = [torch.arange(n) for n in (300, 650)]
    for segments in (
        Segments(*(torch.stack([n // 130, n // 64 % 3]).int() for n in ids)),
        Segments(*(torch.stack([n // 256, n * 0 + len(n)]).int() for n in ids)),  # the second sees nothing
    ):
        check(tensors, segments=segments, precision=precision, **BANDS[band])


# ------------------------------------------------------------------------------------------------ halves, random problems


@of_precision
def test_prequantized(precision: str) -> None:
    """The same bits as the whole call."""
    from sage_inductor.kernels.hopper.launch import HopperKeyValueQuantization, PrequantizedHopperAttention

    q, k, v = inputs(140, 300, 40, heads=2, batch=2, v_dim=24)
    params = AttentionParams(precision=precision, smoothing="both")
    expected = agreement.run(KERNEL, q, k, v, None, params)
    form = KeyValueForm(2, 1, 300, 40, 24, q.dtype, precision, "both")
    packed = HopperKeyValueQuantization(k, v, q, form).run(k, v, q)
    out, lse = (torch.full_like(tensor, math.nan) for tensor in expected)
    PrequantizedHopperAttention(q, form, 300, params, out, lse).run(q, packed, out, lse)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def faults(seeds: Iterable[int]) -> dict[int, list[str]]:
    """Of the sweep's problems, those that went wrong."""
    found = {seed: agreement.case_faults(KERNEL, agreement.draw_case(seed, KERNEL)) for seed in seeds}
    return {seed: texts for seed, texts in found.items() if texts}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 4000, 200))
def test_random_problems(first: int) -> None:
    assert faults(range(first, first + 200, 13)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4000, 8000, 200))
def test_random_problems_in_parts(in_parts: None, first: int) -> None:
    assert faults(range(first, first + 200, 13)) == {}
