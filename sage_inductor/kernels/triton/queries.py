"""Device code that rounds Q to 8 bits. Both quantise kernels have programs that do it."""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import magnitude, round_to_int8, scale_or_nan
from .smoothing import TINY, evened, store_rows, tile_first, tile_size, tile_width, tiles_of
from .workspace import _KEY_BLOCK, sequence

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def quantize_q_block(
    tile, q, q8, scales, k_mean, channel_sizes, rotation, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
    stride_qb, stride_qh, stride_qn, stride_qd,
    ALIGN: tl.constexpr, VARLEN: tl.constexpr, RETURN_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    D_POW2: tl.constexpr, EQUALISE: tl.constexpr, ROTATION: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Number `tile` of the blocks of ROWS rows of Q."""
    blocks = tl.cdiv(q_len, _KEY_BLOCK) * (_KEY_BLOCK // ROWS)
    block = tile % blocks
    bh = tile // blocks
    b = bh // heads
    h = bh % heads
    kv_bh = b * kv_heads + h // (heads // kv_heads)
    start, length, block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
    if block * ROWS < tl.cdiv(length, _KEY_BLOCK) * _KEY_BLOCK:
        stride_n = stride_qn.to(tl.int64) * ALIGN
        source = q + (b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh) * ALIGN + start * stride_n
        slot = h * q_blocks + block0
        if EQUALISE or ROTATION is not None:
            sizes = channel_sizes
            if EQUALISE:
                sizes += kv_bh * 2 * D
            _quantize_evened_q(
                source, q8, scales, scales + q_size // 2, k_mean + kv_bh * D, sizes, rotation, scale, slot, block,
                length, stride_n, stride_qd, HEAD_DIM, D, D_POW2, RETURN_LSE, EQUALISE, ROTATION, ROWS, PTX,
            )  # fmt: skip
        else:
            _quantize_q(
                source, q8, scales, scales + q_size // 2, k_mean + kv_bh * D, scale, slot, block, length, stride_n,
                stride_qd, HEAD_DIM, D, D_POW2, RETURN_LSE, ROWS,
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
    amax = scale_or_nan(tl.max(magnitude(x), 1), TINY)
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
def _quantize_evened_q(
    source, q8, q_scale, q_shift, k_mean, sizes, rotation, scale, slot, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, EQUALISE: tl.constexpr,
    ROTATION: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As `_quantize_q`, with the channels evened before."""
    n = block * ROWS + tl.arange(0, ROWS)
    rows = source + n.to(tl.int64) * stride_n
    exists = n < length
    x0, y0 = evened(
        rows, exists, stride_d, k_mean, sizes, rotation, HEAD_DIM, D, D_POW2, 0, False, EQUALISE, ROTATION, PTX, False,
    )  # fmt: skip
    bits = tl.max(magnitude(y0), 1)
    TILES: tl.constexpr = tiles_of(ROTATION)
    if TILES == 2:
        x1, y1 = evened(
            rows, exists, stride_d, k_mean, sizes, rotation, HEAD_DIM, D, D_POW2, 1, False, EQUALISE, ROTATION, PTX,
            False,
        )  # fmt: skip
        bits = tl.maximum(bits, tl.max(magnitude(y1), 1))
    amax = scale_or_nan(bits, TINY)
    row = slot.to(tl.int64) * _KEY_BLOCK + n
    tl.store(q_scale + row, amax * (tl.abs(scale) * (_LOG2_E / 127.0)))
    inverse = tl.where(scale < 0, -127.0, 127.0) / amax
    store_rows(q8 + row * D, y0 * inverse[:, None], D, D_POW2, 0, ROTATION)
    if TILES == 2:
        store_rows(q8 + row * D, y1 * inverse[:, None], D, D_POW2, 1, ROTATION)
    if RETURN_LSE:
        shift = _times_mean(x0, k_mean, HEAD_DIM, D_POW2, 0, ROTATION)
        if TILES == 2:
            shift += _times_mean(x1, k_mean, HEAD_DIM, D_POW2, 1, ROTATION)
        tl.store(q_shift + row, scale * shift)


@triton.jit
def _times_mean(
    x, k_mean, HEAD_DIM: tl.constexpr, D_POW2: tl.constexpr, TILE: tl.constexpr, ROTATION: tl.constexpr
):
    """What a tile of channels adds to the product of each row and the mean of K."""
    d = tl.arange(0, tile_width(ROTATION, D_POW2))
    inside = d < tile_size(ROTATION, TILE, HEAD_DIM)
    mean = tl.load(k_mean + tile_first(ROTATION, TILE) + d, mask=inside, other=0.0)
    return tl.sum(x.to(tl.float32) * mean[None, :], 1)
