"""Device code that evens the channels of K and Q (kernels/smoothing.py says how and why) and rounds them to 8 bits. It runs behind
the statistics and in front of the kernel that rounds V, where smoothing is more than K's mean. workspace.py describes what it
writes.

With AHEAD a program takes several blocks of one head, one after the other: the matrix, with the head's factors in its rows, and
the rotated mean are worked out once for them, and the rows of a block are on their way while the block in front is rounded. Without
it a program takes one, and `run_q` and `run_k` are 1.

Keys that a mask over keys rules out are 0 in 8 bits.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .numerics import largest_of_all, magnitude, scale_or_nan
from .quantize import write_channel_scales
from .queries import LOG2_E
from .smoothing import (
    TINY,
    common_norm,
    evened,
    evening,
    load_rows,
    store_rows,
    tile_first,
    tile_size,
    tile_width,
    tiles_of,
)
from .workspace import _KEY_BLOCK, UNSPECIALIZED, counts, sections, sequence


@triton.jit(
    do_not_specialize=[name for name in UNSPECIALIZED if not name.startswith("stride_v")] + ["run_q", "run_k"]
)
def evened_kernel(
    q,
    k,
    cu_seqlens_q,
    cu_seqlens_k,
    key_mask,
    q8,
    k8,
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
    run_q,
    run_k,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_mb,
    stride_mn,
    Q_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    VARLEN: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_POW2: tl.constexpr,
    DV_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    EQUALISE: tl.constexpr,
    ROTATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (sequence, head, `run_k` blocks of 128 rows) of K, then, with `run_q`, of Q. Strides and OVERLAP as in `quantize_kernel`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    runs = tl.cdiv(tl.cdiv(kv_len, _KEY_BLOCK), run_k)
    programs = batch * kv_heads * runs
    k_scale, _v_scale, k_mean, v_channel, _used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    if pid < programs:
        first = pid % runs * run_k
        bh = pid // runs
        b = bh // kv_heads
        h = bh % kv_heads
        start, length, block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
        stride_n = stride_kn.to(tl.int64) * K_ALIGN
        source = k + (b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh) * K_ALIGN + start * stride_n
        mask = key_mask
        if MASK != 0:
            mask += b.to(tl.int64) * stride_mb
        _quantize_k(
            source, k8, k_scale, k_mean + bh * D, channel_sizes + bh * 2 * D if EQUALISE else channel_sizes, rotation,
            h * kv_blocks + block0, first, run_k, length, stride_n, stride_kd, mask, stride_mn, HEAD_DIM, D, D_POW2, MASK,
            EQUALISE, ROTATION, AHEAD, PTX,
        )  # fmt: skip
        if PRECISION != "accurate" and first == 0 and length > 0:
            write_channel_scales(v_channel + bh * 4 * DV, DV, DV_POW2)
    else:
        pid -= programs
        runs = tl.cdiv(tl.cdiv(q_len, _KEY_BLOCK), run_q)
        first = pid % runs * run_q
        bh = pid // runs
        b = bh // heads
        h = bh % heads
        kv_bh = b * kv_heads + h // (heads // kv_heads)
        start, length, block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
        stride_n = stride_qn.to(tl.int64) * Q_ALIGN
        source = q + (b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh) * Q_ALIGN + start * stride_n
        _quantize_q(
            source, q8, scales, scales + q_size // 2, k_mean + kv_bh * D,
            channel_sizes + kv_bh * 2 * D if EQUALISE else channel_sizes, rotation, scale, h * q_blocks + block0, first,
            run_q, length, stride_n, stride_qd, HEAD_DIM, D, D_POW2, RETURN_LSE, EQUALISE, ROTATION, AHEAD, PTX,
        )  # fmt: skip


@triton.jit
def _quantize_k(
    source, k8, scale, mean, sizes, rotation, slot, first, run, length, stride_n, stride_d, mask, stride_mn,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, MASK: tl.constexpr, EQUALISE: tl.constexpr,
    ROTATION: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = source.dtype.element_ty
    end = tl.minimum(first + run, tl.cdiv(length, _KEY_BLOCK))
    if AHEAD:
        by, less = evening(
            mean, sizes, rotation, HEAD_DIM, D, D_POW2, 0, True, EQUALISE, ROTATION, dtype, PTX
        )
        if first < end:
            y = _evened_k(
                source, by, less, first, length, stride_n, stride_d, mask, stride_mn, HEAD_DIM, D_POW2, MASK, ROTATION,
                PTX,
            )  # fmt: skip
            for block in tl.range(first + 1, end, num_stages=2):
                # Its rows are on their way meanwhile.
                _round_k(y, y, k8, scale, slot + block - 1, D, D_POW2, ROTATION)
                y = _evened_k(
                    source, by, less, block, length, stride_n, stride_d, mask, stride_mn, HEAD_DIM, D_POW2, MASK,
                    ROTATION, PTX,
                )  # fmt: skip
            _round_k(y, y, k8, scale, slot + end - 1, D, D_POW2, ROTATION)
    elif first < end:
        # Rows first: shared memory may have no room for them beside the matrix.
        n = first * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
        exists = counts(n, n < length, mask, stride_mn, MASK)
        rows = source + n.to(tl.int64) * stride_n
        x = load_rows(rows, exists, stride_d, HEAD_DIM, D_POW2, 0, ROTATION)
        by, less = evening(
            mean, sizes, rotation, HEAD_DIM, D, D_POW2, 0, True, EQUALISE, ROTATION, dtype, PTX
        )
        y0 = evened(x, exists, by, less, 0, True, ROTATION, PTX)
        y1 = y0
        if tiles_of(ROTATION) == 2:
            x = load_rows(rows, exists, stride_d, HEAD_DIM, D_POW2, 1, ROTATION)
            by, less = evening(
                mean, sizes, rotation, HEAD_DIM, D, D_POW2, 1, True, EQUALISE, ROTATION, dtype, PTX
            )
            y1 = evened(x, exists, by, less, 1, True, ROTATION, PTX)
        _round_k(y0, y1, k8, scale, slot + first, D, D_POW2, ROTATION)


@triton.jit
def _evened_k(
    source, by, less, block, length, stride_n, stride_d, mask, stride_mn,
    HEAD_DIM: tl.constexpr, D_POW2: tl.constexpr, MASK: tl.constexpr, ROTATION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    n = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    exists = counts(n, n < length, mask, stride_mn, MASK)
    x = load_rows(source + n.to(tl.int64) * stride_n, exists, stride_d, HEAD_DIM, D_POW2, 0, ROTATION)
    return evened(x, exists, by, less, 0, True, ROTATION, PTX)


@triton.jit
def _round_k(y0, y1, k8, scale, slot, D: tl.constexpr, D_POW2: tl.constexpr, ROTATION: tl.constexpr):
    """Both tiles of channels of a block; `y1` is not looked at where there is one."""
    bits = largest_of_all(magnitude(y0))
    if tiles_of(ROTATION) == 2:
        bits = tl.maximum(bits, largest_of_all(magnitude(y1)))
    amax = scale_or_nan(bits, TINY)
    tl.store(scale + slot, amax * (common_norm(ROTATION) / 127.0))
    target = k8 + (slot.to(tl.int64) * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)) * D
    store_rows(target, y0 * (127.0 / amax), D, D_POW2, 0, ROTATION)
    if tiles_of(ROTATION) == 2:
        store_rows(target, y1 * (127.0 / amax), D, D_POW2, 1, ROTATION)


@triton.jit
def _quantize_q(
    source, q8, q_scale, q_shift, k_mean, sizes, rotation, scale, slot, first, run, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, EQUALISE: tl.constexpr,
    ROTATION: tl.constexpr, AHEAD: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = source.dtype.element_ty
    end = tl.minimum(first + run, tl.cdiv(length, _KEY_BLOCK))
    if AHEAD:
        by, _ = evening(
            k_mean, sizes, rotation, HEAD_DIM, D, D_POW2, 0, False, EQUALISE, ROTATION, dtype, PTX
        )
        if first < end:
            y, shift = _evened_q(
                source, by, k_mean, first, length, stride_n, stride_d, HEAD_DIM, D_POW2, RETURN_LSE, ROTATION, PTX,
            )  # fmt: skip
            for block in tl.range(first + 1, end, num_stages=2):
                # Its rows are on their way meanwhile.
                _round_q(
                    y,
                    y,
                    shift,
                    q8,
                    q_scale,
                    q_shift,
                    scale,
                    slot + block - 1,
                    D,
                    D_POW2,
                    RETURN_LSE,
                    ROTATION,
                )
                y, shift = _evened_q(
                    source, by, k_mean, block, length, stride_n, stride_d, HEAD_DIM, D_POW2, RETURN_LSE, ROTATION, PTX,
                )  # fmt: skip
            _round_q(
                y, y, shift, q8, q_scale, q_shift, scale, slot + end - 1, D, D_POW2, RETURN_LSE, ROTATION
            )
    elif first < end:
        # As of K.
        n = first * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
        exists = n < length
        rows = source + n.to(tl.int64) * stride_n
        x = load_rows(rows, exists, stride_d, HEAD_DIM, D_POW2, 0, ROTATION)
        shift = 0.0
        if RETURN_LSE:
            shift = _times_mean(x, k_mean, HEAD_DIM, D_POW2, 0, ROTATION)
        by, less = evening(
            k_mean, sizes, rotation, HEAD_DIM, D, D_POW2, 0, False, EQUALISE, ROTATION, dtype, PTX
        )
        y0 = evened(x, exists, by, less, 0, False, ROTATION, PTX)
        y1 = y0
        if tiles_of(ROTATION) == 2:
            x = load_rows(rows, exists, stride_d, HEAD_DIM, D_POW2, 1, ROTATION)
            if RETURN_LSE:
                shift += _times_mean(x, k_mean, HEAD_DIM, D_POW2, 1, ROTATION)
            by, less = evening(
                k_mean, sizes, rotation, HEAD_DIM, D, D_POW2, 1, False, EQUALISE, ROTATION, dtype, PTX
            )
            y1 = evened(x, exists, by, less, 1, False, ROTATION, PTX)
        _round_q(y0, y1, shift, q8, q_scale, q_shift, scale, slot + first, D, D_POW2, RETURN_LSE, ROTATION)


@triton.jit
def _evened_q(
    source, by, k_mean, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, ROTATION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As `_evened_k`; and, where RETURN_LSE, the product of each row as it was and K's mean."""
    n = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    x = load_rows(source + n.to(tl.int64) * stride_n, n < length, stride_d, HEAD_DIM, D_POW2, 0, ROTATION)
    shift = 0.0
    if RETURN_LSE:
        shift = _times_mean(x, k_mean, HEAD_DIM, D_POW2, 0, ROTATION)
    return evened(x, n < length, by, by, 0, False, ROTATION, PTX), shift


