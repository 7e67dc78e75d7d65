"""The workspace that the quantise kernels write and the attention kernels read, and which keys of a sequence count.

    q8      int8  [heads, q_blocks * 128, D]  one scale per row, with the softmax scale and log2(e) in it
    k8      int8  [kv_heads, kv_blocks * 128, D]  K minus a per-channel vector, one scale per 128-key block
    v8      e4m3 or int8  [kv_heads * DV, kv_blocks * 128]  (V minus a per-channel vector) / channel scale
            / block scale, transposed; 0 for the first key of a sequence, which attention takes from `scales`
            or a 16-bit float  [kv_heads, kv_blocks * 128, DV]  a copy of V ("accurate"), transposed if V_TRANSPOSED
    scales  fp32, the sections listed in `sections`

and, where Q and K are evened by more than K's mean (smoothing.py),

    channel_sizes  fp32 [batch, kv_heads, 2, D]  of K's channels and of Q's, written where they are evened
    rotation       bf16 [tiles, C, C]  the matrix, without its factors, of each tile of up to C = 128 channels

D and DV are the padded head dims (`padded_head_dim`). A sequence owns whole blocks of 128 rows, so dense and
varlen inputs share one layout: sequence b starts at block b * ceil(length / 128), or at cu_seqlens[b] // 128
+ b, which never overlaps and needs no look at the lengths from the host.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

USED_KEYS = 5  # numbers about a mask over keys, for each sequence
KEY_BLOCK = 128  # keys per K scale, V scale and P scale; rows per program, of Q too

# Numbers that both quantise kernels take and are not compiled for: they change with the sequence length.
UNSPECIALIZED = [
    "scale",
    "q_size",
    "batch",
    "heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "q_blocks",
    "kv_blocks",
    "stride_qb",
    "stride_qh",
    "stride_qn",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_vb",
    "stride_vh",
    "stride_vn",
    "stride_mb",
]

_KEY_BLOCK = tl.constexpr(KEY_BLOCK)
_USED_KEYS = tl.constexpr(USED_KEYS)
_MASK_STEP = tl.constexpr(4096)  # keys whose mask is looked at at once


def padded_head_dim(head_dim: int) -> tuple[int, int]:
    """(first, second): the head dim as a sum of two powers of two (second may be 0), each one a tile of the
    kernels.

    96 is 64 + 32 and costs 3/4 of 128. 32 is the least: the k of one 8-bit tensor core instruction.
    """
    first = 32
    while first * 2 <= head_dim:
        first *= 2
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = 32
    while second < rest:
        second *= 2
    return (first * 2, 0) if second == first else (first, second)


@triton.jit
def sections(scales, q_size, batch, kv_heads, kv_blocks, D: tl.constexpr, DV: tl.constexpr):
    """The parts of the fp32 workspace after the q_size elements that belong to Q (its scales [heads, q_blocks
    * 128] and, when the LSE is asked for, as many shifts): K scales and log2 of V scales [kv_heads,
    kv_blocks], the vector subtracted from K [batch, kv_heads, D], V's channel scales, what the sample says they
    should be, the vector subtracted from V and what that leaves of the first key's value [batch, kv_heads, 4, DV], and,
    written only for masks over keys, int32 [batch, USED_KEYS]: the first useful key, the last + 1, whether every key between
    them is useful, and the first and the last + 1 of those between that are not; last an int32 zero, for a kernel that counts what it has
    done."""
    k_scale = scales + q_size
    v_scale = k_scale + kv_heads * kv_blocks
    k_mean = v_scale + kv_heads * kv_blocks
    v_channel = k_mean + batch * kv_heads * D
    used_keys = v_channel + batch * kv_heads * 4 * DV
    return k_scale, v_scale, k_mean, v_channel, used_keys


def scales_size(q_size: int, batch: int, kv_heads: int, kv_blocks: int, d: int, dv: int) -> int:
    """Elements of the fp32 workspace."""
    return q_size + 2 * kv_heads * kv_blocks + batch * (kv_heads * (d + 4 * dv) + USED_KEYS) + 1


@triton.jit
def sequence(b, length, cu_seqlens, VARLEN: tl.constexpr):
    """(first row of sequence b inside its tensor, its length, its first block in the workspace)."""
    if VARLEN:
        start = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - start
        return start.to(tl.int64), length, start // _KEY_BLOCK + b
    else:
        return 0, length, b * tl.cdiv(length, _KEY_BLOCK)


@triton.jit
def used_keys_of(values, MASK: tl.constexpr):
    """Which keys a mask does not rule out, from its values."""
    if MASK == 1:
        return values != 0
    else:
        return values.to(tl.float32) != float("-inf")


@triton.jit
def counts(n, exists, mask, stride_mn, MASK: tl.constexpr):
    """Which of the keys n exist and are not ruled out by a mask over keys."""
    if MASK != 0:
        exists = exists & used_keys_of(tl.load(mask + n.to(tl.int64) * stride_mn, mask=exists, other=0), MASK)
    return exists


@triton.jit
def used_range(mask, kv_len, stride_mn, MASK: tl.constexpr):
    """First and last + 1 key of a sequence that its mask does not rule out (the largest integer and 0 where it
    rules out all), and how many there are."""
    first = tl.full([_MASK_STEP], 0x7FFFFFFF, tl.int32)
    last = tl.full([_MASK_STEP], -1, tl.int32)
    count = tl.zeros([_MASK_STEP], tl.int32)
    for start in range(0, kv_len, _MASK_STEP):
        n = start + tl.arange(0, _MASK_STEP)
        used = counts(n, n < kv_len, mask, stride_mn, MASK)
        first = tl.minimum(first, tl.where(used, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(used, n, -1))
        count += used.to(tl.int32)
    return tl.min(first, 0), tl.max(last, 0) + 1, tl.sum(count, 0)


@triton.jit
def gap_range(mask, start, end, stride_mn, MASK: tl.constexpr):
    """First and last + 1 of the keys from `start` to `end` that a mask rules out (the largest integer and 0 where there are none)."""
    first = tl.full([_MASK_STEP], 0x7FFFFFFF, tl.int32)
    last = tl.full([_MASK_STEP], -1, tl.int32)
    for step in range(start, end, _MASK_STEP):
        n = step + tl.arange(0, _MASK_STEP)
        unused = (n < end) & (counts(n, n < end, mask, stride_mn, MASK) == 0)
        first = tl.minimum(first, tl.where(unused, n, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(unused, n, -1))
    return tl.min(first, 0), tl.max(last, 0) + 1
