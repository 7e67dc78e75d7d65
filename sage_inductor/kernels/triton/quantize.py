"""Device code that turns Q, K and V into 8 bits, and the layout of the workspace it writes.

Two launches, which read Q, K and V in place through their strides: `statistics_kernel` looks at up to `SAMPLES` keys per
sequence and head, which waits for memory more than it uses it, and quantises Q meanwhile; `quantize_kernel` does K and
V, and Q where the LSE is asked for, to which the statistics of K belong. They write

    q8      int8  [heads, q_blocks * 128, D]  one scale per row, with the softmax scale and log2(e) in it
    k8      int8  [kv_heads, kv_blocks * 128, D]  K minus a per-channel vector, one scale per 128-key block
    v8      e4m3 or int8  [kv_heads * DV, kv_blocks * 128]  (V minus a per-channel vector) / channel scale
            / block scale, transposed
            or a 16-bit float  [kv_heads, kv_blocks * 128, DV]  a copy of V ("accurate"), transposed if V_TRANSPOSED
    scales  fp32, the sections listed in `sections`

D and DV are the padded head dims (`padded_head_dim`). A sequence owns whole blocks of 128 rows, so dense and
varlen inputs share one layout: sequence b starts at block b * ceil(length / 128), or at cu_seqlens[b] // 128
+ b, which never overlaps and needs no look at the lengths from the host.

Why a sample is enough: softmax is invariant to *any* vector subtracted from K, and its rows add up to one, so
that any vector subtracted from V is added back to the output: neither need be the exact mean. V's channel scale
only has to be coarse because every 128-key block has an exact scale of its own.

Keys that a mask over keys, the same for every head and query, rules out are not sampled, and 0 in 8 bits: padding
may hold anything.

Why Q passes through memory too: quantising it in the attention kernel's prologue would save this pass (4% at
4k tokens, 1% at 16k), but it costs the registers of the prologue.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .numerics import finite_or_zero, magnitude, pack_four, round_to_int8, scale_or_nan, to_float

KEY_BLOCK = 128  # keys per K scale, V scale and P scale; rows per program, of Q too
SAMPLES = 512  # keys per (sequence, head) that the statistics look at

_KEY_BLOCK = tl.constexpr(KEY_BLOCK)
_SAMPLES = tl.constexpr(SAMPLES)
_MASK_STEP = tl.constexpr(4096)  # keys whose mask is looked at at once
_LOG2_E = tl.constexpr(1.4426950408889634)
# Scales below this are of no use to anyone and their reciprocals overflow; zero blocks get it and quantise to
# zeros.
_TINY = tl.constexpr(2.0**-100)
# V's block scales are units of the accumulator, so their ratios must stay far from overflow.
_V_FLOOR = tl.constexpr(2.0**-30)
_E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # of 448.0
_V_CHANNEL_RANGE = tl.constexpr(64.0)  # no channel scale is below 1/64 of the largest
# A value of V further from the centre than this many times its channel's size weighs as one at that distance in the
# mean. 5.4 standard deviations of normal values without a mean: one such token of 512 moves it by a hundredth of one.
_OUTLIER = tl.constexpr(8.0)
_LEAST_MEAN = tl.constexpr(0.25)  # of a channel's size: V's mean is not subtracted below


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
    kv_blocks], the vector subtracted from K [batch, kv_heads, D], V's channel scales, what the sample says they
    should be and the vector subtracted from V [batch, kv_heads, 3, DV], and, written only for masks over keys,
    int32 [batch, 3]: the first useful key, the last + 1, and whether every key between them is useful; last an
    int32 zero, for a kernel that counts what it has done."""
    k_scale = scales + q_size
    v_scale = k_scale + kv_heads * kv_blocks
    k_mean = v_scale + kv_heads * kv_blocks
    v_channel = k_mean + batch * kv_heads * D
    used_keys = v_channel + batch * kv_heads * 3 * DV
    return k_scale, v_scale, k_mean, v_channel, used_keys


def scales_size(q_size: int, batch: int, kv_heads: int, kv_blocks: int, d: int, dv: int) -> int:
    """Elements of the fp32 workspace."""
    return q_size + 2 * kv_heads * kv_blocks + batch * (kv_heads * (d + 3 * dv) + 3) + 1


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
def _sampled_rows(i, length, mask, stride_mn, MASK: tl.constexpr):
    """Number i of the evenly spaced keys of a sequence, and whether it counts."""
    spaced = (i.to(tl.int64) * length) // _SAMPLES
    rows = tl.where(length < _SAMPLES, i, spaced)
    return rows, _counts(rows, i < tl.minimum(length, _SAMPLES), mask, stride_mn, MASK)


