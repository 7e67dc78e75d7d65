"""What the mask of a call means: nothing, a causal or sliding-window band, padding, or data known only at run
time."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Band, Expr, Value, example_tensor, leaves
from sage_inductor.graph.sizes import sizes_of, strides_of
from sage_inductor.graph.writes import Writes
from sage_inductor.kernels import AttentionParams
from sage_inductor.rewriting.masks.additive import allowed_keys, seeing_rows, with_uniform_rows
from sage_inductor.rewriting.masks.conjunction import conjuncts, joined
from sage_inductor.rewriting.masks.constants import constant_value
from sage_inductor.rewriting.masks.segments import packed_mask

# Additive masks write "not allowed" as -inf or as the most negative number of their dtype; half of that is as
# final.
MASKED_OUT_FRACTION = 0.5


@dataclass(frozen=True)
class Mask:
    """The classified mask of one call. `kind` is one of

    none, all_true, zero_bias (nothing is masked); causal, sliding_window, band (the mask is exactly
    `-window_left <= j - (i + offset) <= window_right`); key_padding, bool, additive (read at run time);
    chunked_causal (causal within chunks of `chunk` tokens, which is no band: read like a bool mask).
    `attn_mask` is what a kernel must still read, None where the band says it all; a constant band joined with data
    (causal and padding) is a band and the data, "causal, key_padding".
    """

    kind: str
    attn_mask: Value | None = None
    is_causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    chunk: int = 0
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
            rest = str(dataclasses.replace(self, query_segments=None))
            return "segments" if rest in ("none", "all_true") else f"{rest}, segments"
        kind, _, read = self.kind.partition(", ")
        if self.chunk:
            return f"{kind} size={self.chunk}"
        if kind not in ("causal", "sliding_window", "band"):
            return self.kind
        right = "0" if self.is_causal else str(self.window_right) if self.window_right >= 0 else "all"
        left = str(self.window_left) if self.window_left >= 0 else "all"
        window = "" if kind == "causal" else f" left={left} right={right}"
        return kind + window + (" bottom-right" if self.bottom_right else "") + (f", {read}" if read else "")


def classify(call: AttentionCall, constants: dict[fx.Node, Tensor | None], writes: Writes) -> Mask:
    """The meaning of `call`'s mask. `constants` remembers masks worked out for other calls of the same
    graph, `writes` are those of the graph."""
    if call.attn_mask is None and call.band is not None:
        return of_band(call, call.band)
    as_read = _classify(call, constants, writes)
    is_known = as_read.attn_mask is None or bool(as_read.chunk)
    packed = None if is_known else packed_mask(call, writes)
    if packed is None:
        return as_read
    rest = _classify(dataclasses.replace(call, attn_mask=packed.rest), constants, writes)
    read, query = example_tensor(rest.attn_mask), example_tensor(call.query)
    if read is not None and query is not None and not _is_key_padding(read, sizes_of(query)[-2]):
        return as_read  # a kernel would read as much beside the ids
    if packed.is_causal and not (rest.is_causal and not rest.bottom_right):
        if rest.bottom_right or rest.is_causal or rest.window_right >= 0:
            return as_read  # the smaller of two bounds
        band = "causal" if rest.window_left < 0 else "sliding_window"
        kind = f"{band}, key_padding" if rest.attn_mask is not None else band
        rest = dataclasses.replace(rest, kind=kind, is_causal=True)
    return dataclasses.replace(rest, query_segments=packed.query, key_segments=packed.key, as_read=as_read)


def _classify(call: AttentionCall, constants: dict[fx.Node, Tensor | None], writes: Writes) -> Mask:
    if call.attn_mask is None:
        return Mask("causal", is_causal=True) if call.is_causal is True else Mask("none")
    mask = example_tensor(call.attn_mask)
    query, key = example_tensor(call.query), example_tensor(call.key)
    if mask is None or query is None or key is None:
        return Mask("bool" if mask is not None and mask.dtype == torch.bool else "additive", call.attn_mask)
    q_len, kv_len = sizes_of(query)[-2], sizes_of(key)[-2]
    constant = _remembered_constant(call.attn_mask, constants, writes)
    if constant is not None and isinstance(q_len, int) and isinstance(kv_len, int):
        known = _classify_constant(constant, q_len, kv_len)
        if known is not None:
            return known
        chunk = _chunk(constant, q_len, kv_len)
        if chunk is not None:
            return Mask("chunked_causal", call.attn_mask, chunk=chunk)
    joined = _classify_conjunction(call.attn_mask, q_len, kv_len, writes) or _classify_additive(
        call, q_len, kv_len, writes
    )
    # What the mask was made of is read later than the mask was made.
    if joined is not None and not any(map(writes.touch, leaves(joined.attn_mask) + leaves(joined.seeing))):
        return joined
    return Mask(_runtime_kind(mask, q_len), call.attn_mask)


def of_band(call: AttentionCall, band: Band) -> Mask:
    """What `band`, which another library's operator was given, means for the lengths of `call`, be they symbolic."""
    lengths = [
        sizes_of(tensor)[-2] for tensor in map(example_tensor, (call.query, call.key)) if tensor is not None
    ]
    left, right = max(band.left, -1), max(band.right, -1)
    is_static = len(lengths) == 2 and all(isinstance(length, int) for length in lengths)
    # Bounds behind the last key, or before the first, are none.
    if is_static and left >= lengths[1] - 1:
        left = -1
    if is_static and right >= lengths[0] - 1:
        right = -1
    if left == right == -1:
        return Mask("none")
    kind = "band" if right != 0 else "causal" if left == -1 else "sliding_window"
    is_square = len(lengths) == 2 and lengths[0] == lengths[1]
    return Mask(kind, None, right == 0, not is_square, left, -1 if right == 0 else right)


