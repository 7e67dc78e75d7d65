"""The list of blocks of keys that each tile of queries reads, for hopper/attention.cu, and the device code that makes it of a mask.

    int32 [lists' batch, lists' heads, tiles of queries, 1 + blocks of keys]

For each tile of the attention kernel (`HopperVariant.block_m` queries): the number of its entries, then the entries, in ascending order
of their blocks. An entry is

    2 * block + partly        partly: 1 where the bits of a mask (mask_blocks.py) have to be applied, else 0

What is behind the last entry is never read; but the first entry is always there, a block that exists, even where the number is 0 and the
tile sees no key. Batch and heads are 1 where all sequences, or all heads, share their lists.

The attention kernel applies causality, a window, a mask over keys and the end of the keys to listed blocks as to any others. So a list
only says what may be left unread; one that names a block beyond those bounds costs time and changes nothing.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .mask_blocks import _ALL, _SOME, _STEP


@triton.jit(do_not_specialize=["q_len", "kv_len", "low", "high"])
def block_list_kernel(
    states,
    entries,
    q_len,
    kv_len,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    STRIPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the list of one tile of STRIPES times BLOCK_M queries: the blocks in which some of its queries attends to a key, and which
    query i's bounds, i + low and i + high, do not rule out.

    states: int8 [lists' batch, lists' heads, blocks of BLOCK_M queries, blocks of BLOCK_N keys], as `mask_blocks_kernel` writes them.
    """
    blocks = tl.cdiv(kv_len, BLOCK_N)
    stripes = tl.cdiv(q_len, BLOCK_M)
    tiles = tl.cdiv(stripes, STRIPES)
    pid = tl.program_id(0)
    tile = pid % tiles
    first_stripe = tile * STRIPES
    states += (pid // tiles * stripes + first_stripe).to(tl.int64) * blocks
    entries += pid.to(tl.int64) * (1 + blocks)
    first_row = first_stripe * BLOCK_M
    last_row = tl.minimum(first_row + STRIPES * BLOCK_M, q_len) - 1
    count = 0
    for start in range(0, blocks, _STEP):
        n = start + tl.arange(0, _STEP)
        some = n < 0
        every = n >= 0
        for stripe in tl.static_range(STRIPES):
            exists = (n < blocks) & (first_stripe + stripe < stripes)
            state = tl.load(states + stripe * blocks + n, mask=exists, other=0)
            some = some | (state >= _SOME)
            every = every & ((state == _ALL) | (exists == 0))
        if HAS_LOW:
            some = some & (n * BLOCK_N + BLOCK_N - 1 >= first_row + low)
        if HAS_HIGH:
            some = some & (n * BLOCK_N <= last_row + high)
        listed = some.to(tl.int32)
        place = count + tl.cumsum(listed, 0)  # 1 and more: behind the number
        tl.store(entries + place, 2 * n + tl.where(every, 0, 1), mask=some)
        count += tl.sum(listed, 0)
    tl.store(entries, count)
    tl.store(entries + 1, 0, mask=count == 0)
