"""Device code that looks at Q, K and V before they are rounded: the first of the launches that quantise.

It looks at up to SAMPLES keys per sequence and head, VALUE_SAMPLES for V, which waits for memory more than it uses it. Meanwhile it
rounds Q or, where Q's channels are evened or rotated first, copies V if V keeps 16 bits.

Why a sample is enough: softmax is invariant to *any* vector subtracted from K, and its rows add up to one, so
that any vector subtracted from V is added back to the output: neither need be the exact mean. V's channel scale
only has to be coarse because every 128-key block has an exact scale of its own.

Keys that a mask over keys, the same for every head and query, rules out are not sampled: padding may hold anything. Nor are
queries of the same places, where there are as many as keys.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..smoothing import SAMPLES, VALUE_SAMPLES
from .numerics import finite_or_zero
from .quantize import copy_v_block
from .queries import quantize_q_block
from .smoothing import ROTATION_ROWS, sampled_size, tile_width, tiles_of, write_rotation
from .workspace import _USED_KEYS, UNSPECIALIZED, counts, gap_range, sections, sequence, used_range

_SAMPLES = tl.constexpr(SAMPLES)
_VALUE_SAMPLES = tl.constexpr(VALUE_SAMPLES)
# A value of V further from the centre than this many times its channel's size weighs as one at that distance in the
# mean. 5.4 standard deviations of normal values without a mean: one such token of 512 moves it by a hundredth of one.
_OUTLIER = tl.constexpr(8.0)
_LEAST_MEAN = tl.constexpr(0.25)  # of a channel's size: V's mean is not subtracted below


@triton.jit
def _load_sample(
    x, stride_n, stride_d, first_d, length, mask, stride_mn,
    SAMPLES: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Some channels of the sampled keys [SAMPLES, GROUP], 0 where they are not finite; which keys count; and one
    over how many do."""
    i = tl.arange(0, SAMPLES)
    rows = tl.where(length < SAMPLES, i, (i.to(tl.int64) * length) // SAMPLES)
    count = tl.minimum(length, SAMPLES)
    counted = counts(rows, i < count, mask, stride_mn, MASK)
    if MASK != 0:
        count = tl.sum(counted.to(tl.int32), 0)
    weight = 1.0 / tl.maximum(count, 1)
    d = first_d + tl.arange(0, GROUP)
    tile = tl.load(
        x + rows[:, None] * stride_n + d[None, :] * stride_d,
        mask=counted[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    return finite_or_zero(tile), counted, weight


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    key_mask,
    q8,
    v8,
    scales,
    channel_sizes,
    rotation,
    scale,
    q_size,
    batch,
    heads,
    kv_heads,
    q_len,
    kv_len,
    q_blocks,
    kv_blocks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mn,
    Q_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    VARLEN: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    Q_LAST: tl.constexpr,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_POW2: tl.constexpr,
    DV_POW2: tl.constexpr,
    Q_ROWS: tl.constexpr,
    V_STATISTICS: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    COPIES_V: tl.constexpr,
    EQUALISE: tl.constexpr,
    ROTATION: tl.constexpr,
    GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per GROUP channels of K, V_GROUP of V, if V_STATISTICS, and GROUP of Q, if EQUALISE, for each sequence and kv head; then
    one per sequence for a key mask; then those that write the ROTATION. A group's sample is held in registers, so that
    memory is waited for once. Evenly between them what waits for nothing: without Q_LAST one program per (sequence, head,
    block of Q_ROWS rows) of Q, or, with COPIES_V, (sequence, head, block of 128 rows) of V. Strides as in
    `quantize_kernel`."""
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    _k_scale, _v_scale, k_mean, v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    if pid == 0:
        tl.store((used_keys + _USED_KEYS * batch).to(tl.pointer_type(tl.int32)), 0)
    K_GROUPS: tl.constexpr = D // GROUP
    V_GROUPS: tl.constexpr = DV // V_GROUP if V_STATISTICS else 0
    Q_GROUPS: tl.constexpr = K_GROUPS if EQUALISE else 0
    if COPIES_V or not Q_LAST:
        own = batch * kv_heads * (K_GROUPS + V_GROUPS + Q_GROUPS)
        if MASK != 0:
            own += batch
        if ROTATION is not None:
            own += tiles_of(ROTATION) * (tile_width(ROTATION, D_POW2) // ROTATION_ROWS)
        before = (pid.to(tl.int64) * own // tl.num_programs(0)).to(tl.int32)
        if ((pid + 1).to(tl.int64) * own // tl.num_programs(0)).to(tl.int32) == before:
            if COPIES_V:
                copy_v_block(
                    pid - before, v, v8, cu_seqlens_k, kv_heads, kv_len, kv_blocks, stride_vb, stride_vh, stride_vn,
                    stride_vd, V_ALIGN, VARLEN, V_HEAD_DIM, DV, DV_POW2, V_TRANSPOSED, PTX,
                )  # fmt: skip
                return
            quantize_q_block(
                pid - before, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
                stride_qb, stride_qh, stride_qn, stride_qd, Q_ALIGN, VARLEN, RETURN_LSE, HEAD_DIM, D, D_POW2, Q_ROWS,
                PTX,
            )  # fmt: skip
            return
        pid = before
    # Neighbours read neighbouring channels of the same keys: 32 bytes each of what memory gives 64 at a time.
    group = pid % (K_GROUPS + V_GROUPS + Q_GROUPS)
    bh = pid // (K_GROUPS + V_GROUPS + Q_GROUPS)
    if bh < batch * kv_heads:
        b = bh // kv_heads
        h = (bh % kv_heads).to(tl.int64)
        start, length, _block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        own_start = start
        mask = key_mask
        if MASK != 0:
            mask += b.to(tl.int64) * stride_mb
            first, end, _count = used_range(mask, length, stride_mn, MASK)
            length = tl.maximum(end - first, 0)
            start = first.to(tl.int64)
            mask += start * stride_mn
        if group < K_GROUPS:
            stride_n = stride_kn.to(tl.int64) * K_ALIGN
            source = k + (b.to(tl.int64) * stride_kb + h * stride_kh) * K_ALIGN + start * stride_n
            _key_statistics(
                source, k_mean + bh * D, channel_sizes + 2 * bh * D if EQUALISE else channel_sizes, group * GROUP, length,
                stride_n, stride_kd, mask, stride_mn, HEAD_DIM, GROUP, EQUALISE, MASK,
            )  # fmt: skip
        elif EQUALISE and group >= K_GROUPS + V_GROUPS:
            _query_sizes(
                q, channel_sizes + (2 * bh + 1) * D, b, h, (group - K_GROUPS - V_GROUPS) * GROUP, cu_seqlens_q, q_len,
                kv_len, start, length, heads // kv_heads, stride_qb, stride_qh, stride_qn, stride_qd, mask, stride_mn,
                Q_ALIGN, VARLEN, HEAD_DIM, GROUP, MASK,
            )  # fmt: skip
        else:
            stride_n = stride_vn.to(tl.int64) * V_ALIGN
            source = v + (b.to(tl.int64) * stride_vb + h * stride_vh) * V_ALIGN
            _value_statistics(
                source + start * stride_n, source + own_start * stride_n, v_channel + bh * 4 * DV, (group - K_GROUPS) * V_GROUP, length, stride_n, stride_vd, mask,
                stride_mn, V_HEAD_DIM, DV, V_GROUP, MASK,
            )  # fmt: skip
    else:
        pid -= batch * kv_heads * (K_GROUPS + V_GROUPS + Q_GROUPS)
        if MASK != 0:
            if ROTATION is None or pid < batch:
                first, end, count = used_range(
                    key_mask + pid.to(tl.int64) * stride_mb, kv_len, stride_mn, MASK
                )
                gap, gap_end = end, end
                if count < end - first:
                    gap, gap_end = gap_range(
                        key_mask + pid.to(tl.int64) * stride_mb, first, end, stride_mn, MASK
                    )
                target = (used_keys + _USED_KEYS * pid).to(tl.pointer_type(tl.int32))
                tl.store(target, first)
                tl.store(target + 1, end)
                tl.store(target + 2, (count == end - first).to(tl.int32))
                tl.store(target + 3, gap)
                tl.store(target + 4, gap_end)
            pid -= batch
        if ROTATION is not None and pid >= 0:
            C: tl.constexpr = tile_width(ROTATION, D_POW2)
            row = pid * ROTATION_ROWS
            if row < C:
                write_rotation(rotation, row, ROTATION, 0, C)
            elif tiles_of(ROTATION) == 2:
                write_rotation(rotation + C * C, row - C, ROTATION, 1, C)


@triton.jit
def _key_statistics(
    source, k_mean, sizes, first_d, length, stride_n, stride_d, mask, stride_mn,
    DIM: tl.constexpr, GROUP: tl.constexpr, EQUALISE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the mean of some of K's channels and, with EQUALISE, their sizes."""
    tile, counted, weight = _load_sample(
        source, stride_n, stride_d, first_d, length, mask, stride_mn, _SAMPLES, DIM, GROUP, MASK
    )
    d = first_d + tl.arange(0, GROUP)
    # Scaled first: a sum of large values would overflow.
    mean = tl.sum(tile * weight, 0)
    tl.store(k_mean + d, mean)
    if EQUALISE:
        deviation = tl.where(counted[:, None], tile - mean[None, :], 0.0)
        tl.store(sizes + d, sampled_size(deviation, weight))


@triton.jit
def _value_statistics(
    source, first_key, v_channel, first_d, length, stride_n, stride_d, mask, stride_mn,
    DIM: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the mean of some of V's channels and their sizes, and what the mean leaves of the first key's value."""
    tile, counted, weight = _load_sample(
        source, stride_n, stride_d, first_d, length, mask, stride_mn, _VALUE_SAMPLES, DIM, GROUP, MASK
    )
    # The 1/2-mean, of values and of their magnitudes: one outlier token in the sample would carry the
    # mean off for all others, and a maximum would make the channels as uneven as that token is.
    root = tl.sqrt(tl.abs(tile))
    size = tl.sum(root, 0) * weight
    centre = tl.sum(tl.where(tile < 0, -root, root), 0) * weight
    centre = centre * tl.abs(centre)
    limit = (size * size * _OUTLIER)[None, :]
    # From there the mean, outliers limited, and the size of what is left.
    tile = tl.where(counted[:, None], tile - centre[None, :], 0.0)
    mean = centre + tl.sum(tl.minimum(tl.maximum(tile, -limit), limit) * weight, 0)
    size = tl.sum(tl.sqrt(tl.abs(tile)), 0) * weight
    size = size * size
    # A small mean costs nothing and may be the sample's, not V's: an output that averages over many keys is
    # smaller than that, and the rounding of P would not spare what is added back.
    mean = tl.where(tl.abs(mean) > size * _LEAST_MEAN, mean, 0.0)
    d = first_d + tl.arange(0, GROUP)
    first = tl.load(first_key + d * stride_d, mask=(d < DIM) & (length > 0), other=0.0).to(tl.float32)
    channel = v_channel + d
    # Until the first block is quantised, if there is one.
    tl.store(channel, tl.full([GROUP], 1.0, tl.float32))
    tl.store(channel + DV, size)
    tl.store(channel + 2 * DV, mean)
    tl.store(channel + 3 * DV, first - mean)


@triton.jit
def _query_sizes(
    q, target, b, kv_h, first_d, cu_seqlens_q, q_len, kv_len, used_start, used_length, groups,
    stride_qb, stride_qh, stride_qn, stride_qd, mask, stride_mn,
    ALIGN: tl.constexpr, VARLEN: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the sizes of some of Q's channels, from queries evenly spaced over the heads of a key head, one after the other. Where
    there are as many queries as keys they are taken for the same tokens: `mask`, from `used_start` on, rules out those of padding."""
    start, length, _block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
    if MASK != 0:
        start = tl.where(q_len == kv_len, used_start, start)
        length = tl.where(q_len == kv_len, used_length, length)
    total = length.to(tl.int64) * groups
    i = tl.arange(0, _SAMPLES)
    rows = tl.where(total < _SAMPLES, i, i * total // _SAMPLES)
    head = rows // tl.maximum(length, 1)
    rows -= head * length
    exists = i < total
    count = tl.minimum(total, _SAMPLES).to(tl.int32)
    if MASK != 0:
        exists = counts(rows, exists & (q_len == kv_len), mask, stride_mn, MASK) | (
            exists & (q_len != kv_len)
        )
        count = tl.sum(exists.to(tl.int32), 0)
    d = first_d + tl.arange(0, GROUP)
    offset = (
        b.to(tl.int64) * stride_qb + (kv_h * groups + head) * stride_qh + (start + rows) * stride_qn
    ) * ALIGN
    tile = tl.load(
        q + offset[:, None] + d[None, :] * stride_qd,
        mask=exists[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    tl.store(target + d, sampled_size(finite_or_zero(tile), 1.0 / tl.maximum(count, 1)))
