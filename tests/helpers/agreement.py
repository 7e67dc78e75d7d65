"""When a kernel agrees with the oracle (sage_inductor.kernels.reference.algorithm), and random problems to see it on.

Shared by the kernels' tests and by sweep.py. Every tensor that a kernel is given lies inside a larger buffer of NaN:
a read outside it shows in the output, a write outside it, or to an input, in the buffer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sage_inductor.kernels.base import AttentionParams, AttentionProblem, Kernel, Segments, TensorSpec
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.skipping import SAMPLED_TILE, SKIP_TILE, SkipTile, log2_threshold
from sage_inductor.kernels.smoothing import EQUALISING, SMOOTHINGS, resolved_smoothing
from sage_inductor.measurement.ground_truth import (
    DOCUMENTED,
    EPS,
    LARGEST_STEP,
    LSE_TOLERANCE,
    float64_attention,
)
from sage_inductor.measurement.metrics import relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("fast", "balanced", "accurate")
# Kernel and oracle take the same steps and differ where a quotient lies so near a rounding boundary that the
# last bit of float32 decides. Rounding a value costs step / sqrt(12) on average and a flip costs a step, so
# if one in a hundred flips, they differ by sqrt(12 / 100) of the quantisation error itself. Measured: a third
# of that.
FLIPS = math.sqrt(12 / 100)
TIE = LSE_TOLERANCE * math.log2(
    math.e
)  # how near (log2) to a threshold a tile may be left out by one kernel and not by another


def run(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    params: AttentionParams = AttentionParams(smoothing="mean"),
    out: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; neither starts with a value that could pass for a result, and the inputs stay as they
    were."""
    kept = [t.clone() for t in (q, k, v)]
    out = q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out
    out.fill_(math.nan)
    lse = torch.full(q.shape[:3], math.nan, device=q.device)
    kernel.run(q, k, v, mask, params, out, lse, *([] if segments is None else [segments]))
    for tensor, before in zip((q, k, v), kept, strict=True):
        assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
    return out, lse


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None = None,
    skip_tile: SkipTile | None = None,
) -> tuple[Tensor, Tensor]:
    bounds = params.bounds(q.shape[2], k.shape[2])
    return reference.attention(
        q, k, v, mask, bounds=bounds, scale=params.scale, precision=params.precision, smoothing=params.smoothing,
        segments=segments, skip_threshold=params.skip_threshold, skip_tile=skip_tile, skip_by=params.skip_by,
    )  # fmt: skip


def skip_tile_of(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None = None,
    varlen: tuple[int, int, int] | None = None,
) -> SkipTile:
    """The tiles that `kernel` leaves out of this call."""
    params = replace(params, skip_threshold=params.skip_threshold or 0.5)  # which one makes no difference
    if kernel.name == "hopper":
        from sage_inductor.kernels.hopper.launch import HopperAttention

        out = q.new_empty(*q.shape[:3], v.shape[3])
        return HopperAttention(q, k, v, mask, params, out, None, segments=segments).skip_tile
    if params.skip_by == "sample":
        return SAMPLED_TILE
    if kernel.name != "triton":
        return SKIP_TILE
    from sage_inductor.kernels.triton.launch import TritonAttention

    call = TritonAttention(q, k, v, mask, params, torch.empty_like(v), None, varlen=varlen, segments=segments)
    return call.skip_tile


def margins_of(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None = None,
    skip_tile: SkipTile | None = None,
) -> Tensor:
    """The oracle's `tile_margins`."""
    return reference.tile_margins(
        q, k, mask, bounds=params.bounds(q.shape[2], k.shape[2]), scale=params.scale, smoothing=params.smoothing,
        segments=segments, skip_tile=skip_tile, skip_by=params.skip_by,
    )  # fmt: skip


