"""Device code that turns Q, K and V into 8 bits, and the layout of the workspace it writes.

Two launches: `statistics_kernel` looks at up to `SAMPLES` keys per sequence and head, `quantize_kernel` reads
Q, K and V once, in place through their strides, and writes

    q8      int8  [heads, q_blocks * 128, D]  one scale per row, with the softmax scale and log2(e) in it
    k8      int8  [kv_heads, kv_blocks * 128, D]  K minus a per-channel vector, one scale per 128-key block
    v8      e4m3 or int8  [kv_heads * DV, kv_blocks * 128]  V / channel scale / block scale, transposed
            or a 16-bit float  [kv_heads, kv_blocks * 128, DV]  a copy of V ("accurate"), transposed if V_TRANSPOSED
    scales  fp32, the sections listed in `sections`

D and DV are the padded head dims (`padded_head_dim`). A sequence owns whole blocks of 128 rows, so dense and
varlen inputs share one layout: sequence b starts at block b * ceil(length / 128), or at cu_seqlens[b] // 128
+ b, which never overlaps and needs no look at the lengths from the host.

Why a sample is enough: softmax is invariant to *any* vector subtracted from K, so the vector need not be the
exact mean, and V's channel scale only has to be coarse because every 128-key block has an exact scale of its
own.

Why Q passes through memory too: quantising it in the attention kernel's prologue would save this pass (4% at
4k tokens, 1% at 16k), but it costs the registers of the prologue.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import finite_or_zero, magnitude, round_to_int8, scale_or_nan, to_float, to_float8

KEY_BLOCK = 128  # keys per K scale, V scale and P scale; rows per program, of Q too
SAMPLES = 512  # keys per (sequence, head) that the statistics look at

_KEY_BLOCK = tl.constexpr(KEY_BLOCK)
_SAMPLES = tl.constexpr(SAMPLES)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Scales below this are of no use to anyone and their reciprocals overflow; zero blocks get it and quantise to
# zeros.
_TINY = tl.constexpr(2.0**-100)
# V's block scales are units of the accumulator, so their ratios must stay far from overflow.
_V_FLOOR = tl.constexpr(2.0**-30)
_E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # of 448.0
_V_CHANNEL_RANGE = tl.constexpr(64.0)  # no channel scale is below 1/64 of the largest


def padded_head_dim(head_dim: int) -> tuple[int, int]:
    """(first, second): the head dim as a sum of two powers of two (second may be 0), each one a tile of the
    kernels.

    96 is 64 + 32 and costs 3/4 of 128. 32 is the least: the k of one 8-bit tensor core instruction.
    """
    first = 32
    while first * 2 <= head_dim:
        first *= 2
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = 32
    while second < rest:
        second *= 2
    return (first * 2, 0) if second == first else (first, second)


@triton.jit
def sections(scales, q_size, batch, kv_heads, kv_blocks, D: tl.constexpr, DV: tl.constexpr):
    """The parts of the fp32 workspace after the q_size elements that belong to Q (its scales [heads, q_blocks
    * 128] and, when the LSE is asked for, as many shifts): K scales and log2 of V scales [kv_heads,
    kv_blocks], the vector subtracted from K [batch, kv_heads, D], V's channel scales and their reciprocals
    [batch, kv_heads, 2, DV], and, written only for masks over keys, int32 [batch, 3]: the first useful key, the
    last + 1, and whether every key between them is useful."""
    k_scale = scales + q_size
    v_scale = k_scale + kv_heads * kv_blocks
    k_mean = v_scale + kv_heads * kv_blocks
    v_channel = k_mean + batch * kv_heads * D
    used_keys = v_channel + batch * kv_heads * 2 * DV
    return k_scale, v_scale, k_mean, v_channel, used_keys


def scales_size(q_size: int, batch: int, kv_heads: int, kv_blocks: int, d: int, dv: int) -> int:
    """Elements of the fp32 workspace."""
    return q_size + 2 * kv_heads * kv_blocks + batch * (kv_heads * (d + 2 * dv) + 3)


@triton.jit
def sequence(b, length, cu_seqlens, VARLEN: tl.constexpr):
    """(first row of sequence b inside its tensor, its length, its first block in the workspace)."""
    if VARLEN:
        start = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - start
        return start.to(tl.int64), length, start // _KEY_BLOCK + b
    else:
        return 0, length, b * tl.cdiv(length, _KEY_BLOCK)


@triton.jit
def _sampled_rows(chunk, kv_len, CHUNK: tl.constexpr):
    """Evenly spaced keys number chunk * CHUNK onwards: (rows, which of them exist, how many there are in
    all)."""
    count = tl.minimum(kv_len, _SAMPLES)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    return i.to(tl.int64) * kv_len // tl.maximum(count, 1), i < count, count


@triton.jit
def _load_sample(x, stride_n, stride_d, rows, exists, DIM: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, D)
    tile = tl.load(
        x + rows[:, None] * stride_n + d[None, :] * stride_d,
        mask=exists[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    return finite_or_zero(tile)


_STATISTICS_UNSPECIALIZED = [
    "q_size",
    "batch",
    "kv_heads",
    "kv_len",
    "kv_blocks",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_vb",
    "stride_vh",
    "stride_vn",
    "stride_mb",
]


@triton.jit(do_not_specialize=_STATISTICS_UNSPECIALIZED)
def statistics_kernel(
    k,
    v,
    cu_seqlens_k,
    key_mask,
    scales,
    q_size,
    batch,
    kv_heads,
    kv_len,
    kv_blocks,
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
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    VARLEN: tl.constexpr,
    V_STATISTICS: tl.constexpr,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_POW2: tl.constexpr,
    DV_POW2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per (sequence, kv head) for K, one for V if V_STATISTICS, then one per sequence for a key
    mask."""
    pid = tl.program_id(0)
    heads = batch * kv_heads
    _k_scale, _v_scale, k_mean, v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    role = pid // heads
    bh = pid % heads
    b = bh // kv_heads
    h = (bh % kv_heads).to(tl.int64)
    if role == 0:
        start, length, block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        stride_n = stride_kn.to(tl.int64) * K_ALIGN
        source = k + (b.to(tl.int64) * stride_kb + h * stride_kh) * K_ALIGN + start * stride_n
        mean = tl.zeros([D_POW2], tl.float32)
        for chunk in range(tl.cdiv(tl.minimum(length, _SAMPLES), CHUNK)):
            rows, exists, count = _sampled_rows(chunk, length, CHUNK)
            tile = _load_sample(source, stride_n, stride_kd, rows, exists, HEAD_DIM, D_POW2)
            mean += tl.sum(tile * (1.0 / count), 0)  # scaled first: a sum of large values would overflow
        d = tl.arange(0, D_POW2)
        tl.store(k_mean + bh * D + d, mean, mask=d < D)
    elif V_STATISTICS and role == 1:
        start, length, _block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        stride_n = stride_vn.to(tl.int64) * V_ALIGN
        source = v + (b.to(tl.int64) * stride_vb + h * stride_vh) * V_ALIGN + start * stride_n
        size = tl.zeros([DV_POW2], tl.float32)
        for chunk in range(tl.cdiv(tl.minimum(length, _SAMPLES), CHUNK)):
            rows, exists, count = _sampled_rows(chunk, length, CHUNK)
            tile = _load_sample(source, stride_n, stride_vd, rows, exists, V_HEAD_DIM, DV_POW2)
            size += tl.sum(tl.sqrt(tl.abs(tile)), 0) * (1.0 / count)
        # The 1/2-mean: a maximum would make the channels as uneven as one outlier token in the sample is.
        size = size * size
        largest = tl.max(size, 0)
        size = tl.where(largest < _TINY, 1.0, tl.maximum(size, largest / _V_CHANNEL_RANGE))
        d = tl.arange(0, DV_POW2)
        tl.store(v_channel + bh * 2 * DV + d, size, mask=d < DV)
        tl.store(v_channel + bh * 2 * DV + DV + d, 1.0 / size, mask=d < DV)
    elif MASK != 0:
        _used_keys(key_mask, used_keys, bh, kv_len, stride_mb, stride_mn, MASK)


