"""Device code that rounds Q to 8 bits. The kernels of statistics.py and quantize.py have programs that do it."""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import magnitude, round_to_int8, scale_or_nan, widen
from .smoothing import TINY
from .workspace import _KEY_BLOCK, sequence

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def quantize_q_block(
    tile, q, q8, scales, k_mean, cu_seqlens_q, scale, q_size, heads, kv_heads, q_len, q_blocks,
    stride_qb, stride_qh, stride_qn, stride_qd,
    ALIGN: tl.constexpr, VARLEN: tl.constexpr, RETURN_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    D_POW2: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
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
        _quantize_q(
            source, q8, scales, scales + q_size // 2, k_mean + kv_bh * D, scale, slot, block, length, stride_n, stride_qd,
            HEAD_DIM, D, D_POW2, RETURN_LSE, ROWS, PTX,
        )  # fmt: skip


@triton.jit
def _quantize_q(
    source, q8, q_scale, q_shift, k_mean, scale, slot, block, length, stride_n, stride_d,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, RETURN_LSE: tl.constexpr, ROWS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    n = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_POW2)
    x = tl.load(
        source + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d,
        mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    x = widen(x, PTX)
    amax = scale_or_nan(tl.max(magnitude(x), 1), TINY)
    row = slot.to(tl.int64) * _KEY_BLOCK + n
    # The sign of the softmax scale goes into the integers: row maxima are taken of them.
    tl.store(q_scale + row, amax * (tl.abs(scale) * (LOG2_E / 127.0)))
    inverse = tl.where(scale < 0, -127.0, 127.0) / amax
    tl.store(q8 + row[:, None] * D + d[None, :], round_to_int8(x * inverse[:, None]), mask=(d < D)[None, :])
    if RETURN_LSE:
        # What subtracting a vector from every key takes from every score of the row.
        mean = tl.load(k_mean + d, mask=d < D, other=0.0)
        tl.store(q_shift + row, scale * tl.sum(x * mean[None, :], 1))