def untied_threshold(margins: Tensor, rng: random.Random) -> float:
    """A skip_threshold that some of these tiles lie below and that none lies near, so that no rounding decides; 0 where there is
    none. A flip of Q or K moves a score by a 127th of its part at most."""
    found = margins[(margins > -24) & (margins < 0)].double().sort().values.tolist()
    if not found:
        return 0.0
    gaps = [(low, high) for low, high in pairwise([*found, 0.0]) if high - low > 2 * TIE]
    return float(2 ** (sum(rng.choice(gaps)) / 2)) if gaps else 0.0


def disagreements(
    got: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    params: AttentionParams = AttentionParams(smoothing="mean"),
    steps_of_64: bool = False,
    segments: Segments | None = None,
    skip_tile: SkipTile | None = None,
) -> list[str]:
    """What of a kernel's output and LSE lies beyond the bounds around the oracle's; each with its value.

    `steps_of_64`: the launch configuration may take 64 keys at a time, as it does for masks that differ from
    query to query. P is then rounded against other maxima than the oracle's. Two roundings that know nothing of
    each other, each within the documented error, differ by sqrt(2) of it.
    """
    params = replace(params, smoothing=resolved_smoothing(params.smoothing, SMOOTHINGS))
    expected, expected_lse = oracle(q, k, v, mask, params, segments, skip_tile)
    left_out = None
    if params.skip_threshold:
        by_default = SAMPLED_TILE if params.skip_by == "sample" else SKIP_TILE
        left_out = left_out_of(q, k, mask, params, segments, skip_tile or by_default)
    scatter, largest = _rounded(q, k, v, mask, params, segments, left_out)
    steps_of_64 = steps_of_64 or (mask is not None and mask.dim() > 1 and mask.shape[-2] > 1)
    # So do those in a list's order: blocks that are cut come last.
    steps_of_64 = steps_of_64 or (params.skip_threshold > 0 and params.skip_by == "sample")
    # So do those of channels that were evened by other factors.
    steps_of_64 = steps_of_64 or _factor_is_open(q, k, mask, params)
    eps = EPS[q.dtype]
    if got.isnan().any():
        return [f"{int(got.isnan().sum())} of {got.numel()} outputs are NaN"]
    norm = max(float(expected.double().norm()), torch.finfo(torch.float64).tiny)
    finite = ~expected_lse.isinf()
    figures = {
        "relative L2": (
            relative_l2(got, expected),
            (math.sqrt(2) if steps_of_64 else FLIPS) * DOCUMENTED[params.precision] * scatter / norm + eps,
        ),
        "largest error": (
            (got.double() - expected.double()).abs().max().item(),
            # and each of the two is rounded to its dtype
            LARGEST_STEP * largest + 2 * eps * expected.double().abs().max().item(),
        ),
        "rows whose LSE is infinite in one only": (
            int((lse.isinf() != expected_lse.isinf()).sum()),
            0,
        ),
    }
    if finite.any():
        # NaN fails every comparison below, as it should.
        figures["LSE"] = (
            (lse - expected_lse)[finite].abs().max().item(),
            max(LSE_TOLERANCE, 2 * _score_step(q, k, mask, params)),
        )
    return [
        f"{name} {value:.5g} (bound {bound:.5g})"
        for name, (value, bound) in figures.items()
        if not value <= bound
    ]


def _score_step(q: Tensor, k: Tensor, mask: Tensor | None, params: AttentionParams) -> float:
    """By how much a score moves, at most, where the last bits of float32 decide a step of Q or of K: a 127th of the largest
    product of two channels. Of normal inputs that is less than LSE_TOLERANCE; of outliers it is what a query sees that has a
    few keys."""
    used = None if mask is None else reference.used_keys(mask.expand(*q.shape[:3], k.shape[2]))
    smooth = reference.smoothing_of(k, params.smoothing, q, used)
    counted = smooth.key(k) if used is None else smooth.key(k).where(used[:, None, :, None], 0.0)
    largest = [torch.nan_to_num(x).abs().amax().item() for x in (smooth.query(q), counted)]
    scale = q.shape[-1] ** -0.5 if params.scale is None else abs(params.scale)
    return scale * largest[0] * largest[1] / 127


