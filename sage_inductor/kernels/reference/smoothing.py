"""Q and K before they are rounded to 8 bits, in plain PyTorch (kernels/smoothing.py says what is done and why)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_inductor.kernels.smoothing import (
    CHANNEL_FLOOR,
    EQUALISING,
    HALF_OCTAVE,
    ROTATING,
    SMOOTHINGS,
    resolved_smoothing,
    rotation,
)


@dataclass(frozen=True)
class Smoother:
    """What is subtracted from the keys of one call, and what query and key are multiplied by."""

    mean: Tensor  # of K, float32 [batch, kv_heads, 1, head_dim]
    half_octaves: (
        Tensor | None
    )  # the logarithm of what s comes nearest to, of the same shape; None where s is 1
    rotates: bool

    @classmethod
    def of(cls, name: str, keys: Tensor, weight: Tensor, queries: tuple[Tensor, Tensor] | None) -> Smoother:
        """`keys` `[batch, kv_heads, samples, head_dim]`: those that the statistics are estimated from, finite, with what
        each counts for (`weight`, which adds up to 1, or to 0 where there is none). `queries`: the same of queries, where they
        are evened with the keys. Raises ValueError for an unknown `name`."""
        if name not in SMOOTHINGS:
            raise ValueError(f"smoothing={name!r} (valid: {', '.join(SMOOTHINGS)})")
        name = resolved_smoothing(name, SMOOTHINGS)
        mean = (keys * weight).sum(2, keepdim=True)
        half_octaves = None
        if name in EQUALISING:
            assert queries is not None
            key_size = _relative_size((keys - mean).where(weight > 0, 0.0), weight)
            half_octaves = (key_size / _relative_size(*queries)).log2()
        return cls(mean, half_octaves, name in ROTATING)

    @property
    def factor(self) -> Tensor | None:
        """s."""
        return None if self.half_octaves is None else _power(self.half_octaves.round())

    def query(self, query: Tensor) -> Tensor:
        """Some of the queries `[batch, heads, rows, head_dim]`, as they are rounded: float32."""
        kv_heads = self.mean.shape[1]
        factor = self.factor
        if factor is not None:
            factor = factor.repeat_interleave(query.shape[1] // kv_heads, 1)
        return self._evened(query, factor)

    def key(self, key: Tensor) -> Tensor:
        """`[batch, kv_heads, kv_len, head_dim]`, as they are rounded: float32."""
        factor = None if self.half_octaves is None else _power(-self.half_octaves.round())
        if not self.rotates:
            centred = key.float() - self.mean
            return centred if factor is None else centred * factor
        if key.dtype == torch.float32:
            # What is multiplied is rounded to TF32: the digits that are kept are those of what tells keys apart.
            return self._evened(key - self.mean, factor)
        # The mean goes afterwards: what a 16-bit key is multiplied by is exact, and a key without its mean is not 16 bits
        # wide any more.
        mean = self.mean if factor is None else self.mean * factor
        return self._evened(key, factor) - mean @ rotation(key.shape[-1], key.device)

    def _evened(self, x: Tensor, factor: Tensor | None) -> Tensor:
        rows = _as_multiplied(x) if self.rotates else x.float()
        if factor is not None:
            rows = rows * factor
        return rows @ rotation(x.shape[-1], x.device) if self.rotates else rows


def _relative_size(x: Tensor, weight: Tensor) -> Tensor:
    """The root of the mean square of each channel of `[batch, heads, rows, head_dim]`, in units of the largest, and at least
    CHANNEL_FLOOR; 1 for all where all are 0."""
    if x.shape[2] == 0:
        return x.new_ones(*x.shape[:2], 1, x.shape[-1])
    # In units of each channel's maximum: a square of a large float32 would overflow, one of a small one vanish.
    largest = x.abs().amax(2, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    size = largest * ((x / unit).square() * weight).sum(2, keepdim=True).sqrt()
    most = size.amax(-1, keepdim=True)
    return torch.where(most > 0, (size / torch.where(most > 0, most, 1.0)).clamp(min=CHANNEL_FLOOR), 1.0)


def _power(halves: Tensor) -> Tensor:
    """2 ** (halves / 2) in bfloat16's 8 digits: 181/128 stands for the root of 2, and 181/256 for its reciprocal."""
    octaves = (halves / 2).floor()
    return torch.exp2(octaves) * torch.where(halves == 2 * octaves, 1.0, HALF_OCTAVE).to(halves.dtype)


def _as_multiplied(x: Tensor) -> Tensor:
    """As the tensor cores take it: 16-bit floats as they are, float32 rounded to TF32, which has float16's 11 digits."""
    if x.dtype != torch.float32:
        return x.float()
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)
