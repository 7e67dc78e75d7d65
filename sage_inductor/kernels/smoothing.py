"""What is done to Q and K before they are rounded to 8 bits, and the rotation that is a part of it.

INT8 has 127 steps up to the largest element of a row of Q or of a block of K, so that a channel that stands out takes the
steps of all others. Three identities make channels even, and leave every score as it is but for a number per query, which
softmax does not see:

    mean      Q (K - m)^T            m: a number per channel, near K's mean (SageAttention, arXiv:2410.02367, section 4.2)
    equalise  (Q s) ((K - m) / s)^T  s: a number per channel, sqrt(size of K / size of Q) (SmoothQuant, arXiv:2211.10438)
    rotate    (Q R) ((K - m) R)^T    R: an orthogonal matrix (QuaRot, arXiv:2404.00456)

R is a signed Hadamard matrix divided by the root of its size: each of its channels holds the same part of every channel that
goes in. Hadamard matrices of +1 and -1 are written down without a table for every size `2^a (p + 1)`, p a prime that is 3
modulo 4 (Sylvester's doubling, Paley's first construction), and for every power of two. A head dim that is no such size is
rotated in two blocks: 192 is 96 + 96.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# What each is, the least first, and what stands for one of them.
SMOOTHINGS: dict[str, str] = {
    "mean": "K minus a mean",
    "equalise": "mean, and Q and K scaled channel by channel to sizes that are even",
    "rotate": "mean, and Q and K rotated by a signed Hadamard matrix",
    "both": "equalise, then rotate",
    "auto": "both, or mean with a kernel that has no other",
}
EQUALISING = ("equalise", "both")
ROTATING = ("rotate", "both")

# Evenly spaced keys of a sequence and head that K's statistics look at, and queries of all heads that share it for Q's. A mean of
# so many has a sixteenth of its channel's size as its error, which adds a fifth of a percent to what smoothing leaves.
SAMPLES = 256
# V's look at more: what is left of V's mean is multiplied by what rounding takes from a row of P, which may be a part of all of it.
VALUE_SAMPLES = 512
CHANNEL_FLOOR = 1 / 64  # of the largest channel: no channel of K or Q counts as smaller
# s goes up in steps of half an octave: 1 and 181/128, times powers of two. 181/128 is exact in bfloat16, and its reciprocal is
# 181/256 within 2.1e-4, so that a product of bfloat16 (or float16, TF32) numbers and the rows of R s needs no rounding.
HALF_OCTAVE = 181 / 128
LARGEST_BLOCK = 128  # channels that are rotated together
_PRIMES = (11, 19, 23, 43, 47, 59, 67, 71, 79, 83, 103, 107)


def resolved_smoothing(smoothing: str, has: Collection[str]) -> str:
    """What `smoothing` stands for with a kernel that `has` some."""
    if smoothing != "auto":
        return smoothing
    return "both" if "both" in has else "mean"


@dataclass(frozen=True)
class RotatedBlock:
    """Channels that are rotated together, by a Hadamard matrix of their number `size = 2^doublings * (prime + 1)`; with prime 0
    it is `2^doublings`."""

    first: int
    size: int
    prime: int
    doublings: int


@cache
def blocks(head_dim: int) -> tuple[RotatedBlock, ...]:
    """Of a head's channels: one block where there is a matrix of that size, up to LARGEST_BLOCK; else the two nearest to its
    half, of whole groups of 8 channels where the head is (memory is read in such); else the largest that fits, and so on."""
    sizes: tuple[int, ...]
    group = math.gcd(head_dim, 8)
    pairs = ((head_dim - less, less) for less in range(head_dim // 2 // group * group, 0, -group))
    if _factors(head_dim) is not None:
        sizes = (head_dim,)
    elif pair := next((pair for pair in pairs if all(map(_factors, pair))), None):
        sizes = pair
    else:
        largest = next(size for size in range(LARGEST_BLOCK, 0, -1) if size < head_dim and _factors(size))
        rest = blocks(head_dim - largest)
        sizes = (largest, *(block.size for block in rest))
    found, first = [], 0
    for size in sizes:
        factors = _factors(size)
        assert factors is not None
        found.append(RotatedBlock(first, size, *factors))
        first += size
    return tuple(found)


@cache
def rotation(head_dim: int, device: torch.device) -> Tensor:
    """R, float32 `[head_dim, head_dim]`: `x @ R` rotates rows. It is the same in every process."""
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float32)
    for block in blocks(head_dim):
        inside = slice(block.first, block.first + block.size)
        matrix[inside, inside] = _hadamard(block.prime, block.doublings) / math.sqrt(block.size)
    return (_signs(head_dim)[:, None] * matrix).to(device)


def _signs(head_dim: int) -> Tensor:
    """A fixed sign per channel, without a pattern: without them a row of equal elements would be rotated into one channel."""
    channel = torch.arange(head_dim)
    return 1.0 - 2.0 * ((channel * 0x9E3779B1 >> 16) & 1).float()


@cache
def _factors(size: int) -> tuple[int, int] | None:
    """(prime, doublings) of a Hadamard matrix of this size, with the least prime; None where there is none here."""
    if not 0 < size <= LARGEST_BLOCK:
        return None
    for prime, core in ((0, 1), *((prime, prime + 1) for prime in _PRIMES)):
        doublings = (size // core).bit_length() - 1
        if core << max(doublings, 0) == size:
            return prime, doublings
    return None


def _hadamard(prime: int, doublings: int) -> Tensor:
    """+1 and -1, its rows orthogonal to each other."""
    matrix = _paley(prime) if prime else torch.ones(1, 1)
    doubled = torch.ones(1, 1)
    for _ in range(doublings):
        doubled = torch.cat([torch.cat([doubled, doubled], 1), torch.cat([doubled, -doubled], 1)])
    return torch.kron(matrix, doubled)


def _paley(prime: int) -> Tensor:
    """`[prime + 1, prime + 1]`, Paley's first construction: row 0 is of +1, column 0 of -1 below it, and the others say whether
    column - row is a square modulo the prime (+1, also where it is 0) or not (-1)."""
    squares = {i * i % prime for i in range(prime)}
    is_square = torch.tensor([1.0 if i in squares else -1.0 for i in range(prime)])
    i = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = is_square[(i - i[:, None]) % prime]
    return matrix
