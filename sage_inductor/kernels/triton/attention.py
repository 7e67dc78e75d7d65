"""Device code of the attention kernel: Q quantised on the fly, INT8 QK^T, then PV in FP8, INT8 or 16 bits.

There is one kernel; constexprs choose its variant. A program computes BLOCK_M queries of one head. Scores, the running maximum
and LSE are kept in units of log2.

V has a scale for each block of 128 keys, and the accumulator takes it for free: the accumulator's unit is that of the latest
block, and the factor per row of the online softmax, which is applied anyway, also converts units. "balanced" does the same for
P: each block's P is rounded to INT8 against the block's own maximum, because the running one would waste bits, and the
accumulator's unit follows. The mean that was subtracted from V before it was rounded to 8 bits is added to the output.

The first key of a sequence is often an attention sink: it draws most of the weight, and has little value. In 8 bits its value is 0,
so that P need not be rounded against its weight, and may be anything there; its score is kept, and its value added at the end.

Sources: SageAttention 1 and 2 (arXiv:2410.02367, 2411.10958) for the quantisation of Q, K and P;
FlashAttention-2 (arXiv:2307.08691) for the loop; attention sinks: arXiv:2309.17453.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..skipping import SAMPLED_TILE
from .band import band_blocks
from .block_list import _HEADER
from .mask_blocks import add_bits, used_blocks, whole_blocks
from .numerics import (
    dot_float,
    exp2,
    load_uniform,
    pack_to_int8,
    to_float,
    to_float8,
)
from .segments import _SPAN, segment_sections, within_segment
from .workspace import _KEY_BLOCK, _USED_KEYS, sections, sequence

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_448 = tl.constexpr(8.807354922057604)  # P in FP8 spans e4m3's range, up to 448
_LOG2_127 = tl.constexpr(6.9886846867721655)  # P in INT8
# Below every score; finite, so that no row ever computes inf - inf.
_LOWEST = tl.constexpr(-1.0e30)
_LISTED = tl.constexpr(SAMPLED_TILE.rows)  # queries that one list is for
_LEAST_INT = tl.constexpr(-(2**31))
_SMALLEST_SCALE = tl.constexpr(2.0**-126)  # the smallest normal float32: any score times it is 0 to softmax
# "balanced": a block whose maximum is further (log2) than this below the row's is rounded against a higher reference, so that
# the accumulator's unit cannot overflow. Its weights are below 2**-32. Nor is the first key's weight larger than 2**32 times that of
# the reference.
_REFERENCE_RANGE = tl.constexpr(32.0)


@triton.jit
def _permute_keys(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of P in the order of V's keys (quantize.py). They are renamed only: no data moves between threads."""
    return p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _load_tile(source, row, col, pitch, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """The tile [ROWS, COLS] at (row, col) of a workspace matrix. `source` is a tensor descriptor with TMA, else a pointer:
    triton's own substitute for descriptors is not pipelined."""
    if TMA:
        return source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)
        return tl.load(source + r.to(tl.int64)[:, None] * pitch + (col + tl.arange(0, COLS))[None, :])


