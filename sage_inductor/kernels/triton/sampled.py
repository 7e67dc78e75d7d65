"""Device code: the blocks of keys that count for a sample of a tile's queries, found before attention (kernels/skipping.py).

One query in SAMPLE_STEP is multiplied with all keys, in the 8 bits that attention computes with. A program takes the sample of
several tiles: its product with K has the shape that tensor cores want. It writes each query's largest score in each block down,
knows the row maxima at the end, reads what it wrote, and lists for each tile the blocks that count for some query of its sample.
What is written down lies in a part of the workspace that is the program's own (a slab), so that memory grows with the number of
keys and not with that times the number of queries; there are as many programs as run at once, and each takes one group after another.

In a long call some groups of tiles, the probes, are looked at first, and write down what they found; the others are looked at only in
heads where that pays. It is two launches of one kernel.

block_list.py describes the lists.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from ..skipping import GROUP_ROWS, PROBE_SHARE, SAMPLE_STEP, SAMPLED_TILE
from .band import band_blocks
from .block_list import _HEADER, are_cut
from .workspace import _KEY_BLOCK, _USED_KEYS, sections

# Queries of a program at a time. A block of K is then used for as long as the L2 cache takes to bring the next one to every
# multiprocessor (16 KiB in 512 cycles at head_dim 128); with 64 that would be the limit.
SAMPLES = GROUP_ROWS // SAMPLE_STEP
SAMPLED_WARPS = 8
SAMPLED_PER_PROCESSOR = 2  # programs that run at once on a multiprocessor
SAMPLED_REGISTERS = 128  # of a thread, so that they do

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e30)  # as in attention.py
_SAMPLES = tl.constexpr(SAMPLES)
_SAMPLE_STEP = tl.constexpr(SAMPLE_STEP)
_TILE = tl.constexpr(SAMPLED_TILE.rows)
_TILE_SAMPLES = tl.constexpr(SAMPLED_TILE.rows // SAMPLE_STEP)
_PROBE_SHARE = tl.constexpr(PROBE_SHARE)
_STEP = tl.constexpr(32)  # blocks that are listed at a time


@triton.jit(
    do_not_specialize=[
        "q_size", "batch", "heads", "group", "q_len", "kv_len", "q_blocks", "kv_blocks", "groups", "probes", "step", "low", "high",
        "skip_bound", "stride_mb",
    ]
)  # fmt: skip
def sampled_list_kernel(
    mask,
    q8,
    k8,
    scales,
    slabs,
    found,
    entries,
    q_size,
    batch,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    kv_blocks,
    groups,
    probes,
    step,
    low,
    high,
    skip_bound,
    stride_mb,
    stride_mn,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    MASK: tl.constexpr,
    PROBES: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
):
    """Write the lists of all tiles. Query i sees keys i + low .. i + high. MASK is 0 for none, 1 for a bool, 2 for an additive mask
    over keys. A block below the row maximum by more than `skip_bound` (negative, log2) in every sampled row is not listed, unless some query of the tile may
    not see all of it or it is the first that one sees.

    q8, k8, scales: the parts of the workspace. slabs: fp32 [programs, blocks of keys, SAMPLES]. entries: int32 [batch, heads, tiles
    of queries, HEADER + blocks of keys].

    PROBES is 0 where all `groups` of each head are looked at; 1 for its `probes`, the last of each `step` groups; 2 for those between,
    which are looked at where the probes say so. found: int32 [batch, heads, probes, 2], how many blocks of the tiles of a probe lie within bounds, and how
    many of those are left out.
    """
    D: tl.constexpr = D0 + D1
    kv_heads = heads // group
    blocks = tl.cdiv(kv_len, _KEY_BLOCK)
    tiles = tl.cdiv(q_len, _TILE)
    k_scales, _v_scale, _k_mean, _v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D, DV
    )
    slab = slabs + tl.program_id(0).to(tl.int64) * blocks * _SAMPLES
    sample = tl.arange(0, _SAMPLES)
    column = tl.arange(0, _KEY_BLOCK)
    d0 = tl.arange(0, D0)
    of_head = groups
    if PROBES == 1:
        of_head = probes
    if PROBES == 2:
        of_head = groups - probes
    for work in range(tl.program_id(0), batch * heads * of_head, tl.num_programs(0)):
        bh = work // of_head
        number = work % of_head
        of_probes = found + bh * probes * 2
        looks = number >= 0
        group_of_head = number
        if PROBES == 1:
            group_of_head = number * step + step - 1
        if PROBES == 2:
            group_of_head = number // (step - 1) * step + number % (step - 1)
            all_blocks = 0
            left_out = 0
            for probe in range(0, probes):
                all_blocks += tl.load(of_probes + 2 * probe)
                left_out += tl.load(of_probes + 2 * probe + 1)
            looks = left_out * _PROBE_SHARE >= all_blocks
        b = bh // heads
        h = bh % heads
        kv_h = h // group
        first = group_of_head * (_SAMPLES * _SAMPLE_STEP)  # of the group's queries
        last = tl.minimum(first + _SAMPLES * _SAMPLE_STEP, q_len) - 1
        # A tile that ends before its sample does gives its last query instead.
        rows = tl.minimum(first + sample * _SAMPLE_STEP + _SAMPLE_STEP // 2, q_len - 1)
        q_row = (h * q_blocks + b * tl.cdiv(q_len, _KEY_BLOCK)).to(tl.int64) * _KEY_BLOCK + rows
        q_scale = tl.load(scales + q_row)
        q0 = tl.load(q8 + q_row[:, None] * D + d0[None, :])
        q1 = q0
        if D1 > 0:
            q1 = tl.load(q8 + q_row[:, None] * D + D0 + tl.arange(0, D1)[None, :])
        block0 = kv_h * kv_blocks + b * tl.cdiv(kv_len, _KEY_BLOCK)
        keys = k8 + (block0.to(tl.int64) * _KEY_BLOCK + column)[:, None] * D
        begin, end, full_begin, full_end = band_blocks(
            first, last, kv_len, low, high, HAS_LOW, HAS_HIGH, _KEY_BLOCK
        )
        begin = tl.minimum(begin, blocks)
        row_max = tl.full([_SAMPLES], _LOWEST, tl.float32)
        for block in tl.range(begin, tl.where(looks, end, begin)):
            tile = keys + block * (_KEY_BLOCK * D)
            s = tl.dot(q0, tl.load(tile + d0[None, :]).T, out_dtype=tl.int32)
            if D1 > 0:
                s = tl.dot(q1, tl.load(tile + D0 + tl.arange(0, D1)[None, :]).T, acc=s, out_dtype=tl.int32)
            scale = q_scale * tl.load(k_scales + block0 + block)
            if MASK != 0:
                block_max = _masked_maximum(
                    s, scale, rows, block, kv_len, low, high, mask + b.to(tl.int64) * stride_mb, stride_mn,
                    HAS_LOW, HAS_HIGH, MASK,
                )  # fmt: skip
            elif (block >= full_begin) & (block < full_end):
                block_max = tl.max(s, 1).to(tl.float32) * scale
            else:
                block_max = _masked_maximum(
                    s, scale, rows, block, kv_len, low, high, mask, stride_mn, HAS_LOW, HAS_HIGH, MASK
                )
            tl.store(slab + block * _SAMPLES + sample, block_max)
            row_max = tl.maximum(row_max, tl.where(block_max == block_max, block_max, _LOWEST))
        tl.debug_barrier()  # other threads have written what a thread reads now

        tile = first // _TILE + tl.arange(0, _SAMPLES // _TILE_SAMPLES)
        exists = tile < tiles
        target = entries + (bh.to(tl.int64) * tiles + tile) * (_HEADER + blocks)
        tile_last = tl.minimum(tile * _TILE + _TILE, q_len) - 1
        tile_begin, tile_end, _tile_full_begin, _tile_full_end = band_blocks(
            tile * _TILE, tile_last, kv_len, low, high, HAS_LOW, HAS_HIGH, _KEY_BLOCK
        )
        tile_begin = tl.zeros_like(tile) + tile_begin  # one of each tile, where there is no bound, too
        tile_end = tl.zeros_like(tile) + tile_end
        whole = tl.zeros_like(tile)
        others = tl.zeros_like(tile)
        within = 0
        for start in range(begin, end, _STEP):
            n = (start + tl.arange(0, _STEP))[None, :]
            x = tl.load(slab + n * _SAMPLES + sample[:, None], mask=(n < end) & looks, other=0.0)
            counts = tl.where(x - row_max[:, None] < skip_bound, 0, 1)  # NaN counts
            counts = tl.max(counts.reshape(_SAMPLES // _TILE_SAMPLES, _TILE_SAMPLES, _STEP), 1)
            is_cut = are_cut(
                n,
                (tile * _TILE)[:, None],
                tile_last[:, None],
                kv_len,
                low,
                high,
                HAS_LOW,
                HAS_HIGH,
                _KEY_BLOCK,
            )
            listed = (counts > 0) | (looks == 0) | is_cut | (n == tile_begin[:, None])
            is_within = (n >= tile_begin[:, None]) & (n < tile_end[:, None]) & exists[:, None]
            listed &= is_within
            if PROBES == 1:
                within += tl.sum(is_within.to(tl.int32))
            if MASK == 1:
                is_cut |= _are_cut_by_mask(n, used_keys + _USED_KEYS * b)
            if MASK == 2:
                is_cut = n >= 0
            is_whole = (listed & (is_cut == 0)).to(tl.int32)
            is_other = listed.to(tl.int32) - is_whole
            front = _HEADER - 1 + whole[:, None] + tl.cumsum(is_whole, 1)
            back = _HEADER + blocks - others[:, None] - tl.cumsum(is_other, 1)
            place = tl.where(is_whole != 0, front, back)
            tl.store(target[:, None] + place, 2 * n + tl.zeros_like(place), mask=listed)
            whole += tl.sum(is_whole, 1)
            others += tl.sum(is_other, 1)
        if PROBES == 1:
            tl.store(of_probes + 2 * number, within)
            tl.store(of_probes + 2 * number + 1, within - tl.sum(whole + others))
        # As `_finish` of block_list.py, of several tiles.
        tl.store(target, whole + others, mask=exists)
        tl.store(target + 1, whole, mask=exists)
        tl.store(target + _HEADER, tl.zeros_like(tile), mask=exists & (whole + others == 0))
        tl.debug_barrier()  # other threads have written what a thread moves, and all have read the slab, which is written again next
        gap = blocks - whole - others
        for start in range(0, tl.max(others, 0), _STEP):
            place = (start + tl.arange(0, _STEP))[None, :]
            moved = target[:, None] + (_HEADER + whole[:, None] + place)
            is_there = (place < others[:, None]) & (gap > 0)[:, None]
            x = tl.load(moved + gap[:, None], mask=is_there, other=0)
            tl.debug_barrier()  # all have read what others overwrite
            tl.store(moved, x, mask=is_there)


@triton.jit
def _are_cut_by_mask(n, used_keys):
    """Which blocks n have keys that a mask over keys rules out, or may have: only the first gap in what it leaves is known."""
    used = used_keys.to(tl.pointer_type(tl.int32))
    first = n * _KEY_BLOCK
    cut = (first < tl.load(used)) | (first + _KEY_BLOCK > tl.load(used + 1))
    in_gap = (first + _KEY_BLOCK > tl.load(used + 3)) & (first < tl.load(used + 4))
    return cut | ((tl.load(used + 2) == 0) & in_gap)


@triton.jit
def _masked_maximum(
    s, scale, rows, block, kv_len, low, high, mask, stride_mn,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The largest score of each row among the keys of a block that it sees; -inf where it sees none."""
    n = block * _KEY_BLOCK + tl.arange(0, _KEY_BLOCK)
    keep = (n < kv_len)[None, :]
    x = s.to(tl.float32) * scale[:, None]
    if MASK != 0:
        values = tl.load(mask + n.to(tl.int64) * stride_mn, mask=n < kv_len, other=0)
        if MASK == 1:
            keep &= (values != 0)[None, :]
        else:
            bias = values.to(tl.float32)
            lowest = (bias < _LOWEST) & (bias > float("-inf"))
            x += tl.where(lowest, _LOWEST, bias * _LOG2_E)[None, :]
    if HAS_HIGH:
        keep &= n[None, :] <= (rows + high)[:, None]
    if HAS_LOW:
        keep &= n[None, :] >= (rows + low)[:, None]
    return tl.max(tl.where(keep, x, float("-inf")), 1)
