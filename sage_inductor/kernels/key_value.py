"""K and V of a call in 8 bits, in one buffer of bytes: what is quantised once, and sent to whoever attends to it.

Each kernel family lays its buffer out as it reads it. Where the parts lie follows from `KeyValueForm` alone, so that a receiver
knows the size before anything arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

KEY_BLOCK = 128  # keys that share one scale of K and one of V
PART_BYTES = 512  # parts begin at multiples of it, as tensors of torch's allocator do


@dataclass(frozen=True)
class KeyValueForm:
    """What the layout of a buffer follows from."""

    batch: int
    kv_heads: int
    kv_len: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype  # of key, value and query
    precision: str
    smoothing: str

    @property
    def blocks(self) -> int:
        """Blocks of keys of one sequence."""
        return -(-self.kv_len // KEY_BLOCK)

    @property
    def value_dtype(self) -> torch.dtype:
        """Of V in the buffer."""
        if self.precision == "accurate":
            return torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        return torch.float8_e4m3fn if self.precision == "fast" else torch.int8


class Piece(NamedTuple):
    """A tensor in a buffer, dense, from byte `offset` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def of(self, packed: Tensor) -> Tensor:
        """A view of the buffer `packed`."""
        end = self.offset + self.elements * self.dtype.itemsize
        return packed[self.offset : end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class KeyValueLayout:
    """Where the parts of a buffer lie. All families have key, key_scale, key_mean, value, value_scale, value_channel (the scale
    of each channel), value_mean and first_value, or parts that hold them."""

    pieces: dict[str, Piece]
    bytes: int

    @classmethod
    def of(cls, *groups: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> KeyValueLayout:
        """Parts of one group lie side by side; groups begin at multiples of PART_BYTES."""
        pieces, end = {}, 0
        for group in groups:
            end = -(-end // PART_BYTES) * PART_BYTES
            for name, shape, dtype in group:
                pieces[name] = Piece(end, shape, dtype)
                end += pieces[name].elements * dtype.itemsize
        return cls(pieces, -(-end // PART_BYTES) * PART_BYTES)


# What `Kernel.prepare_key_value` and `Kernel.prepare_prequantized` give.
Quantize: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # key, value, query -> the buffer
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # query, the buffer, out, lse
