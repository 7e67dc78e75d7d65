"""Device code for segments, by which packed sequences do not see each other: a query attends to the keys of its own id.

Before the attention kernel runs, the ids of each block are copied side by side, with their least and largest. A block of keys
is passed over where its range does not meet that of the block of queries; where both have one id, and the same, no id is read;
for all others the ids are compared. Which blocks that are is found once for all heads (`segment_spans_kernel`). Ids may come in any order: ranges that meet only say that a block has to be looked at.
hopper/attention.cu reads the blocks of a list that block_list.py makes of the ranges.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from .band import band_blocks

SPAN = 4  # numbers of a tile: first and last + 1 block of keys that it reads, and of those of one id
_SPAN = tl.constexpr(SPAN)
_STEP = tl.constexpr(128)  # ranges read at a time
_LEAST = tl.constexpr(-0x80000000)
_LARGEST = tl.constexpr(0x7FFFFFFF)


def segments_size(batch: int, q_len: int, kv_len: int, block_m: int, block_n: int) -> int:
    """Elements of the int32 workspace that `segments_kernel` writes."""
    tiles, blocks = -(-q_len // block_m), -(-kv_len // block_n)
    return batch * (tiles * (block_m + 2 + SPAN) + blocks * (block_n + 3))


@triton.jit
def segment_sections(segments, batch, q_len, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The parts of the workspace: the ids of the queries [batch, tiles, BLOCK_M] and of the keys [batch, blocks, BLOCK_N], then the
    least and the largest of each tile [2, batch, tiles] and of each block [2, batch, blocks], then whether the ids of a block
    descend somewhere [batch, blocks], then the spans [batch, tiles, SPAN]."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    blocks = tl.cdiv(kv_len, BLOCK_N)
    k_ids = segments + batch * tiles * BLOCK_M
    q_range = k_ids + batch * blocks * BLOCK_N
    k_range = q_range + 2 * batch * tiles
    descends = k_range + 2 * batch * blocks
    spans = descends + batch * blocks
    return k_ids, q_range, k_range, descends, spans


@triton.jit(do_not_specialize=["batch", "q_len", "kv_len", "stride_qb", "stride_kb"])
def segments_kernel(
    q_ids,
    k_ids,
    segments,
    batch,
    q_len,
    kv_len,
    stride_qb,
    stride_kb,
    stride_qn,
    stride_kn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the sections of `segment_sections`. A program has one tile of queries, or one block of keys."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    blocks = tl.cdiv(kv_len, BLOCK_N)
    k_target, q_range, k_range, descends, _spans = segment_sections(
        segments, batch, q_len, kv_len, BLOCK_M, BLOCK_N
    )
    pid = tl.program_id(0)
    if pid < batch * tiles:
        source = q_ids + (pid // tiles).to(tl.int64) * stride_qb
        _copy_ids(source, segments, q_range, pid, pid % tiles, batch * tiles, q_len, stride_qn, BLOCK_M)
    else:
        pid -= batch * tiles
        source = k_ids + (pid // blocks).to(tl.int64) * stride_kb
        _copy_ids(source, k_target, k_range, pid, pid % blocks, batch * blocks, kv_len, stride_kn, BLOCK_N)
        n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        these = tl.load(source + tl.minimum(n, kv_len - 1).to(tl.int64) * stride_kn)
        following = tl.load(source + tl.minimum(n + 1, kv_len - 1).to(tl.int64) * stride_kn)
        tl.store(descends + pid, tl.max((following < these).to(tl.int32), 0))


@triton.jit
def _copy_ids(ids, target, ranges, slot, block, slots, length, stride, SIZE: tl.constexpr):
    """The ids of a block to `target`, at its `slot`, and their range to `ranges`. What is behind the last id counts as it."""
    n = tl.minimum(block * SIZE + tl.arange(0, SIZE), length - 1)
    values = tl.load(ids + n.to(tl.int64) * stride)
    tl.store(target + slot * SIZE + tl.arange(0, SIZE), values)
    tl.store(ranges + slot, tl.min(values, 0))
    tl.store(ranges + slots + slot, tl.max(values, 0))


@triton.jit(do_not_specialize=["batch", "q_len", "kv_len", "low", "high"])
def segment_spans_kernel(
    segments,
    batch,
    q_len,
    kv_len,
    low,
    high,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the span of one tile, from the ranges of ids that `segments_kernel` has written: the blocks from the first to the last whose range meets that
    of the tile, and among them the first run in which all keys have the id of all queries. Query i sees keys i + low .. i + high."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    blocks = tl.cdiv(kv_len, BLOCK_N)
    slot = tl.program_id(0)
    b = slot // tiles
    first_row = slot % tiles * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    _k_ids, q_range, k_range, _descends, spans = segment_sections(
        segments, batch, q_len, kv_len, BLOCK_M, BLOCK_N
    )
    k_range += b * blocks
    lowest = tl.load(q_range + slot)
    highest = tl.load(q_range + batch * tiles + slot)
    begin, end, full_begin, full_end = band_blocks(
        first_row, last_row, kv_len, low, high, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    first, last = meeting_blocks(k_range, batch * blocks, begin, end, lowest, highest)
    full_begin = tl.minimum(tl.maximum(full_begin, first), last)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), last)
    full_begin, full_end = _blocks_of_one(k_range, batch * blocks, full_begin, full_end, lowest, highest)
    spans += slot * _SPAN
    tl.store(spans, first)
    tl.store(spans + 1, last)
    tl.store(spans + 2, full_begin)
    tl.store(spans + 3, full_end)


@triton.jit
def meeting_blocks(k_range, slots, begin, end, low, high):
    """(first, last + 1) of those blocks of keys in begin..end whose range of ids meets low..high; (begin, begin) if there is none.
    `slots`: how far the largest ids of blocks lie behind the least."""
    first = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    last = tl.full([_STEP], -1, tl.int32)
    for start in range(begin, end, _STEP):
        n = start + tl.arange(0, _STEP)
        exists = n < end
        least = tl.load(k_range + n, mask=exists, other=_LARGEST)
        largest = tl.load(k_range + slots + n, mask=exists, other=_LEAST)
        meets = exists & (least <= high) & (largest >= low)
        first = tl.minimum(first, tl.where(meets, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(meets, n, -1))
    found = tl.max(last, 0) + 1
    return tl.where(found > 0, tl.min(first, 0), begin), tl.where(found > 0, found, begin)


@triton.jit
def _blocks_of_one(k_range, slots, begin, end, low, high):
    """(first, last + 1) of the first run of blocks in begin..end of which all keys have the id of all queries; (end, end) if
    there is none, as where the queries have several."""
    first = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    for start in range(begin, end, _STEP):
        n = start + tl.arange(0, _STEP)
        first = tl.minimum(first, tl.where(_are_of_one(k_range, slots, n, end, low, high), n, 0x7FFFFFFF))
    begin = tl.minimum(tl.min(first, 0), end)
    after = tl.full([_STEP], 0x7FFFFFFF, tl.int32)
    for start in range(begin, end, _STEP):
        n = start + tl.arange(0, _STEP)
        ends = (n >= end) | (_are_of_one(k_range, slots, n, end, low, high) == 0)
        after = tl.minimum(after, tl.where(ends, n, 0x7FFFFFFF))
    return begin, tl.minimum(tl.min(after, 0), end)


@triton.jit
def _are_of_one(k_range, slots, n, end, low, high):
    exists = n < end
    least = tl.load(k_range + n, mask=exists, other=0)
    largest = tl.load(k_range + slots + n, mask=exists, other=0)
    return exists & are_of_one(least, largest, low, high)


@triton.jit
def are_of_one(least, largest, low, high):
    """Whether keys whose ids are least..largest and queries whose ids are low..high all have one id."""
    return (least == low) & (largest == low) & (low == high)


@triton.jit
def within_segment(x, own, k_ids, BLOCK_N: tl.constexpr):
    """The scores x [rows, BLOCK_N] of a block, -inf where the key's id is not `own` [rows]. `k_ids` points to the block's ids."""
    ids = tl.load(k_ids + tl.arange(0, BLOCK_N))
    return tl.where(own[:, None] == ids[None, :], x, float("-inf"))