@triton.jit
def _load_sample(
    x, stride_n, stride_d, first_d, length, mask, stride_mn,
    DIM: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Some channels of the sampled keys [SAMPLES, GROUP], 0 where they are not finite; which keys count; and one
    over how many do."""
    rows, counted = _sampled_rows(tl.arange(0, _SAMPLES), length, mask, stride_mn, MASK)
    count = tl.minimum(length, _SAMPLES)
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


_STATISTICS_UNSPECIALIZED = [
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
    "stride_mb",
]


@triton.jit(do_not_specialize=_STATISTICS_UNSPECIALIZED)
def statistics_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    key_mask,
    q8,
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
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_POW2: tl.constexpr,
    Q_ROWS: tl.constexpr,
    V_STATISTICS: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per GROUP channels of K and of V, if V_STATISTICS, for each sequence and kv head; then one per
    sequence for a key mask. A group's sample is held in registers, so that memory is waited for once. Evenly between
    them, without RETURN_LSE, one program per (sequence, head, block of Q_ROWS rows) of Q. Strides as in
    `quantize_kernel`."""
    if OVERLAP:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    _k_scale, _v_scale, k_mean, v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    if pid == 0:
        tl.store((used_keys + 3 * batch).to(tl.pointer_type(tl.int32)), 0)
    K_GROUPS: tl.constexpr = D // GROUP
    V_GROUPS: tl.constexpr = DV // GROUP if V_STATISTICS else 0
    if not RETURN_LSE:
        own = batch * kv_heads * (K_GROUPS + V_GROUPS)
        if MASK != 0:
            own += batch
        before = (pid.to(tl.int64) * own // tl.num_programs(0)).to(tl.int32)
        if ((pid + 1).to(tl.int64) * own // tl.num_programs(0)).to(tl.int32) == before:
            _quantize_q_block(
                pid - before, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
                stride_qb, stride_qh, stride_qn, stride_qd, Q_ALIGN, VARLEN, RETURN_LSE, HEAD_DIM, D, D_POW2, Q_ROWS,
            )  # fmt: skip
            return
        pid = before
    # Neighbours read neighbouring channels of the same keys: 32 bytes each of what memory gives 64 at a time.
    group = pid % (K_GROUPS + V_GROUPS)
    bh = pid // (K_GROUPS + V_GROUPS)
    if bh < batch * kv_heads:
        b = bh // kv_heads
        h = (bh % kv_heads).to(tl.int64)
        start, length, _block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        mask = key_mask
        if MASK != 0:
            mask += b.to(tl.int64) * stride_mb
            first, end, _count = _used_range(mask, length, stride_mn, MASK)
            length = tl.maximum(end - first, 0)
            start = first.to(tl.int64)
            mask += start * stride_mn
        if group < K_GROUPS:
            d = group * GROUP + tl.arange(0, GROUP)
            stride_n = stride_kn.to(tl.int64) * K_ALIGN
            source = k + (b.to(tl.int64) * stride_kb + h * stride_kh) * K_ALIGN + start * stride_n
            tile, _counted, weight = _load_sample(
                source, stride_n, stride_kd, group * GROUP, length, mask, stride_mn, HEAD_DIM, GROUP, MASK
            )
            # Scaled first: a sum of large values would overflow.
            tl.store(k_mean + bh * D + d, tl.sum(tile * weight, 0))
        else:
            group -= K_GROUPS
            d = group * GROUP + tl.arange(0, GROUP)
            stride_n = stride_vn.to(tl.int64) * V_ALIGN
            source = v + (b.to(tl.int64) * stride_vb + h * stride_vh) * V_ALIGN + start * stride_n
            tile, counted, weight = _load_sample(
                source, stride_n, stride_vd, group * GROUP, length, mask, stride_mn, V_HEAD_DIM, GROUP, MASK
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
            channel = v_channel + bh * 3 * DV + d
            # Until the first block is quantised, if there is one.
            tl.store(channel, tl.full([GROUP], 1.0, tl.float32))
            tl.store(channel + DV, size)
            tl.store(channel + 2 * DV, mean)
    elif MASK != 0:
        b = pid - batch * kv_heads * (K_GROUPS + V_GROUPS)
        first, end, count = _used_range(key_mask + b.to(tl.int64) * stride_mb, kv_len, stride_mn, MASK)
        target = (used_keys + 3 * b).to(tl.pointer_type(tl.int32))
        tl.store(target, first)
        tl.store(target + 1, end)
        tl.store(target + 2, (count == end - first).to(tl.int32))


@triton.jit
def used_keys_of(values, MASK: tl.constexpr):
    """Which keys a mask does not rule out, from its values."""
    if MASK == 1:
        return values != 0
    else:
        return values.to(tl.float32) != float("-inf")


@triton.jit
def _counts(n, exists, mask, stride_mn, MASK: tl.constexpr):
    """Which of the keys n exist and are not ruled out by a mask over keys."""
    if MASK != 0:
        exists = exists & used_keys_of(tl.load(mask + n.to(tl.int64) * stride_mn, mask=exists, other=0), MASK)
    return exists


@triton.jit
def _used_range(mask, kv_len, stride_mn, MASK: tl.constexpr):
    """First and last + 1 key of a sequence that its mask does not rule out (the largest integer and 0 where it
    rules out all), and how many there are."""
    first = tl.full([_MASK_STEP], 0x7FFFFFFF, tl.int32)
    last = tl.full([_MASK_STEP], -1, tl.int32)
    count = tl.zeros([_MASK_STEP], tl.int32)
    for start in range(0, kv_len, _MASK_STEP):
        n = start + tl.arange(0, _MASK_STEP)
        used = _counts(n, n < kv_len, mask, stride_mn, MASK)
        first = tl.minimum(first, tl.where(used, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(used, n, -1))
        count += used.to(tl.int32)
    return tl.min(first, 0), tl.max(last, 0) + 1, tl.sum(count, 0)


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
    "stride_mb",
]


@triton.jit(do_not_specialize=_QUANTIZE_UNSPECIALIZED)
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
    """One program per (sequence, head, block of 128 rows) of V, then of K, then, if RETURN_LSE, of Q.

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
                    source, k8, k_scale + slot, k_mean + bh * D, slot, block, length, stride_n, stride_kd,
                    mask, stride_mn, HEAD_DIM, D, D_POW2, MASK, OVERLAP,
                )  # fmt: skip
                if PRECISION != "accurate" and block == 0:
                    # V's programs have no registers left for it.
                    d = tl.arange(0, DV_POW2)
                    channel = v_channel + bh * 3 * DV
                    tl.store(channel + d, _channel_scales(channel, DV, DV_POW2), mask=d < DV)
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
                    if OVERLAP:
                        gdc_wait()
                else:
                    _quantize_v(
                        source, target, pitch, v_scale + slot, v_channel + bh * 3 * DV, block, length, stride_n,
                        stride_vd, mask, stride_mn, V_HEAD_DIM, DV, DV_POW2, PRECISION, MASK, PTX, OVERLAP,
                    )  # fmt: skip
        elif OVERLAP:
            gdc_wait()
    elif RETURN_LSE:
        if OVERLAP:
            gdc_wait()
        _quantize_q_block(
            pid - 2 * programs, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
            stride_qb, stride_qh, stride_qn, stride_qd, Q_ALIGN, VARLEN, RETURN_LSE, HEAD_DIM, D, D_POW2, _KEY_BLOCK,
        )  # fmt: skip


@triton.jit
def _quantize_q_block(
    tile, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
    stride_qb, stride_qh, stride_qn, stride_qd,
    ALIGN: tl.constexpr, VARLEN: tl.constexpr, RETURN_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    D_POW2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Number `tile` of the blocks of ROWS rows of Q."""
    blocks = tl.cdiv(q_len, _KEY_BLOCK) * (_KEY_BLOCK // ROWS)
    block = tile % blocks
    bh = tile // blocks
    b = bh // heads
    h = bh % heads
    kv_h = h // (heads // kv_heads)
    start, length, block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
    if block * ROWS < tl.cdiv(length, _KEY_BLOCK) * _KEY_BLOCK:
        stride_n = stride_qn.to(tl.int64) * ALIGN
        source = q + (b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh) * ALIGN + start * stride_n
        _quantize_q(
            source, q8, scales, scales + q_size // 2, k_mean + (b * kv_heads + kv_h) * D, scale,
            h * q_blocks + block0, block, length, stride_n, stride_qd, HEAD_DIM, D, D_POW2, RETURN_LSE, ROWS,
        )  # fmt: skip


@triton.jit
def _quantize_q(
    source, q8, q_scale, q_shift, k_mean, scale, slot, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    n = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_POW2)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    amax = scale_or_nan(tl.max(magnitude(x), 1), _TINY)
    row = slot.to(tl.int64) * _KEY_BLOCK + n
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
    source, k8, scale, mean, slot, block, length, stride_n, stride_d, mask, stride_mn,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, MASK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, _KEY_BLOCK)
    n = block * _KEY_BLOCK + r
    d = tl.arange(0, D_POW2)
    exists = _counts(n, n < length, mask, stride_mn, MASK)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=exists[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    # One fused multiply-add: rows that do not exist or count stay 0.
    x = x - exists.to(tl.float32)[:, None] * tl.load(mean + d, mask=d < D, other=0.0)[None, :]
    amax = scale_or_nan(tl.max(tl.max(magnitude(x), 1), 0), _TINY)
    tl.store(scale, amax / 127.0)
    offset = (slot.to(tl.int64) * _KEY_BLOCK + r)[:, None] * D + d[None, :]
    tl.store(k8 + offset, round_to_int8(x * (127.0 / amax)), mask=(d < D)[None, :])


@triton.jit
def _channel_scales(channel, D: tl.constexpr, D_POW2: tl.constexpr):
    """V's, from what the sample says."""
    d = tl.arange(0, D_POW2)
    size = tl.load(channel + D + d, mask=d < D, other=0.0)
    largest = tl.max(size, 0)
    return tl.where(largest < _TINY, 1.0, tl.maximum(size, largest / _V_CHANNEL_RANGE))


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
    e0 = _counts(n, n < length, mask, stride_mn, MASK)
    e1 = _counts(n + 1, n + 1 < length, mask, stride_mn, MASK)
    e2 = _counts(n + 8, n + 8 < length, mask, stride_mn, MASK)
    e3 = _counts(n + 9, n + 9 < length, mask, stride_mn, MASK)
    x0 = tl.load(source, mask=e0[:, None] & in_head, other=0.0)
    x1 = tl.load(source + stride_n, mask=e1[:, None] & in_head, other=0.0)
    x2 = tl.load(source + 8 * stride_n, mask=e2[:, None] & in_head, other=0.0)
    x3 = tl.load(source + 9 * stride_n, mask=e3[:, None] & in_head, other=0.0)
    if OVERLAP:
        gdc_wait()
    # Behind the loads: they would wait for its barrier.
    reciprocal = 1.0 / _channel_scales(channel, D, D_POW2)
    mean = tl.load(channel + 2 * D + d, mask=d < D, other=0.0)
    x0 = _normalized(x0, e0, mean, reciprocal)
    x1 = _normalized(x1, e1, mean, reciprocal)
    x2 = _normalized(x2, e2, mean, reciprocal)
    x3 = _normalized(x3, e3, mean, reciprocal)
    bits = tl.maximum(tl.maximum(magnitude(x0), magnitude(x1)), tl.maximum(magnitude(x2), magnitude(x3)))
    bits = tl.max(tl.max(bits, 0), 0)  # over the words first: the other order spills two registers
    if PRECISION == "fast":
        # e4m3 is as precise over 14 powers of two, and a typical value is 1 here: only a block with a value
        # beyond its range needs a scale. So nearly all blocks have the same, and their products can be
        # summed up before they are scaled.
        unit = tl.where(bits > _E4M3_MAX_BITS, scale_or_nan(bits, 1.0) * (1.0 / 448.0), 1.0)
        factor = 1.0 / unit
    else:
        # A block of zeros gets the scale of a typical one.
        amax = scale_or_nan(tl.where(bits == 0, 0x3F800000, bits), _V_FLOOR)
        unit = amax / 127.0
        factor = 127.0 / amax
    tl.store(log2_scale, tl.log2(unit))
    packed = pack_four(x0 * factor, x1 * factor, x2 * factor, x3 * factor, PRECISION == "fast", PTX)
    words = target.to(tl.pointer_type(tl.int32)) + d.to(tl.int64)[:, None] * (pitch // 4) + word[None, :]
    tl.store(words, tl.trans(packed), mask=(d < D)[:, None])


@triton.jit
def _normalized(x, exists, mean, reciprocal):
    """V without the mean, in units of the channels; 0 for keys that do not count."""
    return tl.where(exists[:, None], (x.to(tl.float32) - mean[None, :]) * reciprocal[None, :], 0.0)


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
