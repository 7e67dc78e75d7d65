"""Device code: what a mask that differs from query to query leaves of each block, found by reading it once, so that the
attention kernel passes over the blocks it rules out and does not read it for those it leaves whole.

A causal mask, with padding or without, that comes as a tensor thus costs little more than `is_causal`. For the blocks in
between a bool mask is written down again with a bit a score, in the order in which the tensor cores spread a product over
threads: a thread finds all its bits of a row in one word, and the mask adds two instructions a score and no traffic to
speak of, whatever its strides.
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
    """states: int8 [mask's batch, its heads, tiles of q_len, blocks of kv_len], a program for BLOCKS of them in a row; bits:
    of a bool mask int8, the same by [BLOCK_M, BLOCK_N / 8], the words that `add_bits` reads. Strides but the last come in
    units of MASK_ALIGN, which divides kv_len too; MASK 1 bool, 2 additive."""
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
    # Elements that are read one by one take a register and an address each.
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
    """int8 [BLOCK_N, _PACKED] by which a row of 0 and 1 is multiplied to pack it into bytes, modulo 256, and in column
    _COUNT to count it: the tensor cores do it, so that no two threads need exchange a bit.

    Column 8 j + 2 t + e becomes bit 2 j + e of word t, which has BLOCK_N / 32 bytes.
    """
    col = tl.arange(0, BLOCK_N)[:, None]
    byte = tl.arange(0, _PACKED)[None, :]
    bit = col // 8 * 2 + col % 2
    own = byte == col // 2 % 4 * (BLOCK_N // 32) + bit // 8
    return tl.where(byte == _COUNT, 1, tl.where(own, 1 << bit % 8, 0)).to(tl.int8)


@triton.jit
def add_bits(x, bits, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The scores of a block, -inf where the bool mask of which `bits` is made is False and beyond kv_len."""
    word = tl.arange(0, BLOCK_M)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(bits + block.to(tl.int64) * (BLOCK_M * 4) + word).to(tl.int32)
    bit = tl.arange(0, BLOCK_N // 8)[:, None] * 2 + tl.arange(0, 2)[None, :]
    used = words[:, None, :, None] & (1 << bit)[None, :, None, :]
    return tl.where((used != 0).reshape(BLOCK_M, BLOCK_N), x, float("-inf"))


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
