"""What was read of a mask as what a kernel takes: a band, a row over keys, a bias of keys, ids."""

from __future__ import annotations

import dataclasses
import math

import torch

from sage_inductor.graph.call import AttentionCall, Expr, example_tensor, leaves
from sage_inductor.graph.sizes import Size, sizes_of, strides_of
from sage_inductor.rewriting.masks.additive import FINAL, seeing_rows, with_uniform_rows
from sage_inductor.rewriting.masks.block_diagonal import block_diagonal
from sage_inductor.rewriting.masks.blocks import RowEnds
from sage_inductor.rewriting.masks.computed_bands import computed_band
from sage_inductor.rewriting.masks.formula import (
    KEY,
    QUERY,
    TRUE,
    NotUnderstood,
    plain,
)
from sage_inductor.rewriting.masks.mask import Mask, is_key_padding, runtime_kind
from sage_inductor.rewriting.masks.mask import band as band_of
from sage_inductor.rewriting.masks.meaning import Meaning
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.rows import RowBuilder
from sage_inductor.rewriting.masks.understood import Masks, Understood, rest_worked_out


def as_band_and_row(
    call: AttentionCall, understood: Understood, q_len: Size, kv_len: Size, masks: Masks
) -> Mask | None:
    """The mask as a band, a row over keys or both; None where it is more than that."""
    mask, meaning, hidden = example_tensor(call.attn_mask), understood.meaning, understood.allowed.hidden
    assert mask is not None
    if meaning.others:
        ends = rest_worked_out(understood, q_len, kv_len, mask.device, masks.writes)
        bounds = None if ends is None else ends.band(kv_len)
        if bounds is None:
            return None
        meaning = Meaning(*bounds, meaning.keys)
    additive = mask.dtype != torch.bool
    if meaning.low is None and meaning.high is None:
        band: Mask | None = Mask("zero_bias" if additive else "all_true")
    else:
        offset = plain(kv_len - q_len)
        band = band_of(meaning.low, meaning.high, offset)
        if band is None:
            band = computed_band(meaning.low, meaning.high, offset, call, understood.reader.ranges)
            if band is not None:
                band = dataclasses.replace(band, as_read=Mask(runtime_kind(mask, q_len), call.attn_mask))
    if band is None:
        return None
    is_static = isinstance(q_len, int) and isinstance(kv_len, int)
    band = dataclasses.replace(band, symbolic=not is_static)
    if understood.allowed.bias is not None:
        return _beside_bias(call, understood, meaning, band)
    if meaning.keys == TRUE:
        blind = additive and not _every_query_sees_a_key(meaning, q_len, kv_len, understood.reader.ranges)
        return None if blind else band
    if not additive and band.kind == "all_true" and is_key_padding(mask, q_len):
        return Mask("key_padding", call.attn_mask)
    if additive and (len(hidden) != 1 or max(hidden) > FINAL):
        return None  # which keys a query that sees none attends to
    try:
        row = understood.row(call, meaning.keys)
    except NotUnderstood:
        return None
    if band.kind in ("all_true", "zero_bias"):
        joined = Mask("key_padding", row)
    else:
        joined = dataclasses.replace(band, attn_mask=row, read="key_padding")
    return joined if max(hidden) == -math.inf else _with_seeing(joined, meaning, call)


