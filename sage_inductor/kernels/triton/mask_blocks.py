"""Device code: what a mask that differs from query to query leaves of each block, found by reading it once, so that the
attention kernel passes over the blocks it rules out and does not read it for those it leaves whole.

A causal mask, with padding or without, that comes as a tensor thus costs little more than `is_causal`.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .quantize import used_keys_of

# States of a block: no query attends to any of its keys; some scores change; all stay as they are.
_SOME = tl.constexpr(1)
_ALL = tl.constexpr(2)
_STEP = tl.constexpr(128)  # states read at a time


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "stride_mb", "stride_mh", "stride_mm"])
def mask_blocks_kernel(
    mask,
    states,
    heads,
    q_len,
    kv_len,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    MASK_ALIGN: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """states: int8 [mask's batch, its heads, tiles of q_len, blocks of kv_len], a program for each. Strides but the last
    come in units of MASK_ALIGN, which divides kv_len too; MASK 1 bool, 2 additive."""
    blocks = tl.cdiv(kv_len, BLOCK_N)
    tiles = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks % tiles
    bh = pid // blocks // tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    source = (
        mask + ((bh // heads).to(tl.int64) * stride_mb + (bh % heads).to(tl.int64) * stride_mh) * MASK_ALIGN
    )
    source += rows.to(tl.int64)[:, None] * (stride_mm.to(tl.int64) * MASK_ALIGN)
    # kv_len, written so that the compiler sees what divides it.
    exists = (rows < q_len)[:, None] & (cols < kv_len // MASK_ALIGN * MASK_ALIGN)[None, :]
    values = tl.load(source + cols.to(tl.int64)[None, :] * stride_mn, mask=exists, other=0)
    used = used_keys_of(values, MASK) & exists
    whole = (values != 0 if MASK == 1 else values == 0) | (exists == 0)
    some = tl.max(tl.max(used.to(tl.int32), 1), 0)
    every = tl.min(tl.min(whole.to(tl.int32), 1), 0)
    tl.store(states + pid, (some + some * every).to(tl.int8))


@triton.jit
def used_blocks(states, count):
    """First and last + 1 of `count` blocks in which some query attends to a key; count and 0 if there is none."""
    first = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    last = tl.full([_STEP], -1, tl.int32)
    for start in range(0, count, _STEP):
        n = start + tl.arange(0, _STEP)
        used = tl.load(states + n, mask=n < count, other=0) >= _SOME
        first = tl.minimum(first, tl.where(used, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(used, n, -1))
    return tl.minimum(tl.min(first, 0), count), tl.max(last, 0) + 1


@triton.jit
def whole_blocks(states, begin, end):
    """The first run of blocks in begin..end that the mask leaves whole: its first and last + 1; end twice if there is
    none."""
    first = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    for start in range(begin, end, _STEP):
        n = start + tl.arange(0, _STEP)
        whole = tl.load(states + n, mask=n < end, other=0) == _ALL
        first = tl.minimum(first, tl.where(whole, n, 0x7FFFFFFF))
    begin = tl.minimum(tl.min(first, 0), end)
    after = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    for start in range(begin, end, _STEP):
        n = start + tl.arange(0, _STEP)
        whole = tl.load(states + n, mask=n < end, other=_ALL) == _ALL
        after = tl.minimum(after, tl.where(whole, 0x7FFFFFFF, n))
    return begin, tl.minimum(tl.min(after, 0), end)
