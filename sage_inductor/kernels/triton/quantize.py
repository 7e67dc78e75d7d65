"""Device code that rounds K and V to 8 bits, and Q where it has to wait for what the statistics say: the last of the launches
that quantise. Where Q and K are evened (evened.py), V alone is left to it. workspace.py describes what it writes.

Keys that a mask over keys rules out are 0 in 8 bits. So is V of the first key of a sequence, which attention adds as it is.

Why Q passes through memory too: quantising it in the attention kernel's prologue would save this pass (4% at
4k tokens, 1% at 16k), but it costs the registers of the prologue.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .numerics import (
    larger_magnitude,
    largest_of_all,
    magnitude,
    pack_four,
    reciprocal,
    round_to_int8,
    scale_or_nan,
    to_float,
    widen,
)
from .queries import quantize_q_block
from .smoothing import TINY
from .workspace import _KEY_BLOCK, UNSPECIALIZED, counts, sections, sequence

# V's block scales are units of the accumulator, so their ratios must stay far from overflow.
_V_FLOOR = tl.constexpr(2.0**-30)
_E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # of 448.0
_V_CHANNEL_RANGE = tl.constexpr(64.0)  # no channel scale is below 1/64 of the largest


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    key_mask,
    q8,
    k8,
    v8,
    scales,
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
    PRECISION: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (sequence, head, block of 128 rows) of V, then of K, then, if Q_LAST, of Q: its shift or its factors
    come from the statistics of K.

    Strides but the last of each tensor come in units of *_ALIGN elements; q_len and kv_len are the longest of
    a varlen call. OVERLAP: the kernel starts beside the end of the statistics, and what it reads of them comes after
    `gdc_wait`, which every program calls, so that the end of this kernel is behind the end of that.
    """
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    blocks = tl.cdiv(kv_len, _KEY_BLOCK)
    programs = batch * kv_heads * blocks
    k_scale, v_scale, k_mean, v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    if pid < 2 * programs:
        is_k = pid >= programs
        tile = pid % programs
        block = tile % blocks
        bh = tile // blocks
        b = bh // kv_heads
        h = bh % kv_heads
        start, length, block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        slot = h * kv_blocks + block0 + block
        mask = key_mask
        if MASK != 0:
            mask += b.to(tl.int64) * stride_mb
        if block * _KEY_BLOCK < length:
            if is_k:
                stride_n = stride_kn.to(tl.int64) * K_ALIGN
                source = (
                    k + (b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh) * K_ALIGN + start * stride_n
                )
                _quantize_k(
                    source, k8, k_scale + slot, k_mean + bh * D, slot, block, length, stride_n, stride_kd, mask,
                    stride_mn, HEAD_DIM, D, D_POW2, MASK, PTX, OVERLAP,
                )  # fmt: skip
                if PRECISION != "accurate" and block == 0:
                    # V's programs have no registers left for it.
                    write_channel_scales(v_channel + bh * 4 * DV, DV, DV_POW2)
            else:
                if PRECISION == "accurate":
                    copy_v_block(
                        tile, v, v8, cu_seqlens_k, kv_heads, kv_len, kv_blocks, stride_vb, stride_vh, stride_vn, stride_vd,
                        V_ALIGN, VARLEN, V_HEAD_DIM, DV, DV_POW2, V_TRANSPOSED, PTX,
                    )  # fmt: skip
                    if OVERLAP:
                        gdc_wait()
                else:
                    stride_n = stride_vn.to(tl.int64) * V_ALIGN
                    source = (
                        v
                        + (b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh) * V_ALIGN
                        + start * stride_n
                    )
                    # The block's columns inside [kv_heads * DV, kv_blocks * 128].
                    pitch = kv_blocks.to(tl.int64) * _KEY_BLOCK
                    target = v8 + h * DV * pitch + (block0 + block).to(tl.int64) * _KEY_BLOCK
                    _quantize_v(
                        source, target, pitch, v_scale + slot, v_channel + bh * 4 * DV, block, length, stride_n,
                        stride_vd, mask, stride_mn, V_HEAD_DIM, DV, DV_POW2, PRECISION, MASK, PTX, OVERLAP,
                    )  # fmt: skip
        elif OVERLAP:
            gdc_wait()
    elif Q_LAST:
        if OVERLAP:
            gdc_wait()
        quantize_q_block(
            pid - 2 * programs, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
            stride_qb, stride_qh, stride_qn, stride_qd, Q_ALIGN, VARLEN, RETURN_LSE, HEAD_DIM, D, D_POW2, _KEY_BLOCK, PTX,
        )  # fmt: skip


