"""The list of blocks of keys that each tile of queries reads, for the attention kernels, and the device code that makes it of a mask, or
of segments; sampled.py makes it of scores.

    int32 [lists' batch, lists' heads, tiles of queries, HEADER + blocks of keys]

For each tile of the attention kernel (`HopperVariant.block_m` queries, or SAMPLED_TILE's): the number of its entries, the number of those
that are whole, then the entries. An entry is

    2 * block + partly        partly: 1 where the bits of a mask (mask_blocks.py) have to be applied, or ids of segments compared
                                  (segments.py), else 0

Whole blocks come first, in ascending order: every query of the tile sees all their keys, so the attention kernel's main loop
is over them, and masks nothing. Block 0 never counts as whole, because the first key is set apart in a step that masks. The
others follow in descending order, so that block 0 is the last. For example, of 700 keys a tile that sees all has 6, 4, then the entries of
blocks 1, 2, 3, 4, 5, 0. Where the order of the keys decides what is left out (skip_by="scores"), all come in ascending order, and none
counts as whole.

What is behind the last entry is never used, though one number there is read; and the first entry is always there, a block that exists, even where the number is 0 and the
tile sees no key. Batch and heads are 1 where all sequences, or all heads, share their lists.

The attention kernel applies causality, a window, a mask over keys and the end of the keys to blocks that are not whole. So a list
only says what may be left unread; one that names a block beyond those bounds costs time and changes nothing.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .mask_blocks import _ALL, _SOME, _STEP
from .segments import are_of_one, meeting_blocks, segment_sections

HEADER = 2  # numbers in front of a tile's entries
_HEADER = tl.constexpr(HEADER)
_COLUMNS = tl.constexpr(32)  # ids that are compared at a time, where they have to be


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
    ASCENDING: tl.constexpr,
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
    entries += pid.to(tl.int64) * (_HEADER + blocks)
    first_row = first_stripe * BLOCK_M
    last_row = tl.minimum(first_row + STRIPES * BLOCK_M, q_len) - 1
    whole = 0
    others = 0
    for start in range(0, blocks, _STEP):
        n = start + tl.arange(0, _STEP)
        some = n < 0
        every = n >= 0
        for stripe in tl.static_range(STRIPES):
            exists = (n < blocks) & (first_stripe + stripe < stripes)
            state = tl.load(states + stripe * blocks + n, mask=exists, other=0)
            some = some | (state >= _SOME)
            every = every & ((state == _ALL) | (exists == 0))
        some = _within_bounds(some, n, first_row, last_row, low, high, HAS_LOW, HAS_HIGH, BLOCK_N)
        cut = are_cut(n, first_row, last_row, kv_len, low, high, HAS_LOW, HAS_HIGH, BLOCK_N)
        whole, others = _append(entries, blocks, whole, others, n, some, every, cut, ASCENDING)
    _finish(entries, blocks, whole, others, ASCENDING)


@triton.jit(do_not_specialize=["batch", "q_len", "kv_len", "low", "high"])
def segment_list_kernel(
    segments,
    row_bounds,
    entries,
    batch,
    q_len,
    kv_len,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    KEY_MASK: tl.constexpr,
    STRIPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASCENDING: tl.constexpr,
):
    """As `block_list_kernel`, of the ranges of ids that `segments_kernel` has written to `segments`, for all heads: the blocks whose
    range meets that of some BLOCK_M queries. They are whole where all these queries and keys have one id, and, with KEY_MASK, a mask over keys,
    never. Programs behind those of the lists write the `row_bounds` of BLOCK_M queries each (`_write_row_bounds`)."""
    blocks = tl.cdiv(kv_len, BLOCK_N)
    stripes = tl.cdiv(q_len, BLOCK_M)
    tiles = tl.cdiv(stripes, STRIPES)
    pid = tl.program_id(0)
    k_ids, q_range, k_range, descends, _spans = segment_sections(
        segments, batch, q_len, kv_len, BLOCK_M, BLOCK_N
    )
    if pid >= batch * tiles:
        slot = pid - batch * tiles
        b = slot // stripes
        _write_row_bounds(
            segments + slot * BLOCK_M, k_ids + b * blocks * BLOCK_N, k_range + b * blocks, descends + b * blocks,
            batch * blocks, blocks, kv_len,
            row_bounds + slot * BLOCK_M * 2, tl.load(q_range + slot), tl.load(q_range + batch * stripes + slot),
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        return
    b = pid // tiles
    first_stripe = pid % tiles * STRIPES
    q_range += b * stripes + first_stripe
    k_range += b * blocks
    entries += pid.to(tl.int64) * (_HEADER + blocks)
    first_row = first_stripe * BLOCK_M
    last_row = tl.minimum(first_row + STRIPES * BLOCK_M, q_len) - 1
    whole = 0
    others = 0
    for start in range(0, blocks, _STEP):
        n = start + tl.arange(0, _STEP)
        exists = n < blocks
        least = tl.load(k_range + n, mask=exists, other=0)
        largest = tl.load(k_range + batch * blocks + n, mask=exists, other=0)
        some = n < 0
        every = n >= 0
        for stripe in tl.static_range(STRIPES):
            # The last stripe stands for those behind it.
            at = q_range + tl.minimum(stripe, stripes - 1 - first_stripe)
            lowest = tl.load(at)
            highest = tl.load(at + batch * stripes)
            some = some | (exists & (least <= highest) & (largest >= lowest))
            every = every & are_of_one(least, largest, lowest, highest)
        some = _within_bounds(some, n, first_row, last_row, low, high, HAS_LOW, HAS_HIGH, BLOCK_N)
        cut = are_cut(n, first_row, last_row, kv_len, low, high, HAS_LOW, HAS_HIGH, BLOCK_N)
        if KEY_MASK:  # what it leaves is not known yet
            cut = n >= 0
        whole, others = _append(entries, blocks, whole, others, n, some, every, cut, ASCENDING)
    _finish(entries, blocks, whole, others, ASCENDING)


@triton.jit
def _write_row_bounds(
    q_ids,
    k_ids,
    k_range,
    descends,
    slots,
    blocks,
    kv_len,
    row_bounds,
    lowest,
    highest,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write for each of BLOCK_M queries the first and the last + 1 key of its id, where those between have it, too, as in packed
    sequences: ids need not be compared then. 0 and 0 where no key has it; -1 and -1 where other ids are between.

    row_bounds: int32 [BLOCK_M, 2]. The ids of the queries lie in `lowest`..`highest`.
    """
    row = tl.arange(0, BLOCK_M)
    own = tl.load(q_ids + row)
    ascends = blocks > 0
    for start in range(0, blocks, _STEP):
        n = start + tl.arange(0, _STEP)
        largest = tl.load(k_range + slots + n, mask=n < blocks, other=0)
        following = tl.load(k_range + n + 1, mask=n + 1 < blocks, other=0x7FFFFFFF)
        falls = (n < blocks) & (
            (largest > following) | (tl.load(descends + n, mask=n < blocks, other=0) != 0)
        )
        ascends = ascends & (tl.max(falls.to(tl.int32), 0) == 0)
    count = tl.zeros([BLOCK_M], tl.int32)
    if ascends:
        first = count  # of the keys whose ids are not smaller,
        last = count  # and of those whose are larger: kv_len where there are none
        first_end = count + kv_len
        last_end = first_end
        left = kv_len
        while left > 0:
            middle = (first + first_end) // 2
            goes_on = first < first_end
            is_before = goes_on & (tl.load(k_ids + middle, mask=goes_on, other=0) < own)
            first = tl.where(is_before, middle + 1, first)
            first_end = tl.where(goes_on & (is_before == 0), middle, first_end)
            centre = (last + last_end) // 2
            searches = last < last_end
            is_within = searches & (tl.load(k_ids + centre, mask=searches, other=0) <= own)
            last = tl.where(is_within, centre + 1, last)
            last_end = tl.where(searches & (is_within == 0), centre, last_end)
            left = left // 2
        count = last - first
    else:
        first = tl.full([BLOCK_M], 0x7FFFFFFF, tl.int32)
        last = tl.zeros([BLOCK_M], tl.int32)
        begin, end = meeting_blocks(k_range, slots, 0, blocks, lowest, highest)
        for block in range(begin, end):
            if (tl.load(k_range + block) <= highest) & (tl.load(k_range + slots + block) >= lowest):
                for column in range(0, BLOCK_N, _COLUMNS):
                    key = (block * BLOCK_N + column + tl.arange(0, _COLUMNS))[None, :]
                    found = (own[:, None] == tl.load(k_ids + key)) & (key < kv_len)
                    first = tl.minimum(first, tl.min(tl.where(found, key, 0x7FFFFFFF), 1))
                    last = tl.maximum(last, tl.max(tl.where(found, key + 1, 0), 1))
                    count += tl.sum(found.to(tl.int32), 1)
    is_run = count == last - first
    tl.store(row_bounds + 2 * row, tl.where(count == 0, 0, tl.where(is_run, first, -1)))
    tl.store(row_bounds + 2 * row + 1, tl.where(count == 0, 0, tl.where(is_run, last, -1)))


