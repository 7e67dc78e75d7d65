"""The masks of one graph as they were read from it, and what is worked out of them while compiling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, leaves
from sage_inductor.graph.sizes import Size, known, sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.algebra import add, at_least, both
from sage_inductor.rewriting.masks.blocks import RowEnds, worked_out
from sage_inductor.rewriting.masks.constants import constant_value
from sage_inductor.rewriting.masks.formula import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Condition,
    Linear,
    NotUnderstood,
    plain,
    variable,
)
from sage_inductor.rewriting.masks.meaning import Allowed, Meaning, allowed_by, meaning_of
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.reading import Reader
from sage_inductor.rewriting.masks.rows import RowBuilder
from sage_inductor.rewriting.masks.views import broadcast
from sage_inductor.rewriting.masks.whole import MASKED_OUT_FRACTION
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


def rest_worked_out(
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