def _runtime_kind(mask: Tensor, q_len: int) -> str:
    if _is_key_padding(mask, q_len):
        return "key_padding"
    return "bool" if mask.dtype == torch.bool else "additive"


def _classify_conjunction(mask: Value, q_len: Any, kv_len: Any, writes: Writes) -> Mask | None:
    """A bool mask that is a constant band and something else, as transformers joins causality and padding: the
    band, and the rest for the kernel to read."""
    parts = conjuncts(mask, writes)
    constants = {id(part): constant_value(part, writes) for part in parts}
    fixed = [constant for constant in constants.values() if constant is not None]
    rest: list[Value] = [part for part in parts if constants[id(part)] is None]
    if not rest or (len(rest) == 1 and rest[0] is mask):
        return None
    band = Mask("all_true")
    if fixed:
        if not isinstance(q_len, int) or not isinstance(kv_len, int):
            return None
        together = functools.reduce(torch.logical_and, fixed)
        classified = _classify_constant(together, q_len, kv_len)
        if classified is None:
            return None
        band = classified
    read = joined(rest)
    tensor = example_tensor(read)
    assert tensor is not None
    kind = _runtime_kind(tensor, q_len)
    return dataclasses.replace(
        band, kind=kind if band.kind == "all_true" else f"{band.kind}, {kind}", attn_mask=read
    )


def _classify_additive(call: AttentionCall, q_len: Any, kv_len: Any, writes: Writes) -> Mask | None:
    """An additive mask that hides keys and does nothing else, as the bools it was made of, where those are a band, a
    row of padding, or both."""
    found = None if call.attn_mask is None else allowed_keys(call.attn_mask, writes)
    if found is None:
        return None
    allowed, lowest = found
    tensor = example_tensor(allowed)
    known = _classify_conjunction(allowed, q_len, kv_len, writes)
    if known is None and tensor is not None and _is_key_padding(tensor, q_len):
        known = Mask("key_padding", allowed)
    if known is None or lowest == -math.inf:
        return known
    padding = example_tensor(known.attn_mask)
    if padding is None or padding.dim() < 2 or sizes_of(padding)[-2] != 1:
        return None  # which queries see nothing would cost as much as the mask
    if sizes_of(padding)[-1] != kv_len or not (known.kind == "key_padding" or isinstance(q_len, int)):
        return None
    assert known.attn_mask is not None
    band = AttentionParams(known.is_causal, known.bottom_right, known.window_left, known.window_right)
    heads = [
        sizes_of(tensor)[-3]
        for tensor in map(example_tensor, (call.query, call.key))
        if tensor is not None and tensor.dim() > 2
    ]
    if call.enable_gqa and not all(isinstance(number, int) for number in heads):
        return None  # how often the mean of V is repeated
    seeing = seeing_rows(known.attn_mask, *band.bounds(q_len, kv_len), q_len)
    output = call.output()
    if seeing is None or output is None or q_len == 1:
        return None
    # Users rely on the strides that the call would have given.
    filled = with_uniform_rows(Expr("output", (), value=output), seeing, call)
    same = example_tensor(filled)
    if same is None or strides_of(same) != strides_of(output) or sizes_of(same) != sizes_of(output):
        return None
    return dataclasses.replace(known, seeing=seeing)