def left_out_of(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None,
    skip_tile: SkipTile,
) -> Tensor:
    """What the oracle leaves out, bool `[batch, heads, q_len, kv_len]`."""
    found = margins_of(q, k, mask, params, segments, skip_tile) < log2_threshold(params.skip_threshold)
    rows = found.repeat_interleave(skip_tile.rows, 2)[:, :, : q.shape[2]]
    return rows.repeat_interleave(skip_tile.keys, 3)[..., : k.shape[2]]


def without(mask: Tensor | None, left_out: Tensor) -> Tensor:
    """`mask`, and nothing of what is left out."""
    if mask is None or mask.dtype == torch.bool:
        return ~left_out if mask is None else ~left_out & mask
    return mask.expand(left_out.shape).masked_fill(left_out, -math.inf)


def _factor_is_open(q: Tensor, k: Tensor, mask: Tensor | None, params: AttentionParams) -> bool:
    """Whether the last bits of float32 decide which half octave evens a channel."""
    if params.smoothing not in EQUALISING:
        return False
    used = None if mask is None else reference.used_keys(mask.expand(*q.shape[:3], k.shape[2]))
    ratio = reference.smoothing_of(k, params.smoothing, q, used).half_octaves
    assert ratio is not None
    return bool(((ratio - ratio.floor() - 0.5).abs() < 1e-4).any())


def _rounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    segments: Segments | None = None,
    left_out: Tensor | None = None,
) -> tuple[float, float]:
    """What rounding P and V is relative to: the root of the sum of P^2 (V - m)^2, and the largest |V - m| that some
    query sees, where m is what the oracle subtracts from V, which no rounding touches.

    The roundings at different keys know nothing of each other, so what they make of an output adds up in squares:
    the documented error times sqrt(sum P^2 (V - m)^2). For normal V, to which the documented error refers, that is
    what the output itself adds up to; with a mean in V, or with one subtracted, it is not.
    """
    batch, heads, _, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    full = None if mask is None else mask.expand(*q.shape[:3], keys)
    mean = reference.quantize_kv(k, v, params.precision, reference.used_keys(full)).v_mean
    identity = torch.eye(keys, device=q.device).expand(batch, kv_heads, keys, keys)
    mask = mask if left_out is None else without(mask, left_out)
    weights, _ = float64_attention(q, k, identity, mask, params, segments=segments)
    weights = weights.view(batch, kv_heads, -1, keys)
    seen = weights.amax(2)[..., None] > 0
    deviation = torch.where(seen, v.double() - mean, 0.0)
    scatter = (weights.square() @ deviation.square()).sum().sqrt()
    return scatter.item(), deviation.abs().max().item()


def check(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    params: AttentionParams = AttentionParams(smoothing="mean"),
    out: Tensor | None = None,
    steps_of_64: bool = False,
    segments: Segments | None = None,
) -> None:
    """The kernel agrees with the oracle, element by element."""
    got, lse = run(kernel, q, k, v, mask, params, out, segments)
    tile = skip_tile_of(kernel, q, k, v, mask, params, segments) if params.skip_threshold else SKIP_TILE
    assert disagreements(got, lse, q, k, v, mask, params, steps_of_64, segments, tile) == []


# --------------------------------------------------------------------------------------------------- random

SEEDS_PER_VARIANT = 25  # consecutive seeds share what kernels are compiled for
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 512)
GUARD = 256  # elements of NaN before and behind


@dataclass(frozen=True)
class Layout:
    """`order`: HND, NHD, or HDN (head_dim outside the sequence); `extra` elements before each innermost
    row."""

    order: str
    extra: int


@dataclass(frozen=True)
class Variant:
    """What decides which code runs; compiled once for SEEDS_PER_VARIANT problems."""

    precision: str
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    layouts: tuple[Layout, Layout, Layout, Layout]  # query, key, value, output
    mask: str  # none, bool, additive, lowest (additive, the most negative number instead of -inf)
    mask_dims: tuple[bool, bool, bool]  # whether it differs between batches, heads, queries
    is_causal: bool
    bottom_right: bool
    left: bool  # whether there is a window
    right: bool
    varlen: bool
    segments: bool = False
    smoothing: str = "mean"
    skips: bool = False
    sampled: bool = False  # and a sample of the queries decides what


