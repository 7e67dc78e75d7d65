"""The quantised algorithm in plain PyTorch, on any device: the oracle that every faster kernel is compared
with.

SageAttention (Zhang et al., arXiv:2410.02367, sections 4.1-4.4; SageAttention2, arXiv:2411.10958, for FP8
PV): K is smoothed (a vector per head is subtracted, which softmax does not see; kernels/smoothing.py has more forms), Q is
INT8 per token, K is INT8 per 128 keys. PV by precision: "fast" e4m3 P and V; "balanced" INT8 P against the maximum of its own
128-key block; "accurate" P and V in 16 bits. V in 8 bits is smoothed too (rows of softmax add up to one, so the
vector is added to the output) and has one factor per channel and one per 128-key block. The first key of a sequence, which in
trained models is often an attention sink (Xiao et al., arXiv:2309.17453), is set apart from it: see `_attend`.

Every product of quantised numbers is exact in float32 here (|int8 dot| <= 127^2 * 256 < 2^24), so a kernel
that follows the same steps differs only by the rounding of exp2 and of the float32 sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels.base import Segments, is_key_mask
from sage_inductor.kernels.reference.smoothing import Smoother
from sage_inductor.kernels.reference.tiles import (
    by_element,
    margins,
    probed_margins,
    product_of_kept,
    sampled_margins,
)
from sage_inductor.kernels.skipping import (
    FULLY_MASKED,
    SAMPLE_STEP,
    SAMPLED_TILE,
    SKIP_TILE,
    SkipTile,
    log2_threshold,
    probes,
)
from sage_inductor.kernels.smoothing import SAMPLES, VALUE_SAMPLES

KEY_BLOCK = 128  # keys that share one K scale, one V factor and one step of the online softmax
V_CHANNEL_FLOOR = (
    1 / 64
)  # of the largest channel: a channel that the sample missed cannot blow up a block's factor
OUTLIER = 8.0  # times a channel's size: no value of V counts for more in its mean
LEAST_MEAN = 0.25  # of a channel's size: V's mean is not subtracted below
LEAST_AMAX = 2.0**-100  # the largest number of what is quantised counts as no less, as in the kernels
E4M3_MAX = 448.0
INT8_MAX = 127.0
LOG2E = math.log2(math.e)
LN2 = math.log(2)
SCORES_AT_ONCE = 2**24  # float32 scores held at a time (64 MiB)


@dataclass(frozen=True)
class QuantizedK:
    """K of one call in the form the attention loop reads; integers are held as float32."""

    k: Tensor  # [batch, kv_heads, blocks * 128, head_dim], integers
    k_scale: Tensor  # [batch, kv_heads, blocks]
    kv_len: int  # keys without the padding
    smoothing: Smoother  # what was done to K, and is to be done to Q


@dataclass(frozen=True)
class QuantizedKV(QuantizedK):
    """K and V; e4m3 values are held as float32, too."""

    v: Tensor  # [batch, kv_heads, blocks * 128, value_head_dim]
    v_block: Tensor  # [batch, kv_heads, blocks]
    v_channel: Tensor  # [batch, kv_heads, 1, value_head_dim]
    v_mean: Tensor  # the same shape; zeros for "accurate"
    v_first: Tensor  # what v_mean leaves of the first key's value, whose `v` is 0; the same shape; zeros for "accurate"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    bounds: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    precision: str = "fast",
    smoothing: str = "auto",
    segments: Segments | None = None,
    skip_threshold: float = 0.0,
    skip_tile: SkipTile | None = None,
    skip_by: str = "scores",
) -> tuple[Tensor, Tensor]:
    """Quantised attention of query `[batch, heads, q_len, head_dim]`, key and value
    `[batch, kv_heads, kv_len, (value_)head_dim]`, with an optional bool or additive mask that broadcasts to
    `[batch, heads, q_len, kv_len]`. Query i sees keys i + low .. i + high for `bounds = (low, high)`, and of them, with
    `segments`, those of its own id. K and V have one mean for all segments: softmax sees neither. Tiles of `skip_tile` (None: that of
    `skip_by`) are left out as kernels/skipping.py says; its keys divide 128.

    Returns the output `[batch, heads, q_len, value_head_dim]` in query's dtype (contiguous) and the
    natural-log LSE, fp32 `[batch, heads, q_len]`. Rows that see no key give 0 and -inf. Blocked over queries:
    holds at most `SCORES_AT_ONCE` scores, or one row (with a threshold: one tile's rows) of every head where that is more.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    kv = quantize_kv(key, value, precision, used_keys(attn_mask), smoothing, query)
    return attention_prequantized(
        query, kv, attn_mask, bounds=bounds, scale=scale, precision=precision, segments=segments,
        skip_threshold=skip_threshold, skip_tile=skip_tile, skip_by=skip_by,
    )  # fmt: skip


def attention_prequantized(
    query: Tensor,
    kv: QuantizedKV,
    attn_mask: Tensor | None = None,
    *,
    bounds: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    precision: str = "fast",
    segments: Segments | None = None,
    skip_threshold: float = 0.0,
    skip_tile: SkipTile | None = None,
    skip_by: str = "scores",
) -> tuple[Tensor, Tensor]:
    """`attention` to keys that have been quantised. attn_mask has been expanded."""
    batch, heads, q_len, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = query.new_empty(batch, heads, q_len, kv.v.shape[-1])
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    tile = skip_tile or _tile_of(skip_by)
    at_least = tile.rows if skip_threshold else 1
    of_all = None
    if skip_threshold and skip_by == "sample" and probes(q_len):  # some tiles decide about others
        of_all = _tile_margins(query, kv, attn_mask, bounds, scale, segments, tile, skip_by)
    for start, x in _scores(query, kv, attn_mask, bounds, scale, segments, at_least):
        rows = slice(start, start + x.shape[2])
        left_out = None
        if skip_threshold:
            if of_all is None:
                found = _margins(x, tile, start, bounds, kv.kv_len, skip_by)
            else:
                found = of_all[:, :, start // tile.rows : -(-rows.stop // tile.rows)]
            left_out = by_element(found < log2_threshold(skip_threshold), tile, x)
        out[:, :, rows], lse[:, :, rows] = _attend(query[:, :, rows], kv, x, scale, precision, left_out)
    return out, lse


def tile_margins(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    bounds: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    smoothing: str = "auto",
    segments: Segments | None = None,
    skip_tile: SkipTile | None = None,
    skip_by: str = "scores",
    sample_step: int = SAMPLE_STEP,
) -> Tensor:
    """How far each tile's largest score comes up to the running maximum (log2; the most of its rows), or by a sample of the rows to
    that of all keys: `attention` leaves out the tiles below log2(skip_threshold). Arguments as there; with another sample_step it shows what a larger or smaller sample would find in each tile, whatever others decide about it.

    float32 `[batch, heads, tiles of queries, steps of keys]`: inf where a tile is kept whatever the threshold, -inf where none of
    its rows sees a key, so that kernels need not look at it.
    """
    batch, heads, q_len, head_dim = query.shape
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, q_len, key.shape[2])
    k = quantize_k(key, used_keys(attn_mask), smoothing, query)
    scale = head_dim**-0.5 if scale is None else scale
    tile = skip_tile or _tile_of(skip_by)
    return _tile_margins(query, k, attn_mask, bounds, scale, segments, tile, skip_by, sample_step)


def _tile_margins(
    query: Tensor,
    key: QuantizedK,
    attn_mask: Tensor | None,
    bounds: tuple[int | None, int | None],
    scale: float,
    segments: Segments | None,
    tile: SkipTile,
    skip_by: str,
    sample_step: int = SAMPLE_STEP,
) -> Tensor:
    scores = _scores(query, key, attn_mask, bounds, scale, segments, tile.rows)
    found = torch.cat(
        [_margins(x, tile, start, bounds, key.kv_len, skip_by, sample_step) for start, x in scores], 2
    )
    if skip_by == "sample" and sample_step == SAMPLE_STEP:
        return probed_margins(found, tile, query.shape[2], bounds, key.kv_len)
    return found


def _tile_of(skip_by: str) -> SkipTile:
    return SAMPLED_TILE if skip_by == "sample" else SKIP_TILE


def _margins(
    x: Tensor,
    tile: SkipTile,
    start: int,
    bounds: tuple[int | None, int | None],
    kv_len: int,
    skip_by: str,
    sample_step: int = SAMPLE_STEP,
) -> Tensor:
    if skip_by == "sample":
        return sampled_margins(x, tile, start, bounds, kv_len, sample_step)
    return margins(x, tile, start, bounds[1])


def _scores(
    query: Tensor,
    key: QuantizedK,
    attn_mask: Tensor | None,
    bounds: tuple[int | None, int | None],
    scale: float,
    segments: Segments | None,
    at_least: int,
) -> Iterator[tuple[int, Tensor]]:
    """(first query, scores) of some queries after others, a multiple of `at_least` at a time: float32
    `[batch, heads, queries, blocks, 128]` in units of log2, -inf where a query does not see a key."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, blocks = key.k_scale.shape[1:]
    padded_len = blocks * KEY_BLOCK
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * padded_len) // at_least) * at_least
    for start in range(0, q_len, step):
        stop = min(start + step, q_len)
        allowed, bias = _mask(attn_mask, bounds, start, stop, key.kv_len, padded_len, query.device)
        if segments is not None:
            allowed = _within_segments(segments, allowed, start, stop, padded_len)
        q, q_scale = quantize_query(key.smoothing.query(query[:, :, start:stop]), scale)
        grouped = q.reshape(batch, kv_heads, heads // kv_heads * (stop - start), head_dim)
        scores = (grouped @ key.k.mT).view(batch, heads, stop - start, blocks, KEY_BLOCK)
        k_scale = key.k_scale.repeat_interleave(heads // kv_heads, 1)[:, :, None]
        x = scores * (q_scale * k_scale)[..., None]
        if bias is not None:
            x = x + bias.view(*bias.shape[:3], blocks, KEY_BLOCK)
        if allowed is not None:
            x = x.masked_fill(~allowed.view(*allowed.shape[:3], blocks, KEY_BLOCK), -math.inf)
        yield start, x


def quantize_query(query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """INT8 per token of `query * scale * log2(e)`: integers as float32, and their scales (fp32, never
    negative)."""
    # The factor goes into the scale and not into the numbers, which it could carry out of float32's range.
    q = query.float()
    unit = _scale_for(q.abs().amax(-1, keepdim=True), INT8_MAX)
    return torch.nan_to_num((q / unit).round()) * math.copysign(1.0, scale), unit * abs(scale * LOG2E)


def used_keys(attn_mask: Tensor | None) -> Tensor | None:
    """What a mask over keys does not rule out, bool `[batch, kv_len]`; None for other (expanded) masks, where that
    differs from query to query."""
    if attn_mask is None or attn_mask.numel() == 0 or not is_key_mask(attn_mask):
        return None
    row = attn_mask[:, 0, 0]
    return row if row.dtype == torch.bool else row != -math.inf


def quantize_k(
    key: Tensor, used: Tensor | None = None, smoothing: str = "mean", query: Tensor | None = None
) -> QuantizedK:
    """Smooth and quantise K in blocks of 128 keys padded with zeros.

    `used`, bool `[batch, kv_len]`: the keys that a mask over keys leaves; the others do not count, and are 0 in 8
    bits. `query`, of all heads, has to be there where `smoothing` evens its channels with K's.
    """
    unused = None if used is None else ~used[:, None, :, None]
    smooth = smoothing_of(key, smoothing, query, used)
    blocks = _blocked(_without(unused, smooth.key(key)))
    scale = _scale_for(blocks.abs().amax((3, 4), keepdim=True), INT8_MAX)
    k = torch.nan_to_num((blocks / scale).round())
    return QuantizedK(k.flatten(2, 3), scale[..., 0, 0], key.shape[2], smooth)


def quantize_kv(
    key: Tensor,
    value: Tensor,
    precision: str,
    used: Tensor | None = None,
    smoothing: str = "mean",
    query: Tensor | None = None,
) -> QuantizedKV:
    """`quantize_k`, and V for `precision` in the same blocks."""
    quantized = quantize_k(key, used, smoothing, query)
    unused = None if used is None else ~used[:, None, :, None]
    if precision == "accurate":
        v_channel = value.new_ones(*value.shape[:2], 1, value.shape[-1], dtype=torch.float32)
        v_mean = torch.zeros_like(v_channel)
        v = _blocked(value.to(_pv_dtype(value.dtype)).float())
        v_block = torch.ones_like(v[..., :1, :1])
        v_first = v_mean
    else:
        rows, weight = _sample(VALUE_SAMPLES, value.shape[0], value.shape[2], used, value.device)
        sample = _sampled(value, rows)
        # The square of the mean root, of values and of their magnitudes: one outlier among the sampled tokens hardly
        # moves it, where it would carry the mean off for all others. From there the mean, outliers limited, and the
        # size of what is left. The blocks' own factors keep the range exact.
        root = sample.abs().sqrt()
        centre = (root.copysign(sample) * weight).sum(2, keepdim=True)
        centre = centre * centre.abs()
        limit = OUTLIER * (root * weight).sum(2, keepdim=True).square()
        deviation = sample - centre
        v_mean = centre + (deviation.clamp(-limit, limit) * weight).sum(2, keepdim=True)
        v_size = (deviation.abs().sqrt() * weight).sum(2, keepdim=True).square()
        # A small mean costs nothing and may be the sample's, not V's: an output that averages over many keys is
        # smaller than that, and the rounding of P would not spare what is added back.
        v_mean = torch.where(v_mean.abs() > LEAST_MEAN * v_size, v_mean, 0.0)
        v_channel = torch.maximum(v_size, v_size.amax(-1, keepdim=True) * V_CHANNEL_FLOOR)
        v_channel = torch.where(v_channel.amax(-1, keepdim=True) > 0, v_channel, 1.0)
        v_first = value[:, :, :1].float() - v_mean
        v = _without(unused, (value.float() - v_mean) / v_channel)
        v[:, :, 0] = 0.0
        v = _blocked(v)
        v_block = _scale_for(
            v.abs().amax((3, 4), keepdim=True), E4M3_MAX if precision == "fast" else INT8_MAX
        )
        if precision == "fast":
            # e4m3 is as precise over 14 powers of two, and a typical value is 1 here: only what lies beyond
            # its range needs a factor. Kernels can add up blocks that share one.
            v_block = v_block.clamp(min=1.0)
        v = torch.nan_to_num(v / v_block)
        v = _e4m3(v) if precision == "fast" else v.round()
    return QuantizedKV(
        **vars(quantized), v=v.flatten(2, 3), v_block=v_block[..., 0, 0], v_channel=v_channel, v_mean=v_mean,
        v_first=v_first,
    )  # fmt: skip


def smoothing_of(key: Tensor, name: str, query: Tensor | None, used: Tensor | None) -> Smoother:
    """What is done to Q and K of one call."""
    rows, weight = _sample(SAMPLES, key.shape[0], key.shape[2], used, key.device)
    queries = None if query is None else _sampled_queries(query, key.shape[1], used)
    return Smoother.of(name, _sampled(key, rows), weight, queries)


def _sampled_queries(query: Tensor, kv_heads: int, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_sample` and `_sampled`, of the queries of each key head: evenly spaced over its heads one after the other. Where there
    are as many queries as keys they are taken for the same tokens: those of padding do not count."""
    batch, heads, q_len, head_dim = query.shape
    groups = heads // kv_heads
    if used is None or used.shape[-1] != q_len:
        used = torch.ones(batch, q_len, dtype=torch.bool, device=query.device)
    first, length = _used_range(used)
    total = groups * length
    count = total.clamp(max=SAMPLES)
    i = torch.arange(min(groups * q_len, SAMPLES), device=query.device)
    places = torch.where(i < count, i * total // count.clamp(min=1), 0)
    head = places // length.clamp(min=1)
    rows = torch.where(i < count, first + places - head * length, 0)
    counted = used.expand(batch, -1).gather(1, rows) & (i < count)
    queries = query.reshape(batch, kv_heads, groups * q_len, head_dim)
    return _sampled(queries, head * q_len + rows), _weight(counted)


def _sample(
    most: int, batch: int, kv_len: int, used: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Up to `most` keys, evenly spaced between the first and the last one that is used: their numbers,
    `[batch, samples]`, and what each counts for, `[batch, 1, samples, 1]`, which adds up to 1, or to 0 where no key
    is used."""
    if used is None:
        used = torch.ones(batch, kv_len, dtype=torch.bool, device=device)
    first, length = _used_range(used)
    count = length.clamp(max=most)
    i = torch.arange(min(kv_len, most), device=device)
    rows = torch.where(i < count, first + i * length // count.clamp(min=1), 0)
    return rows, _weight(used.gather(1, rows) & (i < count))


def _used_range(used: Tensor) -> tuple[Tensor, Tensor]:
    """The first key that is used, and how many there are from it to the last one that is: `[batch, 1]`."""
    if used.shape[-1] == 0:
        return used.new_zeros(len(used), 1, dtype=torch.int64), used.new_zeros(
            len(used), 1, dtype=torch.int64
        )
    keys = torch.arange(used.shape[-1], device=used.device)
    first = torch.where(used, keys, used.shape[-1]).amin(-1, keepdim=True)
    end = torch.where(used, keys + 1, 0).amax(-1, keepdim=True)
    return first, (end - first).clamp(min=0)


def _weight(counted: Tensor) -> Tensor:
    """What each of those counts for, `[batch, 1, samples, 1]`: it adds up to 1, or to 0 where there is none."""
    weight = counted.float() / counted.sum(-1, keepdim=True).clamp(min=1)
    return weight[:, None, :, None]


def _sampled(x: Tensor, rows: Tensor) -> Tensor:
    """Those rows of `[batch, heads, keys, dim]`, 0 for what is not finite."""
    index = rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.nan_to_num(x.gather(2, index).float(), nan=0.0, posinf=0.0, neginf=0.0)


def _attend(
    query: Tensor,
    kv: QuantizedKV,
    x: Tensor,
    scale: float,
    precision: str,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of some queries, of which `x` has the scores, over all keys: what an online softmax over 128-key blocks
    computes. `left_out`: what lies in tiles that it leaves out, bool of the same shape.

    With 8-bit PV the first key is no part of its block. Its weight is not what the others are rounded against, and its value is
    added at the end, in float32.
    """
    batch, heads, rows, blocks, _ = x.shape
    kv_heads = kv.k_scale.shape[1]
    groups = heads // kv_heads

    def per_query_head(x: Tensor) -> Tensor:  # [batch, kv_heads, blocks] -> [batch, heads, 1, blocks]
        return x.repeat_interleave(groups, 1)[:, :, None]

    if left_out is not None:
        x = x.masked_fill(left_out, -math.inf)
    x_first = torch.full_like(x[..., 0, :1], -math.inf)
    if precision != "accurate":
        x_first = x[..., 0, :1].clone()
        x = x.clone()
        x[..., 0, 0] = -math.inf
    block_max = x.amax(-1).clamp(min=FULLY_MASKED)
    running_max = block_max.cummax(-1).values
    final_max = torch.maximum(running_max[..., -1:], x_first)
    # "balanced" quantises P against the maximum of its own block, which an 8-bit integer needs; the
    # floating-point forms of P are as precise against the running maximum.
    reference_max = block_max if precision == "balanced" else running_max
    p_max = {"fast": E4M3_MAX, "balanced": INT8_MAX, "accurate": 1.0}[precision]
    p = torch.exp2(x - (reference_max - math.log2(p_max))[..., None])
    weight = torch.exp2(reference_max - final_max)
    p_first = torch.exp2(x_first - (final_max - math.log2(p_max)))
    row_sum = (p.sum(-1) * weight).sum(-1, keepdim=True) + p_first
    if precision == "fast":
        p = _e4m3(p)
    elif precision == "balanced":
        p = p.round()
    else:
        p = p.to(_pv_dtype(query.dtype)).float()
    weight = weight * per_query_head(kv.v_block)

    weighted = p * weight[..., None]
    if left_out is None:
        out = weighted.view(batch, kv_heads, groups * rows, blocks * KEY_BLOCK) @ kv.v
    else:
        out = product_of_kept(weighted, left_out, kv.v)
    out = out.view(batch, heads, rows, -1)
    out = out / row_sum * kv.v_channel.repeat_interleave(groups, 1) + kv.v_mean.repeat_interleave(groups, 1)
    out = out + torch.where(
        x_first > -math.inf, p_first / row_sum * kv.v_first.repeat_interleave(groups, 1), 0.0
    )
    masked_out = row_sum == 0
    out = torch.where(masked_out, 0.0, out)

    lse = (final_max + row_sum.log2() - math.log2(p_max)) * LN2
    lse = lse + scale * (query.float() @ kv.smoothing.mean.repeat_interleave(groups, 1).mT)
    lse = torch.where(masked_out, -math.inf, lse)
    return out.to(query.dtype), lse[..., 0]


def _mask(
    attn_mask: Tensor | None,
    bounds: tuple[int | None, int | None],
    start: int,
    stop: int,
    kv_len: int,
    padded_len: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """(allowed, bias) for queries start..stop over the padded keys, `[1 or batch, 1 or heads, rows,
    padded_len]`."""
    low, high = bounds
    allowed = bias = None
    if attn_mask is not None:
        rows = F.pad(attn_mask[:, :, start:stop], (0, padded_len - kv_len))
        if rows.dtype == torch.bool:
            allowed = rows
        else:
            bias = _log2_bias(rows)
    if low is not None or high is not None or padded_len != kv_len:
        keys = torch.arange(padded_len, device=device)
        distance = keys - torch.arange(start, stop, device=device)[:, None]
        band = (keys < kv_len).expand(stop - start, -1)
        if low is not None:
            band = band & (distance >= low)
        if high is not None:
            band = band & (distance <= high)
        allowed = band[None, None] if allowed is None else allowed & band
    return allowed, bias


def _within_segments(
    segments: Segments, allowed: Tensor | None, start: int, stop: int, padded_len: int
) -> Tensor:
    """`allowed` of `_mask`, where query and key are of one segment. What is behind the last key is of segment 0, and ruled
    out already."""
    ids = F.pad(segments.key, (0, padded_len - segments.key.shape[1]))
    same = (segments.query[:, start:stop, None] == ids[:, None])[:, None]
    return same if allowed is None else allowed & same


def _log2_bias(mask: Tensor) -> Tensor:
    """An additive mask in the exponent's units. The most negative finite number stays finite, so that a row
    made of it attends to all keys alike, as in SDPA; -inf stays -inf."""
    bias = mask.float() * LOG2E
    return torch.where(mask == -math.inf, -math.inf, bias.clamp(min=FULLY_MASKED))


def _scale_for(amax: Tensor, largest: float) -> Tensor:
    """amax / largest; 1 for zeros, so that 0 / 0 never arises, and NaN where the input was not finite, so
    that a quantised inf or NaN still shows in the output. At least LEAST_AMAX / largest: a quotient below float32's
    normal numbers is rounded coarsely, or to 0."""
    scale = torch.where(amax > 0, amax.clamp(min=LEAST_AMAX) / largest, 1.0)
    return torch.where(amax.isfinite(), scale, math.nan)


def _without(unused: Tensor | None, x: Tensor) -> Tensor:
    return x if unused is None else x.masked_fill(unused, 0.0)


def _blocked(x: Tensor) -> Tensor:
    """`[batch, heads, keys, dim]` -> `[batch, heads, blocks, 128, dim]`, padded with zeros."""
    batch, heads, keys, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -keys % KEY_BLOCK))
    return padded.reshape(batch, heads, -1, KEY_BLOCK, dim)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()  # the cast itself makes NaN above 464


def _pv_dtype(dtype: torch.dtype) -> torch.dtype:
    """FP16 for float16 inputs; BF16 for the rest, whose range FP16 does not hold (V above 65504)."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