def _remembered_constant(
    mask: Value, constants: dict[fx.Node, Tensor | None], writes: Writes
) -> Tensor | None:
    if isinstance(mask, Expr):
        source = mask.args[0]
        if mask.target != "to" or not isinstance(source, fx.Node):
            return constant_value(mask, writes)
        value = _remembered_constant(source, constants, writes)  # autocast's cast of a mask that layers share
        return None if value is None else value.to(*mask.args[1:])
    if mask not in constants:
        constants[mask] = constant_value(mask, writes)
    return constants[mask]


def _is_key_padding(mask: Tensor, q_len: Any) -> bool:
    """The same keys for every query: one row, or one row expanded."""
    if mask.dim() < 2 or q_len == 1:
        return mask.dim() == 1
    return bool(strides_of(mask)[-2] == 0)


def _classify_constant(mask: Tensor, q_len: int, kv_len: int) -> Mask | None:
    """The band that `mask` is, or None when it is none (or differs between batches or heads)."""
    additive = mask.dtype != torch.bool
    if additive:
        if bool((mask == 0).all()):
            return Mask("zero_bias")
        masked_out = mask <= torch.finfo(mask.dtype).min * MASKED_OUT_FRACTION
        if not bool((masked_out | (mask == 0)).all()):
            return None
        mask = ~masked_out
    mask = mask.expand(*([1] * (2 - mask.dim())), *mask.shape) if mask.dim() < 2 else mask
    mask = mask.expand(*mask.shape[:-2], q_len, kv_len)
    rows = mask.reshape(-1, q_len, kv_len)
    allowed = rows[0]
    if rows.shape[0] > 1 and not bool((rows == allowed).all()):
        return None
    if bool(allowed.all()):
        return Mask("all_true")
    seeing = allowed.any(-1)
    if not bool(seeing.any()) or (additive and not bool(seeing.all())):
        return None  # a row of finite minima attends to everything alike, not to nothing
    positions = torch.arange(q_len, device=mask.device)
    first = allowed.int().argmax(-1) - positions
    last = kv_len - 1 - allowed.flip(-1).int().argmax(-1) - positions
    low, high = int(first[seeing].min()), int(last[seeing].max())
    distance = torch.arange(kv_len, device=mask.device) - positions[:, None]
    if not torch.equal((distance >= low) & (distance <= high), allowed):
        return None
    return _band(low if low > -(q_len - 1) else None, high if high < kv_len - 1 else None, kv_len - q_len)


def _chunk(mask: Tensor, q_len: int, kv_len: int) -> int | None:
    """The chunk size of a bool mask that is causal within chunks, as Llama 4's local layers have it."""
    if mask.dtype != torch.bool or q_len != kv_len or mask.dim() < 2:
        return None
    rows = mask.expand(*mask.shape[:-2], q_len, kv_len).reshape(-1, q_len, kv_len)
    blind = (~rows[0, :, 0]).nonzero()  # to the first key: the next chunk has begun
    if blind.numel() == 0 or int(blind[0]) == 0:
        return None
    chunk = int(blind[0])
    positions = torch.arange(q_len, device=mask.device)
    same_chunk = positions[:, None] // chunk == positions // chunk
    return chunk if bool((rows == (same_chunk & (positions <= positions[:, None]))).all()) else None


def _band(low: int | None, high: int | None, bottom_right_offset: int) -> Mask | None:
    """Keys i + low .. i + high as a window around the top-left or the bottom-right diagonal."""
    offsets = [0, bottom_right_offset]
    if high == bottom_right_offset:
        offsets.reverse()  # causal from that corner is the simpler description
    for offset in offsets:
        left = -1 if low is None else offset - low
        right = -1 if high is None else high - offset
        if (low is not None and left < 0) or (high is not None and right < 0):
            continue
        is_causal = right == 0
        kind = "band" if not is_causal else "causal" if low is None else "sliding_window"
        return Mask(kind, None, is_causal, offset != 0, left, -1 if is_causal else right)
    return None
