"""What the mask of a call means: nothing, a causal or sliding-window band, padding, or data known only at run
time."""

from __future__ import annotations

import dataclasses

import torch

from sage_inductor.graph.call import AttentionCall, Band, example_tensor, leaves
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.rewriting.masks.algebra import as_condition
from sage_inductor.rewriting.masks.equalities import equals
from sage_inductor.rewriting.masks.forms import as_band_and_row, as_blocks, of_ids
from sage_inductor.rewriting.masks.formula import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    NotUnderstood,
    names_of,
    plain,
    variable,
)
from sage_inductor.rewriting.masks.mask import Mask, is_key_padding, runtime_kind
from sage_inductor.rewriting.masks.segments import PackedMask, packed_mask
from sage_inductor.rewriting.masks.understood import Masks, Understood
from sage_inductor.rewriting.masks.views import broadcast
from sage_inductor.rewriting.masks.whole import classify_constant, ends_of_constant
from sage_inductor.torch_internals.distributed import is_dtensor


def classify(call: AttentionCall, masks: Masks) -> Mask:
    """The meaning of `call`'s mask, which is one of `masks`."""
    if call.attn_mask is None and call.band is not None:
        return of_band(call, call.band)
    mask = example_tensor(call.attn_mask)
    try:
        return _classify_with_ids(call, masks)
    except (RuntimeError, ValueError):
        # DTensor has rules for some operations alone, and rows may be made by others: ids of 64 bits by searchsorted.
        if mask is None or not is_dtensor(mask):
            raise
    query = example_tensor(call.query)
    q_len = None if query is None else plain(sizes_of(query)[-2])
    return Mask(runtime_kind(mask, q_len), call.attn_mask)


def _classify_with_ids(call: AttentionCall, masks: Masks) -> Mask:
    """The meaning of `call`'s mask, the ids of packed sequences apart."""
    as_read = _classify(call, masks)
    packed = None if as_read.attn_mask is None else packed_mask(call, masks.writes)
    if packed is None or as_read.query_segments is not None:
        return as_read
    rest = _classify(dataclasses.replace(call, attn_mask=packed.rest), masks)
    if rest.query_segments is not None:
        rest = rest.as_read or rest  # two pairs of ids
    read, query = example_tensor(rest.attn_mask), example_tensor(call.query)
    if read is not None and query is not None and not is_key_padding(read, sizes_of(query)[-2]):
        # A kernel would read as much beside the ids, unless these say more of it.
        within = _within_ids(call, packed, masks)
        if within is None:
            return as_read
        rest, packed = within, dataclasses.replace(packed, is_causal=False)
    if packed.is_causal and not (rest.is_causal and not rest.bottom_right):
        if rest.bottom_right or rest.is_causal or rest.window_right >= 0:
            return as_read  # the smaller of two bounds
        band = "causal" if rest.window_left < 0 else "sliding_window"
        read_kind = "key_padding" if rest.attn_mask is not None else ""
        lengths = [*map(example_tensor, (call.query, call.key))]
        is_static = all(isinstance(sizes_of(item)[-2], int) for item in lengths if item is not None)
        rest = dataclasses.replace(rest, kind=band, read=read_kind, is_causal=True, symbolic=not is_static)
    if as_read.kind.startswith("chunked_causal"):
        rest = dataclasses.replace(rest, kind=as_read.kind.partition(" + ")[0])
    return dataclasses.replace(rest, query_segments=packed.query, key_segments=packed.key, as_read=as_read)


def _within_ids(call: AttentionCall, packed: PackedMask, masks: Masks) -> Mask | None:
    """What `call`'s mask asks for where the ids are equal, as a band, a row over keys or both; None where that is more."""
    understood, compared = masks.understood(call), example_tensor(packed.equality)
    query, key = example_tensor(call.query), example_tensor(call.key)
    if understood is None or compared is None or query is None or key is None:
        return None
    reader, meaning = understood.reader, understood.meaning
    index = broadcast(tuple(map(variable, (BATCH, HEAD, QUERY, KEY))), sizes_of(compared))
    try:
        equality = reader.ranges.simplified(as_condition(reader.element(packed.equality, index, call.node)))
    except NotUnderstood:
        return None
    if meaning.others != (equality,) or equals(equality) is None:
        return None
    alone = dataclasses.replace(
        understood, meaning=dataclasses.replace(meaning, others=()), rows={}, worked={}
    )
    q_len, kv_len = (plain(sizes_of(tensor)[-2]) for tensor in (query, key))
    return as_band_and_row(call, alone, q_len, kv_len, masks)


def _classify(call: AttentionCall, masks: Masks) -> Mask:
    """The meaning of `call`'s mask, which is one of `masks`."""
    if call.attn_mask is None:
        return Mask("causal", is_causal=True) if call.is_causal is True else Mask("none")
    mask = example_tensor(call.attn_mask)
    query, key = example_tensor(call.query), example_tensor(call.key)
    if mask is None or query is None or key is None:
        return Mask("bool" if mask is not None and mask.dtype == torch.bool else "additive", call.attn_mask)
    q_len, kv_len = plain(sizes_of(query)[-2]), plain(sizes_of(key)[-2])
    understood = masks.understood(call)
    name = None
    if understood is not None:
        found = as_band_and_row(call, understood, q_len, kv_len, masks)
        # What the mask was made of is read later than the mask was made.
        if found is not None and not any(
            map(masks.writes.touch, leaves(found.attn_mask) + leaves(found.seeing))
        ):
            # A row that no formula has may be known all the same: it need not be read then.
            is_known = found.attn_mask is not None and isinstance(q_len, int) and isinstance(kv_len, int)
            constant = masks.constant(call.attn_mask) if is_known else None
            return (None if constant is None else classify_constant(constant, q_len, kv_len)) or found
        has_bias = understood.allowed.bias is not None
        name = None if has_bias else understood.meaning.name(plain(kv_len - q_len))
        as_read = Mask(name or runtime_kind(mask, q_len), call.attn_mask)
        if (blocks := as_blocks(call, understood, q_len, kv_len, masks, as_read)) is not None:
            return blocks
    if isinstance(q_len, int) and isinstance(kv_len, int) and _may_be_constant(understood):
        constant = masks.constant(call.attn_mask)
        if constant is not None:
            found = classify_constant(constant, q_len, kv_len)
            if found is not None:
                return found
            ends = ends_of_constant(constant, q_len, kv_len)
            chunk = None if ends is None or mask.dtype != torch.bool else ends.chunk(kv_len)
            name = name if chunk is None else f"chunked_causal size={chunk}"
            as_read = Mask(name or runtime_kind(mask, q_len), call.attn_mask)
            return (None if ends is None else of_ids(call, ends, kv_len, as_read)) or as_read
    return Mask(name or runtime_kind(mask, q_len), call.attn_mask)


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


def _may_be_constant(understood: Understood | None) -> bool:
    """Whether it is worth a look: what was understood was worked out by blocks of rows."""
    return understood is None or bool({BATCH, HEAD} & _names(understood))


def _names(understood: Understood) -> set[str]:
    return names_of(understood.allowed.condition)
