"""Attention sinks (gpt-oss): a column before or behind those of the keys, which takes weight and has no value."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import fx

from sage_inductor.graph.call import Expr, Value
from sage_inductor.patterns.axes import Order, arranged
from sage_inductor.patterns.nodes import (
    CAT,
    GETITEM,
    NARROW,
    SLICE,
    argument,
    casts_floats,
    only_reader,
    operands,
    shape_of,
    unexpanded,
)
from sage_inductor.patterns.softmax import Softmax, own_maximum


def left_out(node: Any, dim: int) -> int | None:
    """The entry along `dim` that `node` leaves out of its first argument: 0 for `x[..., 1:]`, -1 for `x[..., :-1]`. None where
    it is no slice, or leaves out more."""
    source = argument(node, 0, "input") if node in GETITEM or node in SLICE or node in NARROW else None
    if not isinstance(source, fx.Node):
        return None
    rank = len(shape_of(source))
    if rank != len(shape_of(node)):  # of several tensors, or a dim less
        return None
    size = shape_of(source)[dim]
    others = size - 1 if isinstance(size, int) else None
    if node in GETITEM:
        index = _slices(node.args[1], rank)
        if index is None or any(item != slice(None) for at, item in enumerate(index) if at != dim):
            return None
        start, end, step = index[dim].start, index[dim].stop, index[dim].step
    elif argument(node, 1, "dim", 0) not in (dim, dim - rank):
        return None
    elif node in SLICE:
        start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step")
    else:
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        whole = others is not None and length == others
        return -1 if whole and start == 0 else 0 if whole and start == 1 else None
    if step not in (None, 1):
        return None
    if start in (None, 0):
        return -1 if end == -1 or (others is not None and end == others) else None
    to_the_end = end in (None, sys.maxsize) or (others is not None and isinstance(end, int) and end > others)
    return 0 if start == 1 and to_the_end else None


def _slices(index: Any, rank: int) -> list[slice] | None:
    """`index` as one slice for each of `rank` dims; None where it holds anything but slices and an ellipsis."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if items.count(Ellipsis) > 1 or any(
        not isinstance(item, slice) and item is not Ellipsis for item in items
    ):
        return None
    missing = [slice(None)] * (rank - len(items) + items.count(Ellipsis))
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    return [*items[:at], *missing, *items[at + 1 :]]


class WithSink(NamedTuple):
    """The scores beside the column of a sink."""

    scores: fx.Node
    readers: tuple[fx.Node, ...]
    sink: Value  # broadcasts to `[*batch, queries]`


def without_sink(found: Softmax, order: Order, at: int) -> WithSink | None:
    """The scores and the sink, of which the softmax sees `cat([scores, sink], -1)` (`at` -1) or `cat([sink, scores], -1)`
    (`at` 0). None where it sees anything else. `order`: the dims of both."""
    node, readers = found.logits, found.readers
    while node not in CAT:
        if not only_reader(node, *readers):
            return None
        maximum = own_maximum(node, order[-1])
        source = operands(node)[0] if maximum is not None else argument(node, 0, "input")
        if not isinstance(source, fx.Node) or (maximum is None and not casts_floats(node)):
            return None
        node, readers = source, (node,) if maximum is None else (node, maximum)
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not only_reader(node, *readers) or not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
        return None
    scores, sink = tensors if at == -1 else reversed(tensors)
    if (
        not isinstance(scores, fx.Node)
        or not isinstance(sink, fx.Node)
        or dim not in (order[-1], order[-1] - len(order))
    ):
        return None
    size = shape_of(sink)[order[-1]]
    if not isinstance(size, int) or size != 1:
        return None
    column = arranged(unexpanded(sink), order)
    return WithSink(scores, (node,), Expr.of("squeeze", column, -1))
