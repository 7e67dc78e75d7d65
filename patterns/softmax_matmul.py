"""Attention written out: softmax(scale * Q K^T + mask) V, in the spellings of matmul, bmm, baddbmm and einsum.

Anchored on the second matrix product (products.py), walked backwards: weights (casts, dropout that is off) to the
softmax over the keys (softmax.py), logits (scale, masks, casts; logits.py) to the first product. Every value on the way
must have one reader: weights or logits that anyone else sees have to exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, Expr, Pattern, Value, example_tensor, laid_out_as, traced
from sage_inductor.graph.sizes import known, strides_of
from sage_inductor.patterns.axes import Order, ordered, permutation, viewed
from sage_inductor.patterns.heads import folded, lifted, same_batch, unfolded
from sage_inductor.patterns.logits import Logits, logits_of
from sage_inductor.patterns.nodes import (
    CAST,
    DROPOUT,
    RESHAPE,
    argument,
    casts_floats,
    is_the_same,
    only_reader,
    shape_of,
    uncast,
)
from sage_inductor.patterns.products import Methods, WeightedSum, weighted_sums
from sage_inductor.patterns.sinks import left_out
from sage_inductor.patterns.softmax import Softmax, divided, quotient, softmax
from sage_inductor.patterns.terms import Term, in_order, is_representable
from sage_inductor.patterns.zeros import zeros


class SoftmaxMatmul(Pattern):
    """softmax(Q K^T) V by hand."""

    name = "softmax_matmul"

    def match(self, node: fx.Node) -> AttentionCall | None:
        for outer in weighted_sums(node):
            weights = weights_of(outer, node)
            logits = None
            if weights is not None:
                logits = logits_of(weights.softmax, weights.order, weights.zeroed, weights.sink_at)
            if weights is not None and logits is not None:
                return _call(node, outer, logits, weights.dropout)
        return _divided_afterwards(node)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        q, k, v = (torch.randn(2, 4, 16, 32) for _ in range(3))
        yield lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1) @ v, (q, k, v)
        yield lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT) * 0.2, dim=-1), v), (q[0], k[0], v[0])

        def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2, -1)
            return torch.einsum("bhqk,bkhd->bqhd", weights, v)

        yield einsum, tuple(torch.randn(2, 16, 4, 32) for _ in range(3))


def _divided_afterwards(node: fx.Node) -> AttentionCall | None:
    """`(e @ v) / e.sum(-1, keepdim=True)` where e is the exponential of the logits; the product, or e in it, may be cast."""
    numerator, divisor = quotient(node)
    product = uncast(numerator)
    if not isinstance(product, fx.Node) or shape_of(product) != shape_of(node):
        return None
    if not only_reader(numerator, node):
        return None
    for outer in weighted_sums(product):
        weights = outer.weights
        found = divided(node, weights, divisor, product)
        if found is None and casts_floats(weights) and only_reader(weights, product):
            found = divided(node, argument(weights, 0, "input"), divisor, weights)
        # The sums lie as the rows of the product do: no dims are moved.
        if found is None or outer.restore or outer.order != tuple(range(len(outer.order))):
            continue
        logits = logits_of(found, outer.order) if found.dim == outer.order[-1] else None
        if logits is not None:
            return _call(node, outer, logits, 0.0)
    return None


@dataclass(frozen=True)
class Weights:
    """Where the left operand of the second product comes from.

    `order`: its dims as `[*batch, queries, keys]`. `dropout`: the probability of the dropout on the way. `zeroed`: the mask
    where weights were set to zero. `sink_at`: the column that was left out, that of a sink, 0 or -1.
    """

    softmax: Softmax
    order: Order
    dropout: float | fx.Node
    zeroed: Value | None
    sink_at: int | None


def weights_of(outer: WeightedSum, reader: fx.Node, trail: list[fx.Node] | None = None) -> Weights | None:
    """The weights that the second product, `reader`, takes; None at anything unknown on the way to their softmax. The nodes
    on the way are appended to `trail`; where the result is None, its last node is the unknown one."""
    order = outer.order
    dropout: float | fx.Node = 0.0
    zeroed: Value | None = None
    sink_at: int | None = None
    looks: fx.Node | None = None
    readers: tuple[fx.Node, ...] = (reader,)
    current: Any = outer.weights
    while isinstance(current, fx.Node):
        if trail is not None:
            trail.append(current)
        if not only_reader(current, *readers):
            return None
        found, readers = softmax(current), (current,)
        if found is not None:
            if looks is not None and argument(looks, 0, "input") is not found.logits:
                return None
            found = replace(found, readers=(*found.readers, *filter(None, (looks,))))
            return Weights(found, order, dropout, zeroed, sink_at) if found.dim == order[-1] else None
        source, moved = argument(current, 0, "input"), permutation(current)
        if (column := left_out(current, order[-1])) is not None:
            if sink_at is not None or zeroed is not None:
                return None
            sink_at = column
        elif moved is not None:
            if zeroed is not None:
                return None
            order = ordered(moved[1], order)
        elif current in DROPOUT:
            p, training = argument(current, 1, "p", 0.5), argument(current, 2, "training", True)
            dropout = p if training else dropout
        elif (emptied := zeros(current)) is not None:
            if emptied.mask is not None:
                if zeroed is not None:
                    return None
                zeroed = emptied.mask
            if emptied.looks is not None and (looks is not None or emptied.dim != order[-1]):
                return None
            source, readers, looks = emptied.source, emptied.readers, emptied.looks or looks
        elif current in RESHAPE:
            before = viewed(order, shape_of(current), shape_of(source))
            if (
                before is None
                or ordered(shape_of(source), before)[-2:] != ordered(shape_of(current), order)[-2:]
            ):
                return None
            if zeroed is not None and before != order:
                return None
            order = before
        elif not (casts_floats(current) or is_the_same(current)):
            return None
        current = source
    return None


def _call(
    node: fx.Node, outer: WeightedSum, logits: Logits, dropout: float | fx.Node
) -> AttentionCall | None:
    output = example_tensor(node)
    assert output is not None and logits.product is not None
    left, key, value = logits.product.query, logits.product.key, outer.value
    shapes = [shape_of(item) for item in (left, key, value)]
    dims = len(shapes[0])
    if dims < 2 or len(shapes[1]) != dims or (len(shapes[2]) != dims and dims > 4):
        return None
    if shapes[0][-1] != shapes[1][-1] or shapes[1][-2] != shapes[2][-2]:
        return None  # einsum broadcasts what it sums over
    query: Value = left if logits.factor is None else Expr.of("mul", left, logits.factor)
    for method, symbol in logits.symbols:
        query = Expr.of(method, query, symbol)
    if shape_of(query) != shapes[0]:
        return None
    restore, undo = outer.restore, outer.undo
    grouped = folded(query, key, value) if dims > 4 else unfolded(query, key, value, logits.views)
    if grouped is None:
        return None
    query, key, value = same_batch(grouped.query, grouped.key, grouped.value)
    steps = _as_laid_out(output, grouped.restore + restore, undo + grouped.undo)
    if steps is None:
        return None
    restore, undo = steps
    dtype = output.dtype
    query, key, value = (_cast(item, dtype) for item in (query, key, value))
    scores = (*shape_of(query)[:-1], shape_of(key)[-2])
    allowed, terms = (_lifted(items, scores) for items in (logits.allowed, logits.terms[::-1]))
    if allowed is None or terms is None or not is_representable(terms):
        return None
    if logits.sink is not None and (
        len(scores) != 4 or grouped.restore or not _broadcasts(shape_of(logits.sink), scores[:-1])
    ):
        return None
    mask = _mask([term.value for term in allowed], in_order(terms), dtype)
    return AttentionCall(
        node, SoftmaxMatmul.name, query, key, value, mask,
        dropout_p=dropout, scale=logits.scale, enable_gqa=grouped.enable_gqa, sink=logits.sink, restore=restore,
        undo=undo,
    )  # fmt: skip


def _as_laid_out(output: Tensor, restore: Methods, undo: Methods) -> tuple[Methods, Methods] | None:
    """`restore` and `undo`, with a copy added where they alone do not give the strides of `output`. Users rely on those
    strides, and kernels do not write every order. None where a copy cannot give them."""
    plain = traced(output, undo)
    if not restore or (
        known(plain.stride(-1)) == 1 and strides_of(traced(plain, restore)) == strides_of(output)
    ):
        return restore, undo
    undo = (*undo, ("contiguous", ()))
    restore = (*restore, *laid_out_as(output))
    return (restore, undo) if strides_of(traced(output, (*undo, *restore))) == strides_of(output) else None


def _cast(item: Value, dtype: torch.dtype) -> Value:
    """In `dtype`, without the detour of an upcast for the products."""
    if isinstance(item, fx.Node) and item in CAST and isinstance(item.args[0], fx.Node):
        before = example_tensor(item.args[0])
        if before is not None and before.dtype == dtype:
            return item.args[0]
    tensor = example_tensor(item)
    return item if tensor is not None and tensor.dtype == dtype else Expr.of("to", item, dtype)


def _lifted(terms: Sequence[Term], scores: tuple[Any, ...]) -> list[Term] | None:
    """`terms` as they broadcast to `scores`, `[*batch, queries, keys]` of the call; None where one does not."""
    found = []
    for term in terms:
        value = lifted(term.value, term.logits, scores)
        if value is None or not _broadcasts(shape_of(value), scores):
            return None
        found.append(replace(term, value=value, logits=scores))
    return found


def _mask(allowed: Sequence[Value], total: Value | None, dtype: torch.dtype) -> Value | None:
    """One mask out of all hidden keys and the terms together, which keep the precision of the model's own sums."""
    both: Value | None = None
    for item in allowed:
        both = item if both is None else Expr.of(torch.logical_and, both, item)
    if total is None:
        return both
    tensor = example_tensor(total)
    if tensor is not None and tensor.dtype not in (torch.float32, dtype):
        total = Expr.of("to", total, torch.float32)
    return total if both is None else Expr.of(torch.where, both, total, -math.inf)


def _broadcasts(shape: tuple[Any, ...], scores: tuple[Any, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(scores), strict=False)
    return len(shape) <= len(scores) and all(size == 1 or size == expected for size, expected in pairs)
