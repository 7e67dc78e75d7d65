"""Device code that evens the channels of Q and K before they are rounded (kernels/smoothing.py says how and why), and what it
needs: the sizes of channels, and the rotation.

Rows are rotated by the tensor cores. The factors of channels are in the rows of the matrix, where they are exact: so are the
products of 16-bit inputs, which are multiplied as they are. K's mean is rotated too and goes afterwards. From float32 keys, which
are rounded to TF32, it goes before: the digits that are kept are then those of what tells keys apart.

ROTATION, a constexpr, is None, or for each tile of up to 128 channels (first channel, size, prime, doublings, size, prime,
doublings): the one or two blocks of the matrix (`kernels.smoothing.RotatedBlock`); no second one has size 0.
"""

# Device code: its arguments are pointers and constexprs, which Python's types do not tell apart.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..smoothing import CHANNEL_FLOOR, HALF_OCTAVE, LARGEST_BLOCK, ROTATING, blocks
from .internals import constexpr_function
from .numerics import magnitude, round_to_int8, widen

ROTATION_ROWS = tl.constexpr(16)  # of the matrix, written by one program

_CHANNEL_FLOOR = tl.constexpr(CHANNEL_FLOOR)
_HALF_OCTAVE = tl.constexpr(HALF_OCTAVE)
_SIGN_FACTOR = tl.constexpr(0x9E3779B1)
# Scales below this are of no use to anyone and their reciprocals overflow; zero blocks get it and quantise to
# zeros.
TINY = tl.constexpr(2.0**-100)


def rotation_tiles(smoothing: str, head_dim: int) -> tuple[tuple[int, ...], ...] | None:
    """The constexpr ROTATION. Blocks that fit one tile of 128 channels share it."""
    if smoothing not in ROTATING:
        return None
    found = [(block.first, block.size, block.prime, block.doublings) for block in blocks(head_dim)]
    if head_dim <= LARGEST_BLOCK and len(found) == 2:
        return ((*found[0], *found[1][1:]),)
    return tuple((*block, 0, 0, 0) for block in found)


@constexpr_function
def tiles_of(rotation: Any) -> Any:
    return 1 if rotation is None else len(rotation)


@constexpr_function
def mean_goes_first(rotation: Any, dtype: Any) -> Any:
    """Whether K's mean is subtracted from what is multiplied, and not from the product."""
    return rotation is not None and dtype == tl.float32


@constexpr_function
def tile_width(rotation: Any, d_pow2: int) -> Any:
    """Channels of a tile, with padding."""
    return d_pow2 if rotation is None or len(rotation) == 1 else 128


@constexpr_function
def tile_first(rotation: Any, tile: int) -> Any:
    """The first channel of a tile; of one behind the last, its end."""
    if rotation is None:
        return 0
    if tile == len(rotation):
        return rotation[-1][0] + tile_size(rotation, tile - 1, 0)
    return rotation[tile][0]


@constexpr_function
def tile_size(rotation: Any, tile: int, head_dim: int) -> Any:
    """Channels of a tile."""
    return head_dim if rotation is None else rotation[tile][1] + rotation[tile][4]


@constexpr_function
def block_size(rotation: Any, tile: int, second: bool) -> Any:
    return rotation[tile][4 if second else 1]


@constexpr_function
def common_norm(rotation: Any) -> Any:
    """What rows of the first block of +1 and -1 are multiplied by for the matrix to be orthogonal."""
    return 1.0 if rotation is None else float(rotation[0][1]) ** -0.5


@constexpr_function
def relative_norm(rotation: Any, tile: int, second: bool) -> Any:
    """The same of another block, of the first's; 1 where there is none."""
    size = 0 if rotation is None else rotation[tile][4 if second else 1]
    return 1.0 if size == 0 else float(rotation[0][1] / size) ** 0.5


@constexpr_function
def block_prime(rotation: Any, tile: int, second: bool) -> Any:
    return rotation[tile][5 if second else 2]


@constexpr_function
def block_doublings(rotation: Any, tile: int, second: bool) -> Any:
    return rotation[tile][6 if second else 3]


