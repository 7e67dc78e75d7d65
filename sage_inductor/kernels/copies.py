"""How much memory the copies of Q, K and V in 8 bits take, which the kernels `triton` and `hopper` hold while one attention runs.

They lie in one workspace (triton/quantize.py), in blocks of 128 rows and padded head dims:

    Q    1 byte an element, and 4 bytes a row for its scale (8 with the LSE)
    K    1 byte an element, and 4 bytes a block
    V    1 byte an element, and 4 bytes a block; "accurate": 2 bytes an element
    and  4 bytes a channel of K, 12 a channel of V, for each sequence and head; where channels are equalised, 8 more a channel of K
         where they are rotated, the matrix: 2 bytes an element, once

Not counted: masks that are read block by block (a bit an element of a bool mask, in stripes of 64 or 128 queries and blocks of
64 or 128 keys, and a byte a block; `hopper`: 4 bytes more a block of a tile), segments (4 bytes a query and a key; `hopper`: 4 more a block of
a tile), and tiles that `hopper` splits over keys.
"""

from __future__ import annotations

from sage_inductor.kernels.smoothing import (
    EQUALISING,
    LARGEST_BLOCK,
    ROTATING,
    SMOOTHINGS,
    blocks,
    resolved_smoothing,
)

BLOCK = 128  # rows


def copies_bytes(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value_head_dim: int,
    precision: str,
    return_lse: bool = False,
    smoothing: str = "auto",
) -> int:
    """Bytes of the copies for a query `[batch, heads, q_len, head_dim]` and a key `[batch, kv_heads, kv_len, head_dim]`; batch, or
    batch and heads, may be missing."""
    batch, heads, q_len, head_dim = (*(1,) * (4 - len(query)), *query)
    kv_heads, kv_len = (*(1,) * (4 - len(key)), *key)[1:3]
    d, dv = padded(head_dim), padded(value_head_dim)
    rows, keys = (batch * -(-length // BLOCK) * BLOCK for length in (q_len, kv_len))
    q = heads * rows * (d + (8 if return_lse else 4))
    kv = kv_heads * keys * (d + dv * (2 if precision == "accurate" else 1))
    scales = 8 * kv_heads * keys // BLOCK + 4 * batch * (kv_heads * (d + 4 * dv) + 5)
    smoothing = resolved_smoothing(smoothing, SMOOTHINGS)
    sizes = 8 * batch * kv_heads * d if smoothing in EQUALISING else 0
    rotation = 2 * _rotation_elements(head_dim) if smoothing in ROTATING else 0
    return q + kv + scales + sizes + rotation


def _rotation_elements(head_dim: int) -> int:
    """Of the matrices of all tiles of channels: one tile up to LARGEST_BLOCK channels, else one for each block."""
    if head_dim > LARGEST_BLOCK:
        return len(blocks(head_dim)) * LARGEST_BLOCK**2
    width = 1 << (padded(head_dim) - 1).bit_length()
    return width**2


def padded(head_dim: int) -> int:
    """`head_dim` as the kernels have it: the least sum of one or two powers of two from 32 on."""
    first = 32
    while first * 2 <= head_dim:
        first *= 2
    if first >= head_dim:
        return first
    second = 32
    while second < head_dim - first:
        second *= 2
    return first + second