@dataclass(frozen=True)
class Case:
    """One problem; its numbers come from `seed` too."""

    seed: int
    variant: Variant
    batch: int
    kv_heads: int
    groups: int
    q_len: int
    kv_len: int
    params: AttentionParams
    biased: bool  # a bias on K's channels and V's: what smoothing and channel scales are for
    outliers: bool = False  # channels of K and Q that stand out: what evening is for
    sink: bool = False  # the first key draws most of the weight, and has little value


def draw_variant(rng: random.Random, varlen: bool) -> Variant:
    varlen = varlen and rng.random() < 0.1
    layouts = [Layout(rng.choice(["HND", "NHD", "NHD", "HDN"]), rng.choice([0, 0, 3, 8])) for _ in range(4)]
    return Variant(
        precision=rng.choice(PRECISIONS),
        dtype=rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        head_dim=rng.choice([16, 40, 64, 64, 72, 96, 128, 128, 128, 136, 160, 192, 256]),
        value_head_dim=rng.choice([0, 0, 0, 32, 64, 80, 128, 200, 256]),  # 0: as head_dim
        layouts=(layouts[0], layouts[1], layouts[2], layouts[3]),
        mask="none" if varlen else rng.choice(["none", "none", "bool", "additive", "lowest"]),
        mask_dims=(rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5),
        is_causal=rng.random() < 0.3,
        bottom_right=rng.random() < 0.5,
        left=rng.random() < 0.3,
        right=rng.random() < 0.3,
        varlen=varlen,
    )


def draw_case(seed: int, kernel: Kernel) -> Case:
    """The problem number `seed` of those that `kernel` supports."""
    varlen = kernel.name == "triton"  # the one that has such an entry
    rng = random.Random(seed // SEEDS_PER_VARIANT)
    # From a stream of their own, so that the problems that were drawn before they came stay what they were.
    more = random.Random(-1 - seed // SEEDS_PER_VARIANT)
    segments = kernel.takes_segments and more.random() < 0.15
    smoothing = more.choice(["mean", *SMOOTHINGS]) if len(kernel.smoothings) > 1 else "mean"
    skips = kernel.skips and more.random() < 0.25
    sampled = skips and more.random() < 0.5
    for _ in range(10_000):
        variant = draw_variant(rng, varlen)
        variant = replace(variant, segments=segments and not variant.varlen, smoothing=smoothing, skips=skips)
        of_keys = variant.mask == "none" or not any(variant.mask_dims[1:])
        variant = replace(variant, sampled=sampled and of_keys and not (segments or variant.varlen))
        case = _draw_sizes(seed, variant)
        if not kernel.not_supported_reasons(_problem(_draw_sizes(0, variant))):
            return case
    raise ValueError(f"{kernel.name} supports none of 10,000 random variants")


def _draw_sizes(seed: int, variant: Variant) -> Case:
    rng = random.Random(seed)

    def length(most: int) -> int:
        return rng.choice(EDGES) if rng.random() < 0.3 else rng.randint(1, most)

    q_len, kv_len = length(260), length(520)
    params = AttentionParams(
        is_causal=variant.is_causal,
        bottom_right=variant.bottom_right,
        window_left=rng.randint(0, 200) if variant.left else -1,
        window_right=rng.randint(0, 200) if variant.right else -1,
        scale=rng.choice([None, None, 0.1, -0.1]),
        precision=variant.precision,
        smoothing=variant.smoothing,
        skip_by="sample" if variant.sampled else "scores",
    )
    return Case(
        seed, variant, rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3]), q_len, kv_len,
        params, rng.random() < 0.3, variant.smoothing != "mean" and rng.random() < 0.5,
        # From a stream of its own, so that the problems that were drawn before there were sinks stay what they were.
        sink=random.Random(f"sink {seed}").random() < 0.2,
    )  # fmt: skip


