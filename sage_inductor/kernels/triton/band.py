"""Device code: the blocks of keys that a tile of queries sees of a band (causality, windows)."""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def band_blocks(
    first_row,
    last_row,
    kv_len,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(begin, end, full_begin, full_end) for queries first_row..last_row, of which query i sees keys i + low .. i + high: blocks
    begin..end - 1 have keys that some query sees, and of blocks full_begin..full_end - 1 every query sees all keys. Where there are none, an
    end may lie before its begin, and begin behind the last block."""
    end_key = kv_len
    full_end_key = kv_len
    if HAS_HIGH:
        end_key = tl.minimum(kv_len, tl.maximum(last_row + high + 1, 0))
        full_end_key = tl.minimum(kv_len, tl.maximum(first_row + high + 1, 0))
    begin = 0
    end = tl.cdiv(end_key, BLOCK_N)
    full_begin = 0
    full_end = full_end_key // BLOCK_N
    if HAS_LOW:
        begin = tl.maximum(first_row + low, 0) // BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_row + low, 0), BLOCK_N)
    return begin, end, full_begin, full_end