@triton.jit
def _used_keys(key_mask, used_keys, b, kv_len, stride_mb, stride_mn, MASK: tl.constexpr):
    """First and last + 1 key of sequence b that its mask does not rule out, and whether there are no gaps."""
    first = tl.full([1024], 0x7FFFFFFF, tl.int32)
    last = tl.full([1024], -1, tl.int32)
    count = tl.zeros([1024], tl.int32)
    source = key_mask + b.to(tl.int64) * stride_mb
    for start in range(0, kv_len, 1024):
        n = start + tl.arange(0, 1024)
        values = tl.load(source + n.to(tl.int64) * stride_mn, mask=n < kv_len, other=0)
        if MASK == 1:
            used = (values != 0) & (n < kv_len)
        else:
            used = (values.to(tl.float32) != float("-inf")) & (n < kv_len)
        first = tl.minimum(first, tl.where(used, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(used, n, -1))
        count += used.to(tl.int32)
    begin = tl.min(first, 0)
    end = tl.max(last, 0) + 1
    target = (used_keys + 3 * b).to(tl.pointer_type(tl.int32))
    tl.store(target, begin)
    tl.store(target + 1, end)
    tl.store(target + 2, (tl.sum(count, 0) == end - begin).to(tl.int32))


_QUANTIZE_UNSPECIALIZED = [
    "scale",
    "q_size",
    "batch",
    "heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "q_blocks",
    "kv_blocks",
    "stride_qb",
    "stride_qh",
    "stride_qn",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_vb",
    "stride_vh",
    "stride_vn",
]


@triton.jit(do_not_specialize=_QUANTIZE_UNSPECIALIZED)
def quantize_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
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
    Q_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    V_ALIGN: tl.constexpr,
    VARLEN: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_POW2: tl.constexpr,
    DV_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    V_TRANSPOSED: tl.constexpr,
    PTX: tl.constexpr,
):
    """One program per (sequence, head, block of 128 rows) of V, then of K, then of Q.

    Strides but the last of each tensor come in units of *_ALIGN elements; q_len and kv_len are the longest of
    a varlen call.
    """
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
        if block * _KEY_BLOCK < length:
            if is_k:
                stride_n = stride_kn.to(tl.int64) * K_ALIGN
                source = (
                    k + (b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh) * K_ALIGN + start * stride_n
                )
                _quantize_k(
                    source, k8, k_scale + slot, k_mean + bh * D, slot, block, length, stride_n, stride_kd,
                    HEAD_DIM, D, D_POW2,
                )  # fmt: skip
            else:
                stride_n = stride_vn.to(tl.int64) * V_ALIGN
                source = (
                    v + (b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh) * V_ALIGN + start * stride_n
                )
                # The block's columns inside [kv_heads * DV, kv_blocks * 128].
                pitch = kv_blocks.to(tl.int64) * _KEY_BLOCK
                target = v8 + h * DV * pitch + (block0 + block).to(tl.int64) * _KEY_BLOCK
                if PRECISION == "accurate":
                    if not V_TRANSPOSED:
                        target = v8 + slot.to(tl.int64) * _KEY_BLOCK * DV
                    _copy_v(
                        source, target, pitch, block, length, stride_n, stride_vd, V_HEAD_DIM, DV, DV_POW2,
                        V_TRANSPOSED, PTX,
                    )  # fmt: skip
                else:
                    _quantize_v(
                        source, target, pitch, v_scale + slot, v_channel + bh * 2 * DV + DV, block, length, stride_n,
                        stride_vd, V_HEAD_DIM, DV, DV_POW2, PRECISION, PTX,
                    )  # fmt: skip
    else:
        blocks = tl.cdiv(q_len, _KEY_BLOCK)
        tile = pid - 2 * programs
        block = tile % blocks
        bh = tile // blocks
        b = bh // heads
        h = bh % heads
        kv_h = h // (heads // kv_heads)
        start, length, block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
        slot = h * q_blocks + block0 + block
        if block * _KEY_BLOCK < length:
            stride_n = stride_qn.to(tl.int64) * Q_ALIGN
            source = (
                q + (b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh) * Q_ALIGN + start * stride_n
            )
            _quantize_q(
                source, q8, scales, scales + q_size // 2, k_mean + (b * kv_heads + kv_h) * D, scale, slot, block,
                length, stride_n, stride_qd, HEAD_DIM, D, D_POW2, RETURN_LSE,
            )  # fmt: skip