def _shapes(case: Case) -> dict[str, tuple[int, int, int, int]]:
    variant = case.variant
    value_dim = variant.value_head_dim or variant.head_dim
    heads = case.kv_heads * case.groups
    return {
        "query": (case.batch, heads, case.q_len, variant.head_dim),
        "key": (case.batch, case.kv_heads, case.kv_len, variant.head_dim),
        "value": (case.batch, case.kv_heads, case.kv_len, value_dim),
        "out": (case.batch, heads, case.q_len, value_dim),
    }


def _problem(case: Case) -> AttentionProblem:
    specs = {}
    for (name, shape), layout in zip(_shapes(case).items(), case.variant.layouts, strict=True):
        tensor = Guarded(shape, layout, case.variant.dtype, "meta").tensor
        specs[name] = TensorSpec(
            shape, tensor.stride(), tensor.dtype, torch.device(DEVICE, 0 if DEVICE == "cuda" else None)
        )
    mask = None
    if case.variant.mask != "none":
        shape = _mask_shape(case)
        dtype = torch.bool if case.variant.mask == "bool" else case.variant.dtype
        mask = TensorSpec(shape, torch.empty(shape, device="meta").stride(), dtype, specs["query"].device)
    problem = AttentionProblem(
        specs["query"], specs["key"], specs["value"], mask, case.params, return_lse=True
    )
    if not case.variant.segments:
        return problem
    ids = [
        TensorSpec((case.batch, length), (length, 1), torch.int32, specs["query"].device)
        for length in (case.q_len, case.kv_len)
    ]
    return replace(problem, query_segments=ids[0], key_segments=ids[1])


class Guarded:
    """`tensor`, of a shape and layout, inside a `buffer` of NaN (of True for booleans)."""

    def __init__(
        self, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, device: str = DEVICE
    ) -> None:
        order = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3), "HDN": (0, 1, 3, 2)}[layout.order]
        sizes = [shape[dim] for dim in order]
        sizes[-1] += layout.extra
        fill: Any = True if dtype == torch.bool else math.nan
        size = math.prod(sizes)
        self.buffer = torch.full((size + 2 * GUARD,), fill, dtype=dtype, device=device)
        inside = self.buffer[GUARD : GUARD + size].view(sizes)[..., layout.extra :]
        self.tensor = inside.permute([order.index(dim) for dim in range(4)])
        self.kept = self.buffer.clone()

    def fill(self, data: Tensor) -> Tensor:
        self.tensor.copy_(data)
        self.kept = self.buffer.clone()
        return self.tensor

    def unchanged(self) -> bool:
        return torch.equal(self.buffer.view(torch.uint8), self.kept.view(torch.uint8))


def _mask_shape(case: Case) -> tuple[int, ...]:
    full = (case.batch, case.kv_heads * case.groups, case.q_len)
    return (
        *(size if differs else 1 for size, differs in zip(full, case.variant.mask_dims, strict=True)),
        case.kv_len,
    )


def _make_mask(case: Case, rng: random.Random) -> Guarded | None:
    kind = case.variant.mask
    if kind == "none":
        return None
    shape = _mask_shape(case)
    dtype = torch.bool if kind == "bool" else case.variant.dtype
    guarded = Guarded(shape, Layout("HND", rng.choice([0, 0, 5])), dtype)
    attended = torch.rand(shape, device=DEVICE) > rng.choice([0.1, 0.6, 0.95])
    # A band, as windows and causal masks have: most blocks are ruled out or left whole.
    if case.variant.mask_dims[2] and rng.random() < 0.3:
        offset = torch.arange(shape[-1], device=DEVICE) - torch.arange(shape[-2], device=DEVICE)[:, None]
        low, high = sorted(rng.randint(-case.kv_len, case.kv_len) for _ in range(2))
        attended = ((offset >= low) & (offset <= high)).expand(shape).clone()
    if rng.random() < 0.3:  # padding: whole blocks of keys that no query attends to
        attended[..., rng.randint(1, case.kv_len) :] = False
    if kind != "bool":
        hidden = -math.inf if kind == "additive" else torch.finfo(dtype).min
        bias = torch.randn(shape, device=DEVICE) if rng.random() < 0.7 else torch.zeros(shape, device=DEVICE)
        attended = torch.where(attended, bias, hidden)
    guarded.fill(attended)
    return guarded