def as_blocks(
    call: AttentionCall, understood: Understood, q_len: Size, kv_len: Size, masks: Masks, as_read: Mask
) -> Mask | None:
    """The mask as segments that are known while compiling, with a row over keys or without; None where it is anything else."""
    mask, meaning, hidden = example_tensor(call.attn_mask), understood.meaning, understood.allowed.hidden
    if (
        mask is None
        or not meaning.others
        or not isinstance(kv_len, int)
        or understood.allowed.bias is not None
    ):
        return None
    ends = rest_worked_out(understood, q_len, kv_len, mask.device, masks.writes)
    if ends is None:
        return None
    # Finite numbers hide as well where every query sees a key.
    hides = max(hidden) <= FINAL and meaning.keys == TRUE and not bool((ends.count == 0).any())
    if mask.dtype != torch.bool and max(hidden) != -math.inf and not hides:
        return None
    found = of_ids(call, ends, kv_len, as_read)
    if found is None or meaning.keys == TRUE:
        return found
    try:
        row = understood.row(call, meaning.keys)
    except NotUnderstood:
        return None
    if any(map(masks.writes.touch, leaves(row))):
        return None
    alone = found.kind == "all_true"
    return dataclasses.replace(
        found, attn_mask=row, kind="key_padding" if alone else found.kind, read="" if alone else "key_padding"
    )


def of_ids(call: AttentionCall, ends: RowEnds, kv_len: int, as_read: Mask) -> Mask | None:
    """The mask whose rows have these `ends`, as segments; None where it is none."""
    blocks = block_diagonal(ends, kv_len)
    ids = None if blocks is None else blocks.ids(call)
    if blocks is None or ids is None:
        return None
    kind = "causal" if blocks.is_causal else "all_true"
    kind = as_read.kind.partition(" + ")[0] if as_read.kind.startswith("chunked_causal") else kind
    return Mask(kind, None, blocks.is_causal, query_segments=ids[0], key_segments=ids[1], as_read=as_read)


def _beside_bias(call: AttentionCall, understood: Understood, meaning: Meaning, band: Mask) -> Mask | None:
    """`band` with what is added to the scores of its keys, where that is a row: ALiBi."""
    bias, reader = understood.allowed.bias, understood.reader
    lengths = reader.ranges.sizes[QUERY], reader.ranges.sizes[KEY]
    if bias is None or meaning.keys != TRUE or band.kind in ("all_true", "zero_bias"):
        return None
    # A bias may hide keys itself. A query whose keys it hides attends to those that a finite number hides as well.
    if understood.allowed.hidden != {-math.inf}:
        return None
    if not _every_query_sees_a_key(meaning, *lengths, reader.ranges):
        return None
    try:
        row = RowBuilder(call, reader).read(bias)
    except NotUnderstood:
        return None
    return dataclasses.replace(band, attn_mask=row, read="key_bias")


def _every_query_sees_a_key(meaning: Meaning, q_len: Size, kv_len: Size, ranges: Ranges) -> bool:
    """Whether that is so for a band, of all lengths."""

    def is_at_least_zero(number: Size) -> bool:
        least = ranges.of_size(plain(number))[0]
        return least is not None and least >= 0

    low, high = meaning.low, meaning.high
    return (
        (high is None or is_at_least_zero(high))
        and (low is None or is_at_least_zero(kv_len - q_len - low))
        and (low is None or high is None or is_at_least_zero(high - low))
    )


def _with_seeing(known_: Mask, meaning: Meaning, call: AttentionCall) -> Mask | None:
    """A mask whose keys a finite number hid: with the queries that see none."""
    query, key = example_tensor(call.query), example_tensor(call.key)
    padding, output = example_tensor(known_.attn_mask), call.output()
    if query is None or key is None or padding is None or output is None or known_.attn_mask is None:
        return None
    if sizes_of(padding)[-1] != sizes_of(key)[-2] or sizes_of(query)[-2] == 1:
        return None
    heads = [sizes_of(tensor)[-3] for tensor in (query, key) if tensor.dim() > 2]
    if call.enable_gqa and not all(isinstance(number, int) for number in heads):
        return None  # how often the mean of V is repeated
    seeing = seeing_rows(known_.attn_mask, meaning.low, meaning.high, call)
    if seeing is None:
        return None
    # Users rely on the strides that the call would have given.
    same = example_tensor(with_uniform_rows(Expr("output", (), value=output), seeing, call))
    if same is None or strides_of(same) != strides_of(output) or sizes_of(same) != sizes_of(output):
        return None
    return dataclasses.replace(known_, seeing=seeing)
