"""What the mask of a call means: nothing, a causal or sliding-window band, padding, or data known only at run
time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Band, Expr, Value, example_tensor, leaves
from sage_inductor.graph.sizes import Size, known, sizes_of, strides_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.additive import FINAL, seeing_rows, with_uniform_rows
from sage_inductor.rewriting.masks.algebra import add, as_condition, at_least, both
from sage_inductor.rewriting.masks.block_diagonal import block_diagonal
from sage_inductor.rewriting.masks.blocks import RowEnds, worked_out
from sage_inductor.rewriting.masks.computed_bands import computed_band
from sage_inductor.rewriting.masks.constants import constant_value
from sage_inductor.rewriting.masks.equalities import equals
from sage_inductor.rewriting.masks.formula import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    TRUE,
    Condition,
    Linear,
    NotUnderstood,
    names_of,
    plain,
    variable,
)
from sage_inductor.rewriting.masks.mask import Mask, is_key_padding, runtime_kind
from sage_inductor.rewriting.masks.mask import band as band_of
from sage_inductor.rewriting.masks.meaning import Allowed, Meaning, allowed_by, meaning_of
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.reading import Reader
from sage_inductor.rewriting.masks.rows import RowBuilder
from sage_inductor.rewriting.masks.segments import PackedMask, packed_mask
from sage_inductor.rewriting.masks.views import broadcast
from sage_inductor.rewriting.masks.whole import MASKED_OUT_FRACTION, classify_constant, ends_of_constant
from sage_inductor.torch_internals.sizes import shape_env_of


@dataclass(frozen=True, eq=False)
class Understood:
    """A mask that was read from the graph, and by whom: who reads it knows where its parts stand."""

    allowed: Allowed
    meaning: Meaning
    reader: Reader
    rows: dict[int, Value] = field(default_factory=dict)
    """The row over keys that is read, by the dims of the scores, for other calls."""
    worked: dict[None, RowEnds | None] = field(default_factory=dict)
    """What was worked out of it."""

    def row(self, call: AttentionCall, keys: Condition) -> Value:
        """What `keys` says, as a row over keys. Raises NotUnderstood."""
        query = example_tensor(call.query)
        dims = 4 if query is None else query.dim()
        if dims not in self.rows:
            rows = RowBuilder(call, self.reader)
            row = rows.of(keys)
            if rows.asked:
                return row  # it holds the length of this call's keys
            self.rows[dims] = row
        return self.rows[dims]


@dataclass(eq=False)
class Masks:
    """The masks of one graph: the writes in it, its nodes inside functorch's transforms, and what was found for other calls."""

    graph: fx.Graph
    writes: Writes
    transformed: set[fx.Node] = field(default_factory=set)
    _constants: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    _understood: dict[Any, Understood | None] = field(default_factory=dict)

    def constant(self, mask: Value) -> Tensor | None:
        if isinstance(mask, Expr):
            source = mask.args[0]
            if mask.target != "to" or not isinstance(source, fx.Node):
                return constant_value(mask, self.writes)
            value = self.constant(source)  # autocast's cast of a mask that layers share
            return None if value is None else value.to(*mask.args[1:])
        if mask not in self._constants:
            self._constants[mask] = constant_value(mask, self.writes)
        return self._constants[mask]

    def understood(self, call: AttentionCall) -> Understood | None:
        """The mask of `call` as a conjunction, None where it is read as no formula."""
        mask, query, key = map(example_tensor, (call.attn_mask, call.query, call.key))
        if mask is None or query is None or key is None or mask.dim() > 4 or query.dim() > 4:
            return None
        sizes = _sizes(mask, query, key)
        try:
            same = _key(call.attn_mask), tuple(sizes.items())
        except TypeError:
            same = call.node, ()
        if any(map(self.writes.touch, leaves(call.attn_mask))):
            same = call.node, ()
        if same not in self._understood:
            self._understood[same] = self._read(call, mask, sizes)
        return self._understood[same]

    def _read(self, call: AttentionCall, mask: Tensor, sizes: dict[str, Size]) -> Understood | None:
        reader = Reader(self.graph, self.writes, Ranges(sizes, _shape_env(call)), self.transformed)
        index = broadcast(tuple(map(variable, (BATCH, HEAD, QUERY, KEY))), sizes_of(mask))
        finite = -math.inf if mask.dtype == torch.bool else torch.finfo(mask.dtype).min * MASKED_OUT_FRACTION
        try:
            allowed = allowed_by(reader.element(call.attn_mask, index, call.node), finite)
            return Understood(allowed, meaning_of(allowed.condition, reader.ranges), reader)
        except NotUnderstood:
            return None


