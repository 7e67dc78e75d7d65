"""The record of what the mask of a call means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sage_inductor.graph.call import Value
from sage_inductor.graph.sizes import Size, strides_of
from sage_inductor.rewriting.masks.formula import plain


@dataclass(frozen=True)
class Mask:
    """The classified mask of one call. `kind` is one of

    none, all_true, zero_bias (nothing is masked); causal, sliding_window, band (the mask is
    `-window_left <= j - (i + offset) <= window_right`); key_padding, bool, additive (read at run time); or the name of what is
    read like one of those: chunked_causal size=8, prefix, segments.
    `attn_mask` is what a kernel must still read, None where the band says it all. `read` is its kind where that is beside a
    band: causal + key_padding.
    """

    kind: str
    attn_mask: Value | None = None
    is_causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    read: str = ""
    symbolic: bool = False
    """Whether it is a band for all lengths that the graph serves."""
    left_bound: Value | None = None
    """The number in the graph that window_left is, which is then what it was while tracing. It may turn out to be negative beside
    causality: queries see no key then."""
    right_bound: Value | None = None
    """That which window_right is. It is not negative."""
    seeing: Value | None = None
    """Bool `[..., q_len, 1]`: the queries that see a key, where those that see none attend to all keys alike (a
    finite number hid them); None where that does not happen."""
    query_segments: Value | None = None
    """int32 `[batch, q_len]`: a query sees the keys of its own id only, beside all else that is said here. None: no ids."""
    key_segments: Value | None = None
    as_read: Mask | None = None
    """The same mask without ids, for kernels that take none."""

    def __str__(self) -> str:
        if self.query_segments is not None:
            rest = str(replace(self, query_segments=None))
            if self.kind.startswith("chunked_causal"):
                return rest
            return "segments" if rest in ("none", "all_true") else f"{rest} + segments"
        text = self.kind
        if text in ("causal", "sliding_window", "band"):
            right = "0" if self.is_causal else _window(self.window_right, self.right_bound)
            left = _window(self.window_left, self.left_bound)
            text += "" if text == "causal" else f" left={left} right={right}"
            text += (" bottom-right" if self.bottom_right else "") + (" (symbolic)" if self.symbolic else "")
        return f"{text} + {self.read}" if self.read else text


def band(low: Size | None, high: Size | None, bottom_right_offset: Size) -> Mask | None:
    """Keys i + low .. i + high as a window around the top-left or the bottom-right diagonal."""
    offsets = [0, bottom_right_offset]
    if high == bottom_right_offset:
        offsets.reverse()  # causal from that corner is the simpler description
    for offset in offsets:
        left = -1 if low is None else plain(offset - low)
        right = -1 if high is None else plain(high - offset)
        if not isinstance(left, int) or not isinstance(right, int):
            continue
        if (low is not None and left < 0) or (high is not None and right < 0):
            continue
        is_causal = right == 0
        kind = "band" if not is_causal else "causal" if low is None else "sliding_window"
        return Mask(kind, None, is_causal, offset != 0, left, -1 if is_causal else right)
    return None


def _window(size: int, computed: Value | None) -> str:
    return "computed" if computed is not None else str(size) if size >= 0 else "all"


def runtime_kind(mask: Tensor, q_len: Any) -> str:
    if is_key_padding(mask, q_len):
        return "key_padding"
    return "bool" if mask.dtype == torch.bool else "additive"


def is_key_padding(mask: Tensor, q_len: Any) -> bool:
    """The same keys for every query: one row, or one row expanded."""
    if mask.dim() < 2 or q_len == 1:
        return mask.dim() == 1
    return bool(strides_of(mask)[-2] == 0)