@triton.jit
def _quantize_k(
    source, k8, scale, mean, slot, block, length, stride_n, stride_d, mask, stride_mn,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, MASK: tl.constexpr, PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + r
    d = tl.arange(0, D_POW2)
    exists = counts(n, n < length, mask, stride_mn, MASK)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=exists[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    if OVERLAP:
        gdc_wait()
    # One fused multiply-add: rows that do not exist or count stay 0.
    x = widen(x, PTX) - exists.to(tl.float32)[:, None] * tl.load(mean + d, mask=d < D, other=0.0)[None, :]
    amax = scale_or_nan(largest_of_all(magnitude(x)), TINY)
    tl.store(scale, amax / 127.0)
    offset = (slot.to(tl.int64) * _KEY_BLOCK + r)[:, None] * D + d[None, :]
    tl.store(k8 + offset, round_to_int8(x * (127.0 / amax)), mask=(d < D)[None, :])


@triton.jit
def write_channel_scales(channel, D: tl.constexpr, D_POW2: tl.constexpr):
    """V's, of one head, which the attention kernel reads."""
    d = tl.arange(0, D_POW2)
    tl.store(channel + d, _channel_scales(channel, D, D_POW2), mask=d < D)


@triton.jit
def _channel_scales(channel, D: tl.constexpr, D_POW2: tl.constexpr):
    """V's, from what the sample says."""
    d = tl.arange(0, D_POW2)
    size = tl.load(channel + D + d, mask=d < D, other=0.0)
    largest = tl.max(size, 0)
    return tl.where(largest < TINY, 1.0, tl.maximum(size, largest / _V_CHANNEL_RANGE))


@triton.jit
def _quantize_v(
    source, target, pitch, log2_scale, channel, block, length, stride_n, stride_d, mask, stride_mn,
    DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Column c of the transposed block holds key [0,1,8,9,2,3,10,11,4,5,12,13,6,7,14,15][c] of its group of
    # 16: the order in which a thread's accumulator elements of QK^T become its 8-bit A operand of PV without
    # a shuffle. Four tiles of keys give the four bytes of a word, which a thread has in its registers; transposed
    # byte by byte V took twice as long (159 us instead of 77 at 128 heads, 4,096 keys, head_dim 128 on an H100).
    word = tl.arange(0, _KEY_BLOCK // 4)
    n = block * _KEY_BLOCK + (word & -4) * 4 + (word & 3) * 2
    d = tl.arange(0, D_POW2)
    source += d[None, :] * stride_d + n.to(tl.int64)[:, None] * stride_n
    in_head = (d < DIM)[None, :]
    e0 = counts(n, (n > 0) & (n < length), mask, stride_mn, MASK)  # the first key is 0
    e1 = counts(n + 1, n + 1 < length, mask, stride_mn, MASK)
    e2 = counts(n + 8, n + 8 < length, mask, stride_mn, MASK)
    e3 = counts(n + 9, n + 9 < length, mask, stride_mn, MASK)
    x0 = tl.load(source, mask=e0[:, None] & in_head, other=0.0)
    x1 = tl.load(source + stride_n, mask=e1[:, None] & in_head, other=0.0)
    x2 = tl.load(source + 8 * stride_n, mask=e2[:, None] & in_head, other=0.0)
    x3 = tl.load(source + 9 * stride_n, mask=e3[:, None] & in_head, other=0.0)
    if OVERLAP:
        gdc_wait()
    # Behind the loads: they would wait for its barrier.
    inverse = reciprocal(_channel_scales(channel, D, D_POW2), PTX)
    mean = tl.load(channel + 2 * D + d, mask=d < D, other=0.0) * inverse
    x0 = _normalized(x0, e0, mean, inverse, PTX)
    x1 = _normalized(x1, e1, mean, inverse, PTX)
    x2 = _normalized(x2, e2, mean, inverse, PTX)
    x3 = _normalized(x3, e3, mean, inverse, PTX)
    largest = larger_magnitude(larger_magnitude(x0, x1), larger_magnitude(x2, x3))
    bits = largest_of_all(largest.to(tl.int32, bitcast=True))
    if PRECISION == "fast":
        # e4m3 is as precise over 14 powers of two, and a typical value is 1 here: only a block with a value
        # beyond its range needs a scale. So nearly all blocks have the same, and their products can be
        # summed up before they are scaled.
        unit = tl.where(bits > _E4M3_MAX_BITS, scale_or_nan(bits, 1.0) * (1.0 / 448.0), 1.0)
        if bits > _E4M3_MAX_BITS:
            factor = 1.0 / unit
            x0 *= factor
            x1 *= factor
            x2 *= factor
            x3 *= factor
    else:
        # A block of zeros gets the scale of a typical one.
        amax = scale_or_nan(tl.where(bits == 0, 0x3F800000, bits), _V_FLOOR)
        unit = amax / 127.0
        factor = 127.0 / amax
        x0 *= factor
        x1 *= factor
        x2 *= factor
        x3 *= factor
    tl.store(log2_scale, tl.log2(unit))
    packed = pack_four(x0, x1, x2, x3, PRECISION == "fast", PTX)
    words = target.to(tl.pointer_type(tl.int32)) + d.to(tl.int64)[:, None] * (pitch // 4) + word[None, :]
    tl.store(words, tl.trans(packed), mask=(d < D)[:, None])


@triton.jit
def _normalized(x, exists, mean, inverse, PTX: tl.constexpr):
    """V without the mean, in units of the channels, as the mean is; 0 for keys that do not count, of which x is 0."""
    return widen(x, PTX) * inverse[None, :] - exists.to(tl.float32)[:, None] * mean[None, :]


@triton.jit
def copy_v_block(
    tile, v, v8, cu_seqlens_k, kv_heads, kv_len, kv_blocks, stride_b, stride_h, stride_n, stride_d,
    ALIGN: tl.constexpr, VARLEN: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr,
    TRANSPOSED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Copy number `tile` of the blocks of 128 rows of V, in 16 bits: that waits for no statistics."""
    blocks = tl.cdiv(kv_len, _KEY_BLOCK)
    block = tile % blocks
    bh = tile // blocks
    b = bh // kv_heads
    h = bh % kv_heads
    start, length, block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
    if block * _KEY_BLOCK < length:
        stride_row = stride_n.to(tl.int64) * ALIGN
        source = v + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * ALIGN + start * stride_row
        pitch = kv_blocks.to(tl.int64) * _KEY_BLOCK
        column = (block0 + block).to(tl.int64) * _KEY_BLOCK
        target = v8 + h * D * pitch + (column if TRANSPOSED else column * D)
        _copy_v(source, target, pitch, block, length, stride_row, stride_d, DIM, D, D_POW2, TRANSPOSED, PTX)


@triton.jit
def _copy_v(
    source, target, pitch, block, length, stride_n, stride_d,
    DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, TRANSPOSED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + r
    d = tl.arange(0, D_POW2)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=(n < length)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    y = to_float(x.to(tl.float32), target.dtype.element_ty, PTX)
    if TRANSPOSED:
        tl.store(target + d.to(tl.int64)[:, None] * pitch + r[None, :], tl.trans(y), mask=(d < D)[:, None])
    else:
        tl.store(target + r[:, None] * D + d[None, :], y, mask=(d < D)[None, :])