@triton.jit
def _quantize_q(
    source, q8, q_scale, q_shift, k_mean, scale, slot, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + r
    d = tl.arange(0, D_POW2)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    amax = scale_or_nan(tl.max(magnitude(x), 1), _TINY)
    row = slot.to(tl.int64) * _KEY_BLOCK + r
    # The sign of the softmax scale goes into the integers: row maxima are taken of them.
    tl.store(q_scale + row, amax * (tl.abs(scale) * (_LOG2_E / 127.0)))
    inverse = tl.where(scale < 0, -127.0, 127.0) / amax
    tl.store(q8 + row[:, None] * D + d[None, :], round_to_int8(x * inverse[:, None]), mask=(d < D)[None, :])
    if RETURN_LSE:
        # What subtracting a vector from every key takes from every score of the row.
        mean = tl.load(k_mean + d, mask=d < D, other=0.0)
        tl.store(q_shift + row, scale * tl.sum(x * mean[None, :], 1))


@triton.jit
def _quantize_k(
    source, k8, scale, mean, slot, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + r
    d = tl.arange(0, D_POW2)
    exists = n < length
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=exists[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    # One fused multiply-add: rows that do not exist stay 0.
    x = x - exists.to(tl.float32)[:, None] * tl.load(mean + d, mask=d < D, other=0.0)[None, :]
    amax = scale_or_nan(tl.max(tl.max(magnitude(x), 1), 0), _TINY)
    tl.store(scale, amax / 127.0)
    offset = (slot.to(tl.int64) * _KEY_BLOCK + r)[:, None] * D + d[None, :]
    tl.store(k8 + offset, round_to_int8(x * (127.0 / amax)), mask=(d < D)[None, :])


@triton.jit
def _quantize_v(
    source, target, pitch, log2_scale, reciprocal, block, length, stride_n, stride_d,
    DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    # Column c of the transposed block holds key [0,1,8,9,2,3,10,11,4,5,12,13,6,7,14,15][c] of its group of
    # 16: the order in which a thread's accumulator elements of QK^T become its 8-bit A operand of PV without
    # a shuffle.
    c = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + ((c & -16) | (c & 1) | ((c & 2) << 2) | ((c & 12) >> 1))
    d = tl.arange(0, D_POW2)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=(n < length)[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    x = x * tl.load(reciprocal + d, mask=d < D, other=1.0)[None, :]
    bits = tl.max(tl.max(magnitude(x), 1), 0)
    if PRECISION == "fast":
        # e4m3 is as precise over 14 powers of two, and a typical value is 1 here: only a block with a value
        # beyond its range needs a scale. So nearly all blocks have the same, and their products can be
        # summed up before they are scaled.
        unit = tl.where(bits > _E4M3_MAX_BITS, scale_or_nan(bits, 1.0) * (1.0 / 448.0), 1.0)
        y = to_float8(x / unit, PTX)
        tl.store(log2_scale, tl.log2(unit))
    else:
        # A block of zeros gets the scale of a typical one.
        amax = scale_or_nan(tl.where(bits == 0, 0x3F800000, bits), _V_FLOOR)
        y = round_to_int8(x * (127.0 / amax))
        tl.store(log2_scale, tl.log2(amax / 127.0))
    tl.store(target + d.to(tl.int64)[:, None] * pitch + c[None, :], tl.trans(y), mask=(d < D)[:, None])


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