def case_faults(kernel: Kernel, case: Case) -> list[str]:
    """What is wrong with the kernel's answer to `case`; empty when nothing is."""
    torch.manual_seed(case.seed)
    rng = random.Random(case.seed + 1)
    guarded = {
        name: Guarded(shape, layout, case.variant.dtype)
        for (name, shape), layout in zip(_shapes(case).items(), case.variant.layouts, strict=True)
    }
    if case.variant.varlen:
        return _varlen_faults(case, rng)
    for name in ("query", "key", "value"):
        guarded[name].fill(_data(guarded[name].tensor.shape, name, case))
    mask = _make_mask(case, rng)
    q, k, v, out = (guarded[name].tensor for name in ("query", "key", "value", "out"))
    mask_tensor = None if mask is None else mask.tensor
    segments = _make_segments(case, rng) if case.variant.segments else None
    lse = torch.full(q.shape[:3], math.nan, device=DEVICE)
    params, tile = case.params, SKIP_TILE
    if case.variant.skips:
        tile = skip_tile_of(kernel, q, k, v, mask_tensor, params, segments)
        margins = margins_of(q, k, mask_tensor, params, segments, tile)
        params = replace(params, skip_threshold=untied_threshold(margins, rng))
    kernel.run(q, k, v, mask_tensor, params, out, lse, *([] if segments is None else [segments]))
    faults = disagreements(
        out, lse, q, k, v, mask_tensor, params,
        steps_of_64=kernel.oracle_distance > 1 or segments is not None, segments=segments, skip_tile=tile,
    )  # fmt: skip
    return faults + _side_effects(guarded | ({} if mask is None else {"attn_mask": mask}))


def _make_segments(case: Case, rng: random.Random) -> Segments:
    """Ids that count up, as those of packed sequences, or come in any order."""
    most = rng.choice([1, 3, 12])
    query, key = (
        torch.randint(-1, most, (case.batch, length), dtype=torch.int32, device=DEVICE)
        for length in (case.q_len, case.kv_len)
    )
    if rng.random() < 0.7:
        query, key = query.sort(-1).values, key.sort(-1).values
    return Segments(query, key)


def _data(shape: tuple[int, ...], name: str, case: Case) -> Tensor:
    data, biased = torch.randn(shape, device=DEVICE), case.biased
    if case.outliers and name != "value":
        standing_out = slice(case.seed % 5, None, 1 + case.seed % 16)
        data[..., standing_out] *= 20.0 if name == "key" else 0.2
    if biased and name != "query":
        data += (20.0 if name == "key" else 3.0) * torch.randn(shape[-1], device=DEVICE)
    if case.variant.skips and not case.outliers and name != "value":
        data += topics(shape, name, case.seed, case.params.scale)
    if case.sink and shape[-2] > 0:
        plant_sink(data, name, case.seed, case.params.scale)
    return data