@triton.jit
def _within_bounds(
    some,
    n,
    first_row,
    last_row,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`some`, without blocks n that the bounds of queries first_row to last_row rule out."""
    if HAS_LOW:
        some = some & (n * BLOCK_N + BLOCK_N - 1 >= first_row + low)
    if HAS_HIGH:
        some = some & (n * BLOCK_N <= last_row + high)
    return some


@triton.jit
def are_cut(
    n,
    first_row,
    last_row,
    kv_len,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which blocks n are not whole by the bounds of queries first_row to last_row and by the end of the keys. Block 0 is not."""
    cut = (n == 0) | (n * BLOCK_N + BLOCK_N > kv_len)
    if HAS_LOW:
        cut = cut | (n * BLOCK_N < last_row + low)
    if HAS_HIGH:
        cut = cut | (n * BLOCK_N + BLOCK_N - 1 > first_row + high)
    return cut


@triton.jit
def _append(entries, blocks, whole, others, n, some, every, cut, ASCENDING: tl.constexpr):
    """Add those blocks n for which `some` holds to a list of `whole` blocks and `others`, which are written from the end backwards:
    how many there are then. `every`: they have no part that bits or ids rule out. With ASCENDING all are written as whole ones are."""
    is_front = some if ASCENDING else some & every & (cut == 0)
    at_front = is_front.to(tl.int32)
    at_back = some.to(tl.int32) - at_front
    front = _HEADER - 1 + whole + tl.cumsum(at_front, 0)
    back = _HEADER + blocks - others - tl.cumsum(at_back, 0)
    tl.store(entries + tl.where(is_front, front, back), 2 * n + tl.where(every, 0, 1), mask=some)
    return whole + tl.sum(at_front, 0), others + tl.sum(at_back, 0)


@triton.jit
def _finish(entries, blocks, whole, others, ASCENDING: tl.constexpr):
    """Write how many there are, and move `others` from the end of the list behind `whole`."""
    tl.store(entries, whole + others)
    tl.store(entries + 1, 0 if ASCENDING else whole)
    tl.store(entries + _HEADER, 0, mask=whole + others == 0)
    gap = blocks - whole - others
    if gap > 0:
        tl.debug_barrier()  # other threads have written what a thread moves
        for start in range(0, others, _STEP):
            place = start + tl.arange(0, _STEP)
            moved = entries + _HEADER + whole + place
            x = tl.load(moved + gap, mask=place < others, other=0)
            tl.debug_barrier()  # all have read what others overwrite
            tl.store(moved, x, mask=place < others)