@triton.jit
def _load_v(
    tile0, tile1, key, row, col, pitch,
    DV0: tl.constexpr, DV1: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tiles of V of a block of keys, [BLOCK_N, DV0] and [BLOCK_N, DV1]; the first again where there is no second."""
    if PRECISION == "accurate":
        v0 = _load_tile(tile0, key, 0, DV0 + DV1, BLOCK_N, DV0, TMA)
        v1 = v0
        if DV1 > 0:
            v1 = _load_tile(tile1, key, DV0, DV0 + DV1, BLOCK_N, DV1, TMA)
    else:
        v0 = _load_tile(tile0, row, col, pitch, DV0, BLOCK_N, TMA).T
        v1 = v0
        if DV1 > 0:
            v1 = _load_tile(tile1, row + DV0, col, pitch, DV1, BLOCK_N, TMA).T
    return v0, v1


@triton.jit
def _store_output(
    out, tile, channel, mean, seen, first, first_weight, stride_m, stride_d, rows, q_len,
    DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    d = FIRST + tl.arange(0, SIZE)
    if channel is not None:
        # The mean of V is added back for rows that see a key; the others stay 0.
        tile = tile * tl.load(channel + tl.arange(0, SIZE))[None, :]
        tile += seen[:, None] * tl.load(mean + tl.arange(0, SIZE))[None, :]
        value = first_weight[:, None] * tl.load(first + tl.arange(0, SIZE))[None, :]
        tile += tl.where((first_weight >= 0)[:, None], value, 0.0)
    tl.store(
        out + rows.to(tl.int64)[:, None] * stride_m + d[None, :] * stride_d,
        to_float(tile, out.dtype.element_ty, PTX),
        mask=(rows < q_len)[:, None] & (d < DIM)[None, :],
    )


@triton.jit
def _add_mask(
    x, mask, stride_mm, stride_mn, rows, first_col, q_len, mask_end,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """The scores with attn_mask applied. With KEY_MASK the mask is the same for every query and is read as a vector.

    `mask_end` is kv_len, written so that the compiler sees what divides it. It then reads in wide words, and can fetch the
    tile ahead, asynchronously; else it reads byte by byte when the tile is needed.
    """
    columns = tl.arange(0, BLOCK_N)
    # The block's address, and within it offsets that are known while compiling: one register instead of two a key.
    source = mask + tl.cast(first_col, tl.int64) * stride_mn + columns.to(tl.int64) * stride_mn
    exists = first_col + columns < mask_end
    if KEY_MASK:
        values = tl.load(source, mask=exists, other=0)[None, :]
    else:
        values = tl.load(
            source[None, :] + rows.to(tl.int64)[:, None] * stride_mm,
            mask=(rows < q_len)[:, None] & exists[None, :],
            other=0,
        )
    if MASK == 1:
        return tl.where(values != 0, x, float("-inf"))
    else:
        # Large finite values, such as torch.finfo.min, must not become -inf: a row of nothing else is uniform.
        values = values.to(tl.float32)
        low = (values < _LOWEST) & (values > float("-inf"))
        return x + tl.where(low, _LOWEST, values * _LOG2_E)


@triton.jit
def _add_block(
    acc0,
    acc1,
    total,
    row_max,
    reference,
    unit,
    x,
    scale,
    block_max,
    rounded_max,
    new_unit,
    v0,
    v1,
    v_tile0,
    v_tile1,
    key,
    value_row,
    value,
    value_pitch,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY_V: tl.constexpr,
    TMA: tl.constexpr,
    PTX: tl.constexpr,
):
    """The softmax of one block of keys and its product with V: `_attend_blocks` has computed its scores, `x` times `scale`, their
    maxima, and those that P is rounded against. V is read here unless it was (EARLY_V)."""
    new_max = tl.maximum(row_max, block_max)
    if PRECISION == "balanced":
        new_reference = tl.maximum(rounded_max, new_max - _REFERENCE_RANGE)
        # Rounded up by an ulp, so that P never exceeds 127, which would wrap around.
        shift = new_reference - _LOG2_127 + tl.minimum(tl.abs(new_reference), 1.0e6) * 1.2e-7
    elif PRECISION == "fast":
        new_reference = tl.maximum(reference, rounded_max)
        shift = new_reference - _LOG2_448
    else:
        new_reference = new_max
        shift = new_max
    row_max = new_max
    x = x.to(tl.float32)
    p = exp2(x * scale[:, None] - shift[:, None], PTX)
    drop = reference - new_reference
    reference = new_reference
    rescale = exp2(drop, PTX)
    total = total * rescale + tl.sum(p, 1)
    if not EARLY_V:
        v0, v1 = _load_v(
            v_tile0, v_tile1, key, value_row, value, value_pitch, DV0, DV1, BLOCK_N, PRECISION, TMA
        )
    if PRECISION == "accurate":
        p16 = to_float(p, v0.dtype, PTX)
        acc0 = dot_float(p16, v0, acc0 * rescale[:, None], PTX)
        if DV1 > 0:
            acc1 = dot_float(p16, v1, acc1 * rescale[:, None], PTX)
    else:
        rescale = exp2(drop + (unit - new_unit), PTX)
        unit = new_unit
        p = _permute_keys(p, BLOCK_M, BLOCK_N)
        # Each block's product is computed by itself, and then added: tensor cores add products of 8-bit floats with few
        # bits, and over a long sequence in one accumulator that shows.
        if PRECISION == "fast":
            p8 = to_float8(p, PTX)
            acc0 = acc0 * rescale[:, None] + tl.dot(p8, v0)
            if DV1 > 0:
                acc1 = acc1 * rescale[:, None] + tl.dot(p8, v1)
        else:
            p8 = pack_to_int8(p, PTX)
            acc0 = acc0 * rescale[:, None] + tl.dot(p8, v0, out_dtype=tl.int32).to(tl.float32)
            if DV1 > 0:
                acc1 = acc1 * rescale[:, None] + tl.dot(p8, v1, out_dtype=tl.int32).to(tl.float32)
    return acc0, acc1, total, row_max, reference, unit


@triton.jit
def _counts(block_max, row_max, skip_below):
    """Whether a block of keys counts for some row: its maximum does not lie below the row's by `skip_below` (negative). So does
    one that is NaN."""
    return tl.max(tl.where(block_max - row_max < skip_below, 0, 1), 0) > 0


@triton.jit
def _attend_blocks(
    acc0,
    acc1,
    total,
    row_max,
    reference,
    unit,
    first_score,
    q0,
    q1,
    q_scale,
    k_tile0,
    k_tile1,
    v_tile0,
    v_tile1,
    k_scale,
    v_scale,
    key_row,
    value_row,
    value_col,
    value_pitch,
    begin,
    end,
    rows,
    q_len,
    kv_len,
    low,
    high,
    mask,
    mask_end,
    stride_mm,
    stride_mn,
    mask_bits,
    mask_block0,
    own_ids,
    k_ids,
    skip_below,
    kept_from,
    entries,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASK_BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SKIP: tl.constexpr,
    LIST: tl.constexpr,
    TMA: tl.constexpr,
    PTX: tl.constexpr,
):
    """Attend to key blocks begin..end. With LIST these are numbers of steps along a tile's list, whose `entries` are blocks of 128 keys,
    each of LIST steps.

    With SKIP, a block before `kept_from` whose maximum lies further than `skip_below` (negative, log2) below the running one in
    every row is left out, as if its keys were masked.

    The accumulators are in the unit 2**(unit - reference), `total`, the softmax denominator, in 2**-reference. In "accurate"
    `reference` is the running maximum, `row_max`, itself; in "fast" that of all keys but the first, whose score goes to
    `first_score`.
    """
    for number in tl.range(begin, end):
        block = number
        if LIST:
            block = tl.load(entries + number // LIST) // 2 * LIST + number % LIST
        slot = block * BLOCK_N // _KEY_BLOCK
        scale = q_scale * load_uniform(k_scale + slot, PTX)
        new_unit = None
        if PRECISION != "accurate":
            new_unit = load_uniform(v_scale + slot, PTX)
        key = key_row + block * BLOCK_N
        value = value_col + block * BLOCK_N
        s = tl.dot(q0, _load_tile(k_tile0, key, 0, D0 + D1, BLOCK_N, D0, TMA).T, out_dtype=tl.int32)
        if D1 > 0:
            s = tl.dot(
                q1, _load_tile(k_tile1, key, D0, D0 + D1, BLOCK_N, D1, TMA).T, acc=s, out_dtype=tl.int32
            )
        # V is read here, before it is used. Waiting for a tile is a barrier: it costs least here, where the warps stand together
        # anyway, and ptxas orders the softmax better without a barrier after it. Without TMA the tile would take registers
        # from here on; two tiles, or more than 128 channels, leave too few registers. With SKIP it is not known yet whether V is
        # read.
        EARLY_V: tl.constexpr = TMA and DV1 == 0 and DV0 <= 128 and not SKIP
        v0 = None
        v1 = None
        if EARLY_V:
            v0, v1 = _load_v(
                v_tile0, v_tile1, key, value_row, value, value_pitch, DV0, DV1, BLOCK_N, PRECISION, TMA
            )
        if MASKED:
            cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
            x = s.to(tl.float32)
            if MASK == 2:
                x *= scale[:, None]
                scale = tl.full([BLOCK_M], 1.0, tl.float32)
            else:
                # Scores that are ruled out become -inf before they are scaled: scaling is one instruction with the
                # exponential's subtraction. A scale of 0 would turn -inf into NaN, so it is raised. A scale of NaN stays, and
                # makes the row NaN.
                scale = tl.maximum(scale, _SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
            if MASK == 1 and MASK_BLOCKS:
                x = add_bits(x, mask_bits, mask_block0 + block, BLOCK_M, BLOCK_N)
            elif MASK != 0:
                x = _add_mask(
                    x,
                    mask,
                    stride_mm,
                    stride_mn,
                    rows,
                    block * BLOCK_N,
                    q_len,
                    mask_end,
                    BLOCK_N,
                    MASK,
                    KEY_MASK,
                )
            if MASK != 1 or HAS_HIGH or HAS_LOW:  # a bool mask is False beyond kv_len
                keep = (cols < kv_len)[None, :]
                if HAS_HIGH:
                    keep = keep & (cols[None, :] <= (rows + high)[:, None])
                if HAS_LOW:
                    keep = keep & (cols[None, :] >= (rows + low)[:, None])
                x = tl.where(keep, x, float("-inf"))
            if SEGMENTS:
                x = within_segment(x, own_ids, k_ids + block * BLOCK_N, BLOCK_N)
            block_max = tl.max(x, 1) * scale
        else:
            # The maximum is taken of the integers, which is cheaper; the whole row has one scale.
            block_max = tl.max(s, 1).to(tl.float32) * scale
            x = s
        rounded_max = block_max
        found_score = first_score
        if PRECISION != "accurate":  # noqa: SIM102 (known while compiling)
            if block * BLOCK_N <= 0:  # written as block == 0 ptxas spills a register
                is_first = (tl.arange(0, BLOCK_N) == 0)[None, :]
                if MASKED:
                    found_score = tl.max(tl.where(is_first, x, float("-inf")), 1) * scale
                    rounded_max = tl.max(tl.where(is_first, float("-inf"), x), 1) * scale
                else:
                    found_score = tl.max(tl.where(is_first, s, _LEAST_INT), 1).to(tl.float32) * scale
                    rounded_max = tl.max(tl.where(is_first, _LEAST_INT, s), 1).to(tl.float32) * scale
                rounded_max = tl.maximum(rounded_max, block_max - _REFERENCE_RANGE)
        if SKIP:
            if (block >= kept_from) | _counts(block_max, row_max, skip_below):
                first_score = found_score
                acc0, acc1, total, row_max, reference, unit = _add_block(
                    acc0, acc1, total, row_max, reference, unit, x, scale, block_max, rounded_max, new_unit, v0, v1, v_tile0,
                    v_tile1, key, value_row, value, value_pitch, DV0, DV1, BLOCK_M, BLOCK_N, PRECISION, EARLY_V, TMA, PTX,
                )  # fmt: skip
        else:
            first_score = found_score
            acc0, acc1, total, row_max, reference, unit = _add_block(
                acc0, acc1, total, row_max, reference, unit, x, scale, block_max, rounded_max, new_unit, v0, v1, v_tile0, v_tile1,
                key, value_row, value, value_pitch, DV0, DV1, BLOCK_M, BLOCK_N, PRECISION, EARLY_V, TMA, PTX,
            )  # fmt: skip
    return acc0, acc1, total, row_max, reference, unit, first_score


_UNSPECIALIZED = [
    "q_size",
    "batch",
    "heads",
    "group",
    "q_len",
    "kv_len",
    "q_blocks",
    "kv_blocks",
    "together",
    "window_left",
    "window_right",
    "stride_ob",
    "stride_oh",
    "stride_om",
    "stride_lb",
    "stride_lh",
    "stride_mb",
    "stride_mh",
    "stride_mm",
    "mask_batch",
    "mask_heads",
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attention_kernel(
    mask,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    q_tile0,
    q_tile1,
    k_tile0,
    k_tile1,
    v_tile0,
    v_tile1,
    scales,
    mask_states,
    mask_bits,
    segments,
    block_list,
    q_size,
    batch,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    kv_blocks,
    together,
    window_left,
    window_right,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_lb,
    stride_lh,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    mask_batch,
    mask_heads,
    skip_bound,
    OUT_ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    SKIP_BLOCKS: tl.constexpr,
    MASK_BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    VARLEN: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    SKIP: tl.constexpr,
    LIST: tl.constexpr,
    STORED: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute out, and lse, from the workspace that workspace.py describes. `_load_tile` reads `*_tile0` and `*_tile1`.

    Query i attends to keys i + low .. i + high. MASK is 0 for none, 1 for bool, 2 for additive. With MASK_BLOCKS,
    `mask_states` has the state of each block and, for a bool mask, `mask_bits` its bits (mask_blocks.py), for each batch and
    head that the mask has. With SEGMENTS, `segments` has the ids of queries and keys, their ranges and the spans of tiles (segments.py); it goes
    with neither MASK_BLOCKS nor VARLEN. With SKIP, `skip_bound` is the logarithm (base 2) of the threshold below which blocks of
    keys are left out. With LIST, `block_list` names the blocks that each 128 queries read (block_list.py), of a call with no more
    than a mask over keys; it has all that some query of those may see in part. LIST is how many steps of BLOCK_N a block has. With STORED, K and V were quantised before, and kv_len may be the first keys of them only.

    Strides of out but the last come in units of OUT_ALIGN elements. Strides of mask but the last come in units of
    MASK_ALIGN, which divides kv_len, too. In a varlen call q_len and kv_len are the longest lengths.

    The grid is 1-D, of batch * heads * ceil(q_len / BLOCK_M) programs. The tiles of `together` heads follow each other, so
    that programs that run at a time share K and V in L2. Among them the last tiles of each head come first: under a causal
    mask they are the longest.
    """
    if OVERLAP:
        gdc_wait()
    tiles = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    first_bh = pid // (together * tiles) * together
    rank = pid - first_bh * tiles
    count = min(together, batch * heads - first_bh)
    tile = tiles - 1 - rank // count
    bh = first_bh + rank % count
    b = bh // heads
    h = bh % heads
    kv_heads = heads // group
    kv_h = h // group
    q_start, q_len, q_block0 = sequence(b, q_len, cu_seqlens_q, VARLEN)
    _k_start, kv_len, block0 = sequence(b, kv_len, cu_seqlens_k, VARLEN)
    if STORED:
        block0 = b * (kv_blocks // batch)  # of K that was quantised before, kv_len may be the first keys only
    first_row = tile * BLOCK_M
    if first_row >= q_len:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    k_scale, v_scale, _k_mean, v_channel, used_keys = sections(
        scales, q_size, batch, kv_heads, kv_blocks, D0 + D1, DV0 + DV1
    )
    k_scale += kv_h * kv_blocks + block0
    v_scale += kv_h * kv_blocks + block0
    v_channel += (b * kv_heads + kv_h) * 4 * (DV0 + DV1)

    q_row = (h * q_blocks + q_block0) * _KEY_BLOCK + first_row
    q_scale = tl.load(scales + q_row + tl.arange(0, BLOCK_M))
    q0 = _load_tile(q_tile0, q_row, 0, D0 + D1, BLOCK_M, D0, TMA)
    q1 = q0
    if D1 > 0:
        q1 = _load_tile(q_tile1, q_row, D0, D0 + D1, BLOCK_M, D1, TMA)

    # begin..end: the key blocks that some row attends to. full_begin..full_end: those among them that need no mask.
    offset = kv_len - q_len if BOTTOM_RIGHT else 0
    low = offset - window_left
    high = offset + window_right
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    if LIST:
        # A list is of the queries of this program and, where it has 64, of those beside them: so are the bounds, then.
        first_row = first_row // _LISTED * _LISTED
        last_row = tl.minimum(first_row + _LISTED, q_len) - 1
    begin, end, full_begin, full_end = band_blocks(
        first_row, last_row, kv_len, low, high, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    if SKIP_BLOCKS:
        used_keys = (used_keys + _USED_KEYS * b).to(tl.pointer_type(tl.int32))
        begin = tl.maximum(begin, tl.load(used_keys) // BLOCK_N)
        end = tl.minimum(end, tl.cdiv(tl.load(used_keys + 1), BLOCK_N))
    own_ids = rows
    k_ids = segments
    if SEGMENTS:
        k_ids, _q_range, _k_range, _descends, spans = segment_sections(
            segments, batch, q_len, kv_len, BLOCK_M, BLOCK_N
        )
        slot = b * tiles + tile
        own_ids = tl.load(segments + slot * BLOCK_M + tl.arange(0, BLOCK_M))
        k_ids += b * tl.cdiv(kv_len, BLOCK_N) * BLOCK_N
        spans += slot * _SPAN
        begin = tl.maximum(begin, tl.load(spans))
        end = tl.minimum(end, tl.load(spans + 1))
    mask_block0 = 0
    if MASK_BLOCKS:
        blocks = tl.cdiv(kv_len, BLOCK_N)
        mask_block0 = (((b % mask_batch) * mask_heads + h % mask_heads) * tiles + tile) * blocks
        mask_states += mask_block0
        first_used, last_used = used_blocks(mask_states, blocks)
        begin = tl.maximum(begin, first_used)
        end = tl.minimum(end, last_used)
    elif MASK != 0:
        full_begin = begin  # every block needs the mask
        full_end = begin
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    if MASK_BLOCKS:
        full_begin, full_end = whole_blocks(mask_states, full_begin, full_end)
    if SEGMENTS and MASK == 0:
        full_begin = tl.load(spans + 2)
        full_end = tl.load(spans + 3)

    entries = block_list
    if LIST:
        entries += ((bh.to(tl.int64)) * tl.cdiv(q_len, _LISTED) + first_row // _LISTED) * (
            _HEADER + tl.cdiv(kv_len, _KEY_BLOCK)
        )
        begin = 0
        end = tl.load(entries) * LIST
        full_begin = 0
        full_end = tl.load(entries + 1) * LIST
        entries += _HEADER

    skip_below = rows
    kept_from = 0
    if SKIP:
        # Rows beyond the last query have no say. Of the band's diagonal every block is kept.
        skip_below = tl.where(rows < q_len, skip_bound, float("inf"))
        kept_from = end
        if HAS_HIGH:
            kept_from = tl.maximum(first_row + high + 1, 0) // BLOCK_N

    mask_end = kv_len // MASK_ALIGN * MASK_ALIGN
    if MASK != 0:
        stride_mm = stride_mm.to(tl.int64) * MASK_ALIGN
        mask += (b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh) * MASK_ALIGN
    acc0 = tl.zeros([BLOCK_M, DV0], tl.float32)
    acc1 = acc0
    if DV1 > 0:
        acc1 = tl.zeros([BLOCK_M, DV1], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    reference = row_max
    unit = tl.full([], 0.0, tl.float32)
    first_score = tl.full([BLOCK_M], float("-inf"), tl.float32)
    key_row = (kv_h * kv_blocks + block0) * _KEY_BLOCK
    value_row = kv_h * (DV0 + DV1)
    value_col = block0 * _KEY_BLOCK
    value_pitch = kv_blocks.to(tl.int64) * _KEY_BLOCK
    # In ascending order: blocks cut by the window, the mask or a segment; blocks that all rows attend to in full; blocks cut by
    # the diagonal, the mask, a segment or the end. Lists begin with those in full.
    if ((HAS_LOW or SEGMENTS) and MASK == 0 and not LIST) or MASK_BLOCKS:
        acc0, acc1, total, row_max, reference, unit, first_score = _attend_blocks(
            acc0, acc1, total, row_max, reference, unit, first_score, q0, q1, q_scale, k_tile0, k_tile1, v_tile0, v_tile1,
            k_scale, v_scale, key_row, value_row, value_col, value_pitch, begin, full_begin,
            rows, q_len, kv_len, low, high,
            mask, mask_end, stride_mm, stride_mn, mask_bits, mask_block0, own_ids, k_ids, skip_below, kept_from, entries, D0, D1, DV0, DV1,
            BLOCK_M, BLOCK_N, PRECISION, True, HAS_LOW, HAS_HIGH, MASK, KEY_MASK,
            MASK_BLOCKS, SEGMENTS, SKIP, LIST, TMA, PTX,
        )  # fmt: skip
    if MASK == 0 or MASK_BLOCKS or (LIST and MASK == 1):
        acc0, acc1, total, row_max, reference, unit, first_score = _attend_blocks(
            acc0, acc1, total, row_max, reference, unit, first_score, q0, q1, q_scale, k_tile0, k_tile1, v_tile0, v_tile1,
            k_scale, v_scale, key_row, value_row, value_col, value_pitch, full_begin, full_end,
            rows, q_len, kv_len, low, high,
            mask, mask_end, stride_mm, stride_mn, mask_bits, mask_block0, own_ids, k_ids, skip_below, kept_from, entries, D0, D1, DV0, DV1,
            BLOCK_M, BLOCK_N, PRECISION, False, HAS_LOW, HAS_HIGH, MASK, KEY_MASK,
            MASK_BLOCKS, SEGMENTS, SKIP, LIST, TMA, PTX,
        )  # fmt: skip
    if full_end < end:
        acc0, acc1, total, row_max, reference, unit, first_score = _attend_blocks(
            acc0, acc1, total, row_max, reference, unit, first_score, q0, q1, q_scale, k_tile0, k_tile1, v_tile0, v_tile1,
            k_scale, v_scale, key_row, value_row, value_col, value_pitch, full_end, end,
            rows, q_len, kv_len, low, high,
            mask, mask_end, stride_mm, stride_mn, mask_bits, mask_block0, own_ids, k_ids, skip_below, kept_from, entries, D0, D1, DV0, DV1,
            BLOCK_M, BLOCK_N, PRECISION, True, HAS_LOW, HAS_HIGH, MASK, KEY_MASK,
            MASK_BLOCKS, SEGMENTS, SKIP, LIST, TMA, PTX,
        )  # fmt: skip

    seen = tl.where(total == 0, 0.0, 1.0)  # a row that attends to nothing is 0
    inverse = seen * (1.0 / tl.where(total == 0, 1.0, total))
    channel0 = None
    channel1 = None
    mean0 = None
    mean1 = None
    first0 = None
    first1 = None
    first_weight = None
    if PRECISION != "accurate":
        # As P is computed, so that it is the weight that `total` has. Negative where the row does not see the key.
        log2_largest = _LOG2_448 if PRECISION == "fast" else _LOG2_127
        first_weight = exp2(first_score - (reference - log2_largest), PTX) * inverse
        first_weight = tl.where(first_score == float("-inf"), -1.0, first_weight)
        inverse = inverse * exp2(unit, PTX)
        channel0 = v_channel
        channel1 = v_channel + DV0
        mean0 = v_channel + 2 * (DV0 + DV1)
        mean1 = mean0 + DV0
        first0 = v_channel + 3 * (DV0 + DV1)
        first1 = first0 + DV0
    stride_om = stride_om.to(tl.int64) * OUT_ALIGN
    out += (b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh) * OUT_ALIGN + q_start * stride_om
    _store_output(
        out, acc0 * inverse[:, None], channel0, mean0, seen, first0, first_weight, stride_om, stride_od, rows, q_len,
        V_HEAD_DIM, 0, DV0, PTX,
    )  # fmt: skip
    if DV1 > 0:
        _store_output(
            out, acc1 * inverse[:, None], channel1, mean1, seen, first1, first_weight, stride_om, stride_od, rows, q_len,
            V_HEAD_DIM, DV0, DV1, PTX,
        )  # fmt: skip
    if RETURN_LSE:
        log2_sum = tl.where(total == 0, float("-inf"), reference + tl.log2(tl.where(total == 0, 1.0, total)))
        if PRECISION == "fast":
            log2_sum -= _LOG2_448
        elif PRECISION == "balanced":
            log2_sum -= _LOG2_127
        lse += b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + q_start
        shift = tl.load(scales + q_size // 2 + q_row + tl.arange(0, BLOCK_M))
        tl.store(lse + rows, log2_sum * _LN_2 + shift, mask=rows < q_len)