@triton.jit
def write_rotation(target, row, ROTATION: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr):
    """Write ROTATION_ROWS rows of a tile's matrix [C, C], from `row` on: +1 and -1, and 0 beyond its blocks."""
    i = row + tl.arange(0, ROTATION_ROWS)[:, None]
    j = tl.arange(0, C)[None, :]
    size: tl.constexpr = block_size(ROTATION, TILE, False)
    first = _is_negative(i, j, block_prime(ROTATION, TILE, False), block_doublings(ROTATION, TILE, False))
    entry = tl.where((i < size) & (j < size), 1.0 - 2.0 * first, 0.0)
    second_size: tl.constexpr = block_size(ROTATION, TILE, True)
    if second_size > 0:
        second = _is_negative(
            i - size, j - size, block_prime(ROTATION, TILE, True), block_doublings(ROTATION, TILE, True)
        )
        inside = (i >= size) & (j >= size) & (i < size + second_size) & (j < size + second_size)
        entry = tl.where(inside, 1.0 - 2.0 * second, entry)
    channel = tile_first(ROTATION, TILE) + i
    sign = (channel.to(tl.int64) * _SIGN_FACTOR >> 16) & 1
    entry = tl.where(sign == 1, -entry, entry)
    tl.store(target + i * C + j, entry.to(tl.bfloat16))


