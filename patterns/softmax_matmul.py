"""Attention written out: softmax(scale * Q K^T + mask) V, in the spellings of matmul, bmm, baddbmm and einsum.

Anchored on the second matrix product, walked backwards: weights (casts, dropout that is off) to the softmax over the
last dim, logits (scale, masks, casts; logits.py) to the first product (products.py). Every value on the way must have
one reader: weights or logits that anyone else sees have to exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.call import AttentionCall, Expr, Pattern, Value, example_tensor, traced
from sage_inductor.patterns.logits import Logits, Term, logits_of
from sage_inductor.patterns.nodes import (
    CAST,
    DROPOUT,
    MASKED_FILL,
    RESHAPE,
    SAME,
    SOFTMAX,
    argument,
    casts_floats,
    number,
    only_reader,
    shape_of,
    unexpanded,
)
from sage_inductor.patterns.products import Product, mirrored, of_one_head, product, untransposed

Steps = tuple[tuple[str, tuple[Any, ...]], ...]


class SoftmaxMatmul(Pattern):
    """softmax(Q K^T) V by hand."""

    name = "softmax_matmul"

    def match(self, node: fx.Node) -> AttentionCall | None:
        outer = product(node) or of_one_head(node, scores=False)
        if outer is None or outer.bias is not None or outer.scale != 1.0 or example_tensor(node) is None:
            return None
        weights = _weights(outer.left, node)
        other = mirrored(node, outer) if weights is None else None
        if other is not None:
            outer, reader = other
            weights = _weights(outer.left, reader)
        logits = None if weights is None else logits_of(weights.softmax, weights.zeroed)
        return None if weights is None or logits is None else _call(node, outer, logits, weights.dropout)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        q, k, v = (torch.randn(2, 4, 16, 32) for _ in range(3))
        yield lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1) @ v, (q, k, v)
        yield lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT) * 0.2, dim=-1), v), (q[0], k[0], v[0])

        def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2, -1)
            return torch.einsum("bhqk,bkhd->bqhd", weights, v)

        yield einsum, tuple(torch.randn(2, 16, 4, 32) for _ in range(3))


@dataclass(frozen=True)
class _Weights:
    """What the left operand of the second product comes from: a softmax, what dropout it went through, and the mask
    where it was set to zero."""

    softmax: fx.Node
    dropout: float
    zeroed: fx.Node | None


def _weights(node: Value, reader: fx.Node) -> _Weights | None:
    dropout, zeroed = 0.0, None
    current: Any = node
    if isinstance(current, Expr):  # an einsum's permuted operand: weights are used as they are, or not at all
        return None
    while isinstance(current, fx.Node) and only_reader(current, reader):
        source = argument(current, 0, "input")
        if current in SOFTMAX:
            return _Weights(current, dropout, zeroed) if _over_last_dim(current) else None
        if current in DROPOUT:
            p, training = argument(current, 1, "p", 0.5), argument(current, 2, "training", True)
            dropout = float(p) if training else dropout
        elif current in MASKED_FILL and number(argument(current, 2, "value")) == 0 and zeroed is None:
            zeroed = unexpanded(argument(current, 1, "mask"))
            if not isinstance(zeroed, fx.Node) or shape_of(source) != shape_of(current):
                return None
        elif current in RESHAPE:
            if not isinstance(source, fx.Node) or shape_of(source)[-2:] != shape_of(current)[-2:]:
                return None
        elif not (casts_floats(current) or current in SAME):
            return None
        reader, current = current, source
    return None


def _over_last_dim(node: fx.Node) -> bool:
    tensor = example_tensor(node)
    dim = argument(node, 1, "dim")
    return tensor is not None and isinstance(dim, int) and dim in (-1, tensor.dim() - 1)


def _call(node: fx.Node, outer: Product, logits: Logits, dropout: float) -> AttentionCall | None:
    output = example_tensor(node)
    assert output is not None and logits.product is not None
    left, transposed_key, value = logits.product.left, logits.product.right, outer.right
    shapes = [shape_of(item) for item in (left, transposed_key, value)]
    dims = len(shapes[0])
    if dims < 2 or {len(shape) for shape in shapes} != {dims}:
        return None
    query: Value = left if logits.factor is None else Expr.of("mul", left, logits.factor)
    if shape_of(query) != shapes[0]:
        return None
    key = untransposed(transposed_key)
    restore, undo = outer.restore, outer.undo
    regrouped = _regrouping(dims, [shape[:-2] for shape in shapes], logits.views)
    if regrouped is None:
        return None
    step, restored, undone = regrouped
    if step is not None:
        method, arguments = step
        query, key, value = (Expr.of(method, item, *arguments) for item in (query, key, value))
        restore, undo = restored + restore, undo + undone
    if restore and traced(output, (*undo, *restore)).stride() != output.stride():
        return None  # users rely on the strides
    dtype = output.dtype
    query, key, value = (_cast(item, dtype) for item in (query, key, value))
    scores = (*shape_of(query)[:-1], shape_of(key)[-2])
    terms = [lifted(term, scores) for term in (*logits.allowed, *logits.bias)]
    if any(term is None or not _broadcasts(shape_of(term), scores) for term in terms):
        return None
    present = [term for term in terms if term is not None]
    mask = _mask(present[: len(logits.allowed)], present[len(logits.allowed) :], dtype)
    return AttentionCall(
        node, SoftmaxMatmul.name, query, key, value, mask,
        dropout_p=dropout, scale=logits.scale, restore=restore, undo=undo,
    )  # fmt: skip


def _regrouping(
    dims: int, leading: list[tuple[Any, ...]], views: tuple[tuple[Any, ...], ...]
) -> tuple[tuple[str, tuple[Any, ...]] | None, Steps, Steps] | None:
    """What turns query, key and value into `[batch, heads, seq, head_dim]`, and the output back again; a step of
    None where they are left as they are, None where it cannot be done."""
    if dims == 3:
        # Heads folded into the batch for bmm, masks written for [batch, heads, ...]: unfold what bmm reads.
        last_two = views[-1][-2:]
        unfolded = next((view for view in views if len(view) == 4 and view[-2:] == last_two), None)
        if unfolded is None:
            return None, (), ()
        heads = unfolded[1]
        if not isinstance(heads, int):
            return None
        unfold = ("unflatten", (0, (-1, heads)))
        return unfold, (("flatten", (0, 1)),), (unfold,)
    if dims <= 4:
        return None, (), ()
    inner = [shape[1:] for shape in leading]  # of a symbolic batch, these are known
    if not all(isinstance(size, int) for shape in inner for size in shape) or len(set(inner)) != 1:
        return None
    if any(shape[0] != leading[0][0] for shape in leading):
        return None
    fold = ("flatten", (1, dims - 3))
    return fold, (("unflatten", (1, leading[0][1:])),), (fold,)


def _cast(item: Value, dtype: torch.dtype) -> Value:
    """In `dtype`, without the detour of an upcast for the products."""
    if isinstance(item, fx.Node) and item in CAST and isinstance(item.args[0], fx.Node):
        before = example_tensor(item.args[0])
        if before is not None and before.dtype == dtype:
            return item.args[0]
    tensor = example_tensor(item)
    return item if tensor is not None and tensor.dtype == dtype else Expr.of("to", item, dtype)


def _mask(allowed: list[Value], bias: list[Value], dtype: torch.dtype) -> Value | None:
    """One mask out of all hidden keys and terms."""
    both: Value | None = None
    for item in allowed:
        both = item if both is None else Expr.of(torch.logical_and, both, item)
    total: Value | None = None
    for item in bias:
        total = item if total is None else Expr.of("add", total, item)
    if total is None:
        return both
    tensor = example_tensor(total)
    if tensor is not None and tensor.dtype not in (torch.float32, dtype):
        total = Expr.of("to", total, dtype)
    return total if both is None else Expr.of(torch.where, both, total, -math.inf)


def lifted(term: Term, scores: tuple[Any, ...]) -> Value | None:
    """`term`, which broadcasts to another view of the logits, as one that broadcasts to `scores`; None where the
    sizes do not tell how."""
    item, logits, shape = term.value, term.logits, shape_of(term.value)
    if len(logits) == len(scores) and all(size == other for size, other in zip(logits, scores, strict=True)):
        return item
    if not all(isinstance(size, int) for size in (*logits, *scores, *shape)):
        if len(logits) > len(scores):  # dims of the term could be taken for others
            same = all(isinstance(size, int) and size == 1 for size in shape[:-2])
            return Expr.of("view", item, shape[-2:]) if same else None
        folded = len(logits) == len(shape) == 3 and len(scores) == 4
        return Expr.of("unflatten", item, 0, (-1, scores[1])) if folded and shape[0] != 1 else item
    groups = _groups(logits, scores)
    if groups is None:
        return None
    padded = (*[1] * (len(logits) - len(shape)), *shape)
    expanded: list[int] = []
    regrouped: list[int] = []
    for dims, other_dims in groups:
        sizes = [padded[dim] for dim in dims]
        constant = all(size == 1 for size in sizes)
        expanded += sizes if constant else [logits[dim] for dim in dims]
        regrouped += [1 if constant else scores[dim] for dim in other_dims]
    item = item if shape == padded else Expr.of("reshape", item, padded)
    item = item if tuple(expanded) == padded else Expr.of("expand", item, expanded)
    return Expr.of("reshape", item, regrouped)


def _groups(first: tuple[int, ...], second: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """The dims of `first` and of `second` that a reshape from one to the other merges and splits among themselves."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(first) and j < len(second):
        dims, other_dims = [i], [j]
        size, other_size = first[i], second[j]
        while size != other_size:
            if size < other_size:
                i += 1
                if i == len(first):
                    return None
                dims.append(i)
                size *= first[i]
            else:
                j += 1
                if j == len(second):
                    return None
                other_dims.append(j)
                other_size *= second[j]
        groups.append((dims, other_dims))
        i, j = i + 1, j + 1
    if any(size != 1 for size in (*first[i:], *second[j:])) or not groups:
        return None
    groups[-1][0].extend(range(i, len(first)))
    groups[-1][1].extend(range(j, len(second)))
    return groups


def _broadcasts(shape: tuple[Any, ...], scores: tuple[Any, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(scores), strict=False)
    return len(shape) <= len(scores) and all(size == 1 or size == expected for size, expected in pairs)