@triton.jit
def _times_mean(
    x, k_mean, HEAD_DIM: tl.constexpr, D_POW2: tl.constexpr, TILE: tl.constexpr, ROTATION: tl.constexpr
):
    """What a tile of channels adds to the product of each row and the mean of K."""
    d = tl.arange(0, tile_width(ROTATION, D_POW2))
    inside = d < tile_size(ROTATION, TILE, HEAD_DIM)
    mean = tl.load(k_mean + tile_first(ROTATION, TILE) + d, mask=inside, other=0.0)
    return tl.sum(x.to(tl.float32) * mean[None, :], 1)


@triton.jit
def _round_q(
    y0, y1, shift, q8, q_scale, q_shift, scale, slot,
    D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    bits = tl.max(magnitude(y0), 1)
    if tiles_of(ROTATION) == 2:
        bits = tl.maximum(bits, tl.max(magnitude(y1), 1))
    amax = scale_or_nan(bits, TINY)
    row = slot.to(tl.int64) * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    tl.store(q_scale + row, amax * (tl.abs(scale) * (LOG2_E * common_norm(ROTATION) / 127.0)))
    # The sign of the softmax scale goes into the integers: row maxima are taken of them.
    inverse = (tl.where(scale < 0, -127.0, 127.0) / amax)[:, None]
    store_rows(q8 + row * D, y0 * inverse, D, D_POW2, 0, ROTATION)
    if tiles_of(ROTATION) == 2:
        store_rows(q8 + row * D, y1 * inverse, D, D_POW2, 1, ROTATION)
    if RETURN_LSE:
        tl.store(q_shift + row, scale * shift)
