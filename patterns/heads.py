"""Query, key and value with other numbers of dims than four, seen as `[batch, heads, seq, dim]`; terms of scores likewise.

Kernels take four dims at most. `[b, frames, heads, n, d]` becomes `[b, frames * heads, n, d]`, and the output is unflattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sage_inductor.graph.call import Expr, Value
from sage_inductor.graph.sizes import Size
from sage_inductor.patterns.axes import regrouped
from sage_inductor.patterns.nodes import shape_of, unexpanded
from sage_inductor.patterns.products import Methods


@dataclass(frozen=True)
class Grouped:
    """Operands as kernels take them. `restore` turns the output of attention over them into that of the call; `undo` turns
    it back."""

    query: Value
    key: Value
    value: Value
    enable_gqa: bool = False
    restore: Methods = ()
    undo: Methods = ()


def folded(query: Value, key: Value, value: Value) -> Grouped | None:
    """Five dims and more: all but the first and the last two become heads.

    Key and value may have fewer heads: `[b, kv_heads, 1, n, d]` beside queries `[b, kv_heads, group, n, d]`. Each of their
    heads then serves a group of query heads. None where sizes do not fit, or are not known.
    """
    batch, *inner = shape_of(query)[:-2]
    for item in (key, value):  # of more heads than the queries, by a repetition too: so many the output has
        heads = zip(shape_of(item)[1:-2], inner, strict=False)
        if any(isinstance(own, int) and own not in (1, of_query) for own, of_query in heads):
            return None
    for candidates in ((_unrepeated(key), _unrepeated(value)), (key, value)):
        (kv_batch, *kv_inner), (value_batch, *value_inner) = (shape_of(item)[:-2] for item in candidates)
        # Of a symbolic batch, these are known.
        if not all(isinstance(size, int) for size in (*inner, *kv_inner, *value_inner)):
            return None
        if kv_batch != batch or value_batch != batch or kv_inner != value_inner:
            continue
        own = next((dim for dim, size in enumerate(kv_inner) if size != inner[dim]), len(inner))
        if any(size != 1 for size in kv_inner[own:]):
            continue
        fold = ("flatten", (1, len(inner)))
        query, key, value = (Expr.of(fold[0], item, *fold[1]) for item in (query, *candidates))
        unfold = ("unflatten", (1, tuple(inner)))
        return Grouped(query, key, value, own < len(inner), (unfold,), (fold,))
    return None


def same_batch(query: Value, key: Value, value: Value) -> tuple[Value, Value, Value]:
    """The three with a batch of 1 expanded where others have more: learned queries, or keys that all samples share. Inputs of other
    than four dims as they are."""
    items = (query, key, value)
    sizes = [shape_of(item)[0] for item in items if len(shape_of(item)) == 4]
    whole = next((size for size in sizes if size != 1), 1)
    if len(sizes) != 3 or not isinstance(whole, int) or any(size not in (1, whole) for size in sizes):
        return items
    query, key, value = (
        item if size == whole else Expr.of("expand", item, whole, -1, -1, -1)
        for item, size in zip(items, sizes, strict=True)
    )
    return query, key, value


def folded_mask(mask: Value, scores: tuple[Size, ...]) -> Value | None:
    """`mask`, which broadcasts to scores of five dims and more, as one that does so once these are folded as `folded` does
    it. None where it does not broadcast."""
    missing = len(scores) - len(shape_of(mask))
    if missing >= len(scores) - 2:
        return mask
    for _ in range(missing):
        mask = Expr.of("unsqueeze", mask, 0)
    own, inner = shape_of(mask)[1:-2], scores[1:-2]
    if any(size not in (1, whole) for size, whole in zip(own, inner, strict=True)):
        return None
    if own != inner and any(size != 1 for size in own):
        mask = Expr.of("expand", mask, -1, *inner, -1, -1)
    return Expr.of("flatten", mask, 1, len(inner))


def _unrepeated(item: Value) -> Value:
    """`item` before an `expand` of its heads. `item` itself where the batch, the sequence or the channels were expanded."""
    before = unexpanded(item)
    shape, other = shape_of(item), shape_of(before)
    same = len(shape) == len(other) and (shape[0], *shape[-2:]) == (other[0], *other[-2:])
    return before if same else item


def unfolded(query: Value, key: Value, value: Value, views: tuple[tuple[Any, ...], ...]) -> Grouped | None:
    """Four dims and fewer, which stay as they are but for two cases.

    Heads may be folded into the batch for bmm while a mask is written for `[batch, heads, ...]`; `views`, the shapes that
    the scores take on the way, show that. Or only one of the two products has them folded. None where the number of heads
    is not known.
    """
    if len(shape_of(query)) != len(shape_of(value)):
        return _half_folded(query, key, value)
    if len(shape_of(query)) == 3:
        last_two = views[-1][-2:]
        view = next((view for view in views if len(view) == 4 and view[-2:] == last_two), None)
        if view is not None:
            if not isinstance(view[1], int):
                return None
            step = ("unflatten", (0, (-1, view[1])))
            query, key, value = (Expr.of(step[0], item, *step[1]) for item in (query, key, value))
            return Grouped(query, key, value, restore=(("flatten", (0, 1)),), undo=(step,))
    return Grouped(query, key, value)


def _half_folded(query: Value, key: Value, value: Value) -> Grouped | None:
    """Heads folded into the batch for one of the two products only.

    The old GPT-NeoX views scores `[batch * heads, q, k]` as `[batch, heads, q, k]` before the weights meet `value`; other
    models fold the weights.
    """
    shapes = [shape_of(item) for item in (query, key, value)]
    if {len(shape) for shape in shapes} != {3, 4}:
        return None
    batch, heads = next(shape for shape in shapes if len(shape) == 4)[:2]
    if not isinstance(heads, int) or any(
        (shape[0] != batch * heads) if len(shape) == 3 else (shape[:2] != (batch, heads)) for shape in shapes
    ):
        return None
    step = ("unflatten", (0, (-1, heads)))
    query, key, value = (
        Expr.of(step[0], item, *step[1]) if len(shape) == 3 else item
        for item, shape in zip((query, key, value), shapes, strict=True)
    )
    if len(shapes[2]) == 4:
        return Grouped(query, key, value)
    return Grouped(query, key, value, restore=(("flatten", (0, 1)),), undo=(step,))


def lifted(item: Value, logits: tuple[Any, ...], scores: tuple[Any, ...]) -> Value | None:
    """`item` as it broadcasts to the scores, of shape `scores`; it was added to a view of them, of shape `logits`.

    A bias `[1, heads, q, k]` added to `scores.view(b, heads, q, k)` becomes one for scores `[b * heads, q, k]`. None where
    the sizes do not tell how.
    """
    shape = shape_of(item)
    if len(logits) == len(scores) and all(size == other for size, other in zip(logits, scores, strict=True)):
        return item
    if not all(isinstance(size, int) for size in (*logits, *scores, *shape)):
        if len(logits) > len(scores):  # dims of the term could be taken for others
            same = all(size == 1 for size in shape[:-2])
            return Expr.of("squeeze", item, tuple(range(len(shape) - 2))) if same else None
        folded = len(logits) == len(shape) == 3 and len(scores) == 4
        return Expr.of("unflatten", item, 0, (-1, scores[1])) if folded and shape[0] != 1 else item
    groups = regrouped(logits, scores)
    if groups is None:
        return None
    padded = (*[1] * (len(logits) - len(shape)), *shape)
    expanded: list[int] = []
    sizes_there: list[int] = []
    for dims, other_dims in groups:
        sizes = [padded[dim] for dim in dims]
        constant = all(size == 1 for size in sizes)
        expanded += sizes if constant else [logits[dim] for dim in dims]
        sizes_there += [1 if constant else scores[dim] for dim in other_dims]
    item = item if shape == padded else Expr.of("reshape", item, padded)
    item = item if tuple(expanded) == padded else Expr.of("expand", item, expanded)
    return Expr.of("reshape", item, sizes_there)