@triton.jit
def _is_negative(i, j, PRIME: tl.constexpr, DOUBLINGS: tl.constexpr):
    """1 where the element (i, j) of a Hadamard matrix is -1, 0 where it is +1."""
    # Of the doublings: the parity of the bits that i and j have in common.
    bits = i & j & ((1 << DOUBLINGS) - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    negative = bits & 1
    if PRIME > 0:
        i >>= DOUBLINGS
        j >>= DOUBLINGS
        power = _power(
            (j - i + PRIME) % PRIME, (PRIME - 1) // 2, PRIME
        )  # PRIME - 1 where it is no square (Euler)
        is_negative = tl.where(j == 0, i > 0, (i > 0) & (power == PRIME - 1))
        negative ^= is_negative.to(tl.int32)
    return negative


@triton.jit
def _power(base, EXPONENT: tl.constexpr, PRIME: tl.constexpr):
    """base ** EXPONENT modulo PRIME, which is below 128."""
    result = base * 0 + 1
    for bit in tl.static_range(0, 7):
        if (EXPONENT >> bit) & 1:
            result = result * base % PRIME
        base = base * base % PRIME
    return result


@triton.jit
def sampled_size(x, weight):
    """The root of the mean square of each channel of a sample [samples, channels]; `weight` is one over how many count."""
    # In units of each channel's maximum: a square of a large float32 would overflow, one of a small one vanish.
    largest = tl.max(tl.abs(x), 0)
    unit = 1.0 / tl.where(largest < TINY, 1.0, largest)
    x = x * unit[None, :]
    return largest * tl.sqrt(tl.sum(x * x, 0) * weight)


@triton.jit
def _halves(sizes, channel, inside, HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr):
    """Twice the logarithm of the factor s of some channels, an integer, from `sizes` [2, D] of K's channels and of Q's."""
    d = tl.arange(0, D_POW2)
    most_k = tl.max(tl.load(sizes + d, mask=d < HEAD_DIM, other=0.0), 0)
    most_q = tl.max(tl.load(sizes + D + d, mask=d < HEAD_DIM, other=0.0), 0)
    k = _relative(tl.load(sizes + channel, mask=inside, other=0.0), most_k)
    q = _relative(tl.load(sizes + D + channel, mask=inside, other=0.0), most_q)
    ratio = tl.log2(k) - tl.log2(q)
    return ((ratio + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int32)  # rint


@triton.jit
def _relative(size, most):
    # Sizes below TINY, all of them, count as 0, and those of one head as equal.
    return tl.where(most < TINY, 1.0, tl.maximum(size / tl.where(most < TINY, 1.0, most), _CHANNEL_FLOOR))


@triton.jit
def _half_octaves(halves):
    """2 ** (halves / 2), of odd ones in bfloat16's 8 digits: 181/128 stands for the root of 2, and 181/256 for its
    reciprocal."""
    octaves = halves >> 1
    power = ((octaves + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where((halves & 1) == 1, power * _HALF_OCTAVE, power)


@triton.jit
def evening(
    mean, sizes, rotation,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, D_POW2: tl.constexpr, TILE: tl.constexpr, OF_KEYS: tl.constexpr,
    EQUALISE: tl.constexpr, ROTATION: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What `evened` multiplies the rows of a head by, in a tile of channels, and what it takes from keys: a matrix [C, C] of a
    dtype that rows of DTYPE can be multiplied by, or factors [C]; and K's mean times that, [C], or as it is where it goes first."""
    d = tl.arange(0, tile_width(ROTATION, D_POW2))
    inside = d < tile_size(ROTATION, TILE, HEAD_DIM)
    channel = tile_first(ROTATION, TILE) + d
    factor = tl.full([tile_width(ROTATION, D_POW2)], 1.0, tl.float32)
    if EQUALISE:
        halves = _halves(sizes, channel, inside, HEAD_DIM, D, D_POW2)
        factor = _half_octaves(-halves) if OF_KEYS else _half_octaves(halves)
    subtracted = tl.load(mean + channel, mask=inside, other=0.0)
    if not mean_goes_first(ROTATION, DTYPE):
        subtracted *= factor
    if ROTATION is None:
        return factor, subtracted
    else:
        C: tl.constexpr = tile_width(ROTATION, D_POW2)
        signs = tl.load(rotation + (TILE * C + d[:, None]) * C + d[None, :]).to(tl.float32)
        if not mean_goes_first(ROTATION, DTYPE):
            subtracted = tl.sum(signs * subtracted[:, None], 0)
        matrix = signs * factor[:, None]
        # Every element has 8 digits, which all of these dtypes hold.
        return matrix.to(tl.float32 if not PTX or tl.float32 == DTYPE else DTYPE), subtracted


@triton.jit
def load_rows(
    source,
    exists,
    stride_d,
    HEAD_DIM: tl.constexpr,
    D_POW2: tl.constexpr,
    TILE: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """A tile of channels of the rows at `source` [rows], 0 where they do not exist."""
    d = tl.arange(0, tile_width(ROTATION, D_POW2))
    inside = d < tile_size(ROTATION, TILE, HEAD_DIM)
    channel = tile_first(ROTATION, TILE) + d
    return tl.load(
        source[:, None] + channel[None, :] * stride_d, mask=exists[:, None] & inside[None, :], other=0.0
    )


@triton.jit
def evened(
    x,
    exists,
    by,
    subtracted,
    TILE: tl.constexpr,
    OF_KEYS: tl.constexpr,
    ROTATION: tl.constexpr,
    PTX: tl.constexpr,
):
    """What `load_rows` gave in float32 with the channels evened, in units of `common_norm`. `by` and `subtracted` are those of
    `evening`."""
    # Both ways one fused multiply-add: rows that do not exist or count stay 0.
    if OF_KEYS and mean_goes_first(ROTATION, x.dtype):
        x -= exists.to(tl.float32)[:, None] * subtracted[None, :]
    y = widen(x, PTX) * by[None, :] if ROTATION is None else _product(x, by, PTX)
    if OF_KEYS and not mean_goes_first(ROTATION, x.dtype):
        y -= exists.to(tl.float32)[:, None] * subtracted[None, :]
    first: tl.constexpr = relative_norm(ROTATION, TILE, False)
    second: tl.constexpr = relative_norm(ROTATION, TILE, True)
    if first != 1.0 or second != 1.0:
        is_first = tl.arange(0, y.shape[1]) < block_size(ROTATION, TILE, False)
        y = y * tl.where(is_first, first, second)[None, :]
    return y


@triton.jit
def _product(x, matrix, PTX: tl.constexpr):
    """x @ matrix in float32, of which every element has 8 digits. float32 rows are rounded to TF32's 11."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x0FFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        return tl.dot(tl.where(magnitude(x) < 0x7F800000, rounded, x), matrix, input_precision="tf32")
    elif PTX:
        return tl.dot(x, matrix)
    else:
        return tl.dot(x.to(tl.float32), matrix)


@triton.jit
def store_rows(target, y, D: tl.constexpr, D_POW2: tl.constexpr, TILE: tl.constexpr, ROTATION: tl.constexpr):
    """A tile of `evened`, in units of its steps, into rows of D channels at `target` [rows]; the last tile fills them up."""
    first: tl.constexpr = tile_first(ROTATION, TILE)
    end: tl.constexpr = D if tiles_of(ROTATION) == TILE + 1 else tile_first(ROTATION, TILE + 1)
    d = first + tl.arange(0, tile_width(ROTATION, D_POW2))
    tl.store(target[:, None] + d[None, :], round_to_int8(y), mask=(d < end)[None, :])
    behind: tl.constexpr = first + tile_width(ROTATION, D_POW2)
    if behind < end:  # padding that the tile does not reach: 200 channels are 96 and 104, of 256
        rest = behind + tl.arange(0, 32)
        nothing = tl.zeros([y.shape[0], 32], tl.int8)
        tl.store(target[:, None] + rest[None, :], nothing, mask=(rest < end)[None, :])