def plant_sink(data: Tensor, name: str, seed: int, scale: float | None = None) -> None:
    """Every query has a high score (6 to 14) with the first key, whose value is small or 0."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scale = data.shape[-1] ** -0.5 if scale is None else scale
    height, value = rng.uniform(6, 14), rng.choice([0.0, 0.05, 0.3])
    if name == "value":
        data[..., 0, :] *= value
        return
    direction = torch.nn.functional.normalize(torch.randn(data.shape[-1], generator=generator), dim=-1)
    direction = direction.to(data.device) * math.sqrt(height / abs(scale))
    if name == "query":
        data += direction
    else:
        data[..., 0, :] += math.copysign(1.0, scale) * direction


def topics(shape: tuple[int, ...], name: str, seed: int, scale: float | None = None) -> Tensor:
    """What makes whole tiles of a softmax vanish: each run of queries or keys is about one of a few topics, and scores are high
    (4 to 12) where the two are the same."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scale = shape[-1] ** -0.5 if scale is None else scale
    height, count = rng.uniform(4, 12), rng.choice([2, 3, 5])
    run = {"query": rng.choice([64, 128, 128, 300]), "key": rng.choice([64, 100, 128, 128, 256])}[name]
    directions = torch.nn.functional.normalize(torch.randn(count, shape[-1], generator=generator), dim=-1)
    about = torch.randint(count, (2, -(-max(shape[-2], 1) // run)), generator=generator)[int(name == "key")]
    sign = math.copysign(1.0, scale) if name == "key" else 1.0
    found = directions[about.repeat_interleave(run)[: shape[-2]]] * sign * math.sqrt(height / abs(scale))
    return found.to(DEVICE)


def _side_effects(guarded: dict[str, Guarded]) -> list[str]:
    guarded["out"].tensor.fill_(math.nan)  # what remains of the output's buffer must be NaN as before
    return [f"{name}'s buffer was written to" for name, one in guarded.items() if not one.unchanged()]


def _varlen_faults(case: Case, rng: random.Random) -> list[str]:
    from sage_inductor.kernels.triton import attention_varlen

    q_lens, kv_lens = (
        [rng.choice([0, 1, rng.randint(1, most)]) for _ in range(case.batch)]
        for most in (case.q_len, case.kv_len)
    )
    heads, dims = (
        case.kv_heads * case.groups,
        (case.variant.head_dim, case.variant.value_head_dim or case.variant.head_dim),
    )
    totals = {"query": (heads, sum(q_lens), dims[0]), "key": (case.kv_heads, sum(kv_lens), dims[0])}
    totals |= {"value": (case.kv_heads, sum(kv_lens), dims[1]), "out": (heads, sum(q_lens), dims[1])}
    guarded = {
        name: Guarded((1, *shape), layout, case.variant.dtype)
        for (name, shape), layout in zip(totals.items(), case.variant.layouts, strict=True)
    }
    for name in ("query", "key", "value"):
        guarded[name].fill(_data(guarded[name].tensor.shape, name, case))
    cu_q, cu_k = (
        torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=DEVICE) for lens in (q_lens, kv_lens)
    )
    q, k, v, out = (guarded[name].tensor for name in ("query", "key", "value", "out"))
    params, tile = case.params, SKIP_TILE
    pairs = [(b, *lens) for b, lens in enumerate(zip(_slices(q_lens), _slices(kv_lens), strict=True))]
    if case.variant.skips:
        packed = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]
        tile = skip_tile_of(_triton(), *packed, None, params, varlen=(case.batch, max(q_lens), max(kv_lens)))
        margins = [
            margins_of(q[:, :, rows], k[:, :, keys], None, params, None, tile).flatten()
            for b, rows, keys in pairs
            if q_lens[b] and kv_lens[b]
        ]
        if margins:
            params = replace(params, skip_threshold=untied_threshold(torch.cat(margins), rng))
    result = attention_varlen(
        *(t[0].transpose(0, 1) for t in (q, k, v)), cu_q, cu_k, max(q_lens), max(kv_lens),
        is_causal=params.is_causal, bottom_right=params.bottom_right, window=(params.window_left, params.window_right),
        scale=params.scale, precision=params.precision, smoothing=params.smoothing, return_lse=True, out=out[0].transpose(0, 1),
        skip_threshold=params.skip_threshold,
    )  # fmt: skip
    faults = []
    for b, rows, keys in pairs:
        if q_lens[b] == 0:
            continue
        got, lse = out[:, :, rows], result[1][None, :, rows]
        if kv_lens[b] == 0:
            if got.count_nonzero() or not (lse == -math.inf).all():
                faults.append(f"sequence {b} has no keys and is not 0")
            continue
        found = disagreements(
            got, lse, q[:, :, rows], k[:, :, keys], v[:, :, keys], None, params, skip_tile=tile
        )
        faults += [f"sequence {b}: {text}" for text in found]
    return faults + _side_effects(guarded)


def _triton() -> Kernel:
    from sage_inductor import kernels

    return kernels.get("triton")


def _slices(lengths: list[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
