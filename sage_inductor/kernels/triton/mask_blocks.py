"""Device code: the state of each block of a mask that differs from query to query, found by reading the mask once.

The attention kernel then skips blocks that the mask rules out, and does not read the mask for blocks that it leaves whole; that of
hopper/ reads the blocks of a list that is made of the states (block_list.py). A
causal mask that comes as a tensor, with padding or without, thus costs little more than `is_causal`.

For all other blocks a bool mask is written again with one bit per score. The bits are in the order in which the tensor cores
spread a product over threads, so a thread finds all its bits of a row in one word. Whatever the strides of the mask, it adds two
instructions per score and almost no traffic.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .workspace import used_keys_of

# States of a block. 0: no query attends to any of its keys. _SOME: some scores change. _ALL: all scores stay as they are.
_SOME = tl.constexpr(1)
_ALL = tl.constexpr(2)
_STEP = tl.constexpr(128)  # states read at a time
_PACKED = tl.constexpr(32)  # columns of the matrix that packs: up to 16 bytes of bits, and
_COUNT = tl.constexpr(16)  # how many of the row's are set


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "stride_mb", "stride_mh", "stride_mm"])
def mask_blocks_kernel(
    mask,
    states,
    bits,
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
    BLOCKS: tl.constexpr,
):
    """Write the states of all blocks, and the bits of a bool mask.

    states: int8 [mask's batch, mask's heads, tiles of q_len, blocks of kv_len]. bits, for a bool mask: int8 of the same shape
    with [BLOCK_M, BLOCK_N / 8] behind it, the words that `add_bits` reads. A program writes up to BLOCKS blocks of one tile.
    Strides but the last come in units of MASK_ALIGN, which divides kv_len, too. MASK is 1 for bool, 2 for additive.
    """
    blocks = tl.cdiv(kv_len, BLOCK_N)
    tiles = tl.cdiv(q_len, BLOCK_M)
    runs = tl.cdiv(blocks, BLOCKS)
    pid = tl.program_id(0)
    first = pid % runs * BLOCKS
    tile = pid // runs % tiles
    bh = pid // runs // tiles
    source = (
        mask + ((bh // heads).to(tl.int64) * stride_mb + (bh % heads).to(tl.int64) * stride_mh) * MASK_ALIGN
    )
    pitch = stride_mm.to(tl.int64) * MASK_ALIGN
    states += (bh * tiles + tile) * blocks
    if MASK == 1:
        bits += (bh * tiles + tile).to(tl.int64) * blocks * (BLOCK_M * BLOCK_N // 8)
        packing = _packing(BLOCK_N)
        byte = tl.arange(0, _PACKED)
    # Elements that are read one by one take a register and an address each, so fewer rows are read at a time.
    ROWS: tl.constexpr = BLOCK_M if MASK_ALIGN >= 4 else 16
    for block in range(first, min(first + BLOCKS, blocks)):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        some = block < 0  # False and True, as the values that a loop hands on
        every = block >= 0
        for row in range(0, BLOCK_M, ROWS):
            rows = tile * BLOCK_M + row + tl.arange(0, ROWS)
            # kv_len, written so that the compiler sees what divides it.
            exists = (rows < q_len)[:, None] & (cols < kv_len // MASK_ALIGN * MASK_ALIGN)[None, :]
            place = rows.to(tl.int64)[:, None] * pitch + cols.to(tl.int64)[None, :] * stride_mn
            values = tl.load(source + place, mask=exists, other=0)
            used = used_keys_of(values, MASK) & exists
            if MASK == 1:
                packed = tl.dot(used.to(tl.int8), packing, out_dtype=tl.int32)
                count = tl.sum(tl.where(byte[None, :] == _COUNT, packed, 0))
                existing_rows = tl.maximum(tl.minimum(q_len - tile * BLOCK_M - row, ROWS), 0)
                every = every & (count == existing_rows * tl.minimum(kv_len - block * BLOCK_N, BLOCK_N))
                some = some | (count > 0)
                target = bits + (block * BLOCK_M + row + tl.arange(0, ROWS))[:, None] * (BLOCK_N // 8)
                tl.store(target + byte[None, :], packed.to(tl.int8), mask=(byte < BLOCK_N // 8)[None, :])
            else:
                every = every & (tl.min(((values == 0) | (exists == 0)).to(tl.int32)) > 0)
                some = some | (tl.max(used.to(tl.int32)) > 0)
        tl.store(states + block, tl.where(some, tl.where(every, _ALL, _SOME), 0).to(tl.int8))


@triton.jit
def _packing(BLOCK_N: tl.constexpr):
    """int8 [BLOCK_N, _PACKED]: the product of a row of 0 and 1 with it is that row packed into bytes, modulo 256, and in column
    _COUNT the number of ones. Tensor cores compute the product, so threads need not exchange bits.

    Column 8 j + 2 t + e of the row becomes bit 2 j + e of word t, which has BLOCK_N / 32 bytes.
    """
    col = tl.arange(0, BLOCK_N)[:, None]
    byte = tl.arange(0, _PACKED)[None, :]
    bit = col // 8 * 2 + col % 2
    own = byte == col // 2 % 4 * (BLOCK_N // 32) + bit // 8
    return tl.where(byte == _COUNT, 1, tl.where(own, 1 << bit % 8, 0)).to(tl.int8)


@triton.jit
def add_bits(x, bits, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scores x of a block, with -inf where the bool mask is False, and beyond kv_len. `bits` is made of that mask."""
    word = tl.arange(0, BLOCK_M)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(bits + block.to(tl.int64) * (BLOCK_M * 4) + word).to(tl.int32)
    bit = tl.arange(0, BLOCK_N // 8)[:, None] * 2 + tl.arange(0, 2)[None, :]
    used = words[:, None, :, None] & (1 << bit)[None, :, None, :]
    return tl.where((used != 0).reshape(BLOCK_M, BLOCK_N), x, float("-inf"))


@triton.jit
def used_blocks(states, count):
    """(first, last + 1) of those of `count` blocks in which some query attends to a key; (count, 0) if there is none."""
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
    """(first, last + 1) of the first run of blocks in begin..end that the mask leaves whole; (end, end) if there is none."""
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
