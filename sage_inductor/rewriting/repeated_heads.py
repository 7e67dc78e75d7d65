"""Repeated key and value heads, as `repeat_kv` makes them: a kernel with GQA reads K and V from before the repetition."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from torch import fx

from sage_inductor.graph.call import AttentionCall, Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, CASTS, IN_ORDER, facts_of, operation
from sage_inductor.graph.sizes import are_multiples, sizes_of


def absorb_repeated_heads(call: AttentionCall) -> AttentionCall:
    """`call` with key and value from before their heads were repeated, if both were, by the same factor. Else `call`.

    Query head h then reads key head `h // (heads / kv_heads)`, the one that the repetition gave it.
    """
    if call.enable_gqa:
        return call
    if _broadcasts_one_head(call):
        return dataclasses.replace(call, enable_gqa=True)
    key, value = _unrepeated(call.key), _unrepeated(call.value)
    if key is None or value is None:
        return call
    key_before, value_before = example_tensor(key), example_tensor(value)
    if key_before is None or value_before is None or sizes_of(key_before)[1] != sizes_of(value_before)[1]:
        return call
    return dataclasses.replace(call, key=key, value=value, enable_gqa=True)


def _broadcasts_one_head(call: AttentionCall) -> bool:
    """Multi-query attention as SDPA takes it without enable_gqa: one key and value head, broadcast."""
    query, key, value = (example_tensor(item) for item in (call.query, call.key, call.value))
    if query is None or key is None or value is None or not query.dim() == key.dim() == value.dim() == 4:
        return False
    one = all(sizes_of(tensor)[1] == 1 for tensor in (key, value))
    return one and sizes_of(query)[1] != 1


def _unrepeated(node: Value) -> fx.Node | None:
    """The `[batch, kv_heads, seq, dim]` node that `node` repeats along heads; None when it repeats nothing."""
    if not isinstance(node, fx.Node):
        return None
    repeated = _repeat_interleaved(node) or _expanded_and_reshaped(node)
    if repeated is None:
        return None
    before, after = example_tensor(repeated), example_tensor(node)
    if before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return None
    # The chain of nodes says that something was repeated; the shapes say that it was the heads and nothing
    # else.
    sizes, repeated_sizes = sizes_of(before), sizes_of(after)
    same_elsewhere = all(sizes[dim] == repeated_sizes[dim] for dim in (0, 2, 3))
    return repeated if same_elsewhere and are_multiples(repeated_sizes[1], sizes[1]) else None


def _repeat_interleaved(node: fx.Node) -> fx.Node | None:
    if operation(node) != "repeat_interleave":
        return None
    source = node.args[0] if node.args else None
    repeats = _argument(node, 1, "repeats")
    dim = _argument(node, 2, "dim")
    return source if isinstance(source, fx.Node) and isinstance(repeats, int) and dim in (1, -3) else None


def _expanded_and_reshaped(node: fx.Node) -> fx.Node | None:
    """reshape(expand(x[:, :, None])): transformers' repeat_kv, with any number of reshapes or copies behind
    it."""
    current = node
    reshaped = False
    while IN_ORDER in facts_of(current) and operation(current) not in CASTS:
        reshaped = True
        current = _source(current)
    if not reshaped or operation(current) not in BROADCASTS:
        return None
    expanded = example_tensor(current)
    inner = _source(current)
    inserted = example_tensor(inner)
    if expanded is None or inserted is None or inserted.dim() != 5 or not _inserts_dim_2(inner):
        return None
    only_the_new_dim = all(sizes_of(expanded)[dim] == sizes_of(inserted)[dim] for dim in (0, 1, 3, 4))
    return _source(inner) if only_the_new_dim else None


def _inserts_dim_2(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        index = node.args[1]
        whole = slice(None, None, None)
        trailing = index[3:] if isinstance(index, tuple) else ()
        return (
            isinstance(index, tuple)
            and index[:3] == (whole, whole, None)
            and all(item == whole or item is Ellipsis for item in trailing)
        )
    return operation(node) == "unsqueeze" and _argument(node, 1, "dim") in (2, -3)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