def _sizes(mask: Tensor, query: Tensor, key: Tensor) -> dict[str, Size]:
    """How many batches, heads, queries and keys there are, as far as the mask tells them apart."""
    before = (1, 1, 1, 1, *sizes_of(mask))[-4:-2]
    return {
        BATCH: before[0],
        HEAD: before[1],
        QUERY: plain(sizes_of(query)[-2]),
        KEY: plain(sizes_of(key)[-2]),
    }


def _key(item: Any) -> Any:
    """What is equal for equal values. Raises TypeError where that is not to be told."""
    if isinstance(item, Expr):
        return item.target, _key(item.args), _key(tuple(item.kwargs.items()))
    if isinstance(item, torch.SymInt):
        return known(item)
    if isinstance(item, (tuple, list)):
        return tuple(map(_key, item))
    if isinstance(item, slice):
        return slice, _key((item.start, item.stop, item.step))
    hash(item)
    return type(item), item


def _shape_env(call: AttentionCall) -> Any:
    tensors = map(example_tensor, (call.query, call.key, call.attn_mask))
    sizes: list[Any] = [size for tensor in tensors if tensor is not None for size in tensor.shape]
    return next((shape_env_of(size) for size in sizes if isinstance(size, torch.SymInt)), None)


def classify(call: AttentionCall, masks: Masks) -> Mask:
    """The meaning of `call`'s mask, which is one of `masks`."""
    if call.attn_mask is None and call.band is not None:
        return of_band(call, call.band)
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
    return _as_band_and_row(call, alone, q_len, kv_len, masks)


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
        found = _as_band_and_row(call, understood, q_len, kv_len, masks)
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
        if (blocks := _as_blocks(call, understood, q_len, kv_len, masks, as_read)) is not None:
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
            return (None if ends is None else _of_ids(call, ends, kv_len, as_read)) or as_read
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


def _as_band_and_row(
    call: AttentionCall, understood: Understood, q_len: Size, kv_len: Size, masks: Masks
) -> Mask | None:
    """The mask as a band, a row over keys or both; None where it is more than that."""
    mask, meaning, hidden = example_tensor(call.attn_mask), understood.meaning, understood.allowed.hidden
    assert mask is not None
    if meaning.others:
        ends = _rest_worked_out(understood, q_len, kv_len, mask.device, masks.writes)
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


def _as_blocks(
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
    ends = _rest_worked_out(understood, q_len, kv_len, mask.device, masks.writes)
    if ends is None:
        return None
    # Finite numbers hide as well where every query sees a key.
    hides = max(hidden) <= FINAL and meaning.keys == TRUE and not bool((ends.count == 0).any())
    if mask.dtype != torch.bool and max(hidden) != -math.inf and not hides:
        return None
    found = _of_ids(call, ends, kv_len, as_read)
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


def _of_ids(call: AttentionCall, ends: RowEnds, kv_len: int, as_read: Mask) -> Mask | None:
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
    # -inf, or beside it a number that hides: all the same where every query sees a key.
    if bias is None or meaning.keys != TRUE or band.kind in ("all_true", "zero_bias"):
        return None
    if max(understood.allowed.hidden) > FINAL or not _every_query_sees_a_key(
        meaning, *lengths, reader.ranges
    ):
        return None
    try:
        row = RowBuilder(call, reader).read(bias)
    except NotUnderstood:
        return None
    return dataclasses.replace(band, attn_mask=row, read="key_bias")


def _rest_worked_out(
    understood: Understood, q_len: Size, kv_len: Size, device: torch.device, writes: Writes
) -> RowEnds | None:
    """The part of a mask that depends on queries, worked out where it is known while compiling."""
    if None not in understood.worked:
        understood.worked[None] = _work_out(understood, q_len, kv_len, device, writes)
    return understood.worked[None]


def _work_out(
    understood: Understood, q_len: Size, kv_len: Size, device: torch.device, writes: Writes
) -> RowEnds | None:
    if not isinstance(q_len, int) or not isinstance(kv_len, int):
        return None
    meaning, query, key = understood.meaning, variable(QUERY), variable(KEY)
    parts = [*meaning.others]
    if meaning.low is not None:
        parts.append(_at_least(key, query, meaning.low))
    if meaning.high is not None:
        parts.append(_at_least(query, key, -meaning.high))
    return worked_out(both(*parts), q_len, kv_len, device, writes)


def _at_least(left: Linear, right: Linear, distance: int) -> Any:
    return at_least(left, add(right, Linear(constant=distance)))


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
