"""`flex_attention`: opened where its score_mod leaves scores as they are, and its mask_mod works element by element.

What is inside is SDPA with the mask that the mask_mod gives. Whether that mask can be said without writing it out is asked
later, and so is whether the lists of a block_mask say the same as its mask_mod: see `rewriting/block_lists.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import (
    SDPA,
    Expansion,
    OpaquePattern,
    example_tensor,
    laid_out_as,
    node_name,
    trace,
)
from sage_inductor.graph.facts import AND, CASTS, NOT, OR, XOR, fill, operation
from sage_inductor.graph.sizes import differ, memory_order
from sage_inductor.graph.writes import submodule_of
from sage_inductor.patterns.nodes import reads_nothing

# What a mask_mod may do: of every element by itself, or look it up.
_BY_ELEMENT = {
    *AND, *OR, *NOT, *XOR, *CASTS, "add", "sub", "rsub", "mul", "neg", "abs", "floordiv", "floor_divide", "mod", "remainder",
    "ge", "gt", "le", "lt", "eq", "ne", "where", "minimum", "maximum", "clamp", "getitem", "index",
}  # fmt: skip
# Of a block_mask that was not given: one block that holds everything.
_EVERYTHING = 1 << 30


@dataclass(frozen=True)
class FlexCall:
    """The arguments of the operator."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    score_mod: Any
    block_mask: tuple[Any, ...]
    scale: Any
    options: Any
    mask_buffers: tuple[Any, ...]

    @classmethod
    def of(cls, node: fx.Node) -> FlexCall | None:
        """The call at `node`; None where that is another."""
        if node.op != "call_function" or getattr(node.target, "__name__", "") != "flex_attention":
            return None
        args = node.args
        if len(args) < 7 or not isinstance(args[4], tuple) or len(args[4]) < 13:
            return None
        buffers = args[8] if len(args) > 8 and isinstance(args[8], (tuple, list)) else ()
        query, key, value = args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        return cls(node, query, key, value, args[3], args[4], args[5], args[6], tuple(buffers))

    @property
    def mask_mod(self) -> fx.GraphModule | None:
        mask_mod = self.block_mask[-1]
        return submodule_of(mask_mod) if isinstance(mask_mod, fx.Node) else None

    @property
    def block_sizes(self) -> tuple[Any, Any]:
        """Of queries and keys."""
        return self.block_mask[-3], self.block_mask[-2]

    @property
    def has_lists(self) -> bool:
        """Whether a block_mask was given, whose lists say which blocks are looked at."""
        return self.block_sizes != (_EVERYTHING, _EVERYTHING)

    @property
    def lists(self) -> tuple[Any, Any, Any, Any]:
        """For each block of queries: how many blocks of keys the mask_mod is asked for, and which; how many are taken whole, and
        which (None and None where that is not told). int32 `[batch, heads, blocks]` and `[batch, heads, blocks, blocks]`."""
        counts, indices, full_counts, full_indices = self.block_mask[2:6]
        return counts, indices, full_counts, full_indices


class FlexAttention(OpaquePattern):
    """The operator that `torch.nn.attention.flex_attention` calls, with a score_mod and a block_mask or without."""

    name = "flex_attention"

    def expand(self, node: fx.Node) -> Expansion | None:
        call = FlexCall.of(node)
        if call is None or self.closed_reasons(node):
            return None
        mask_mod, output = call.mask_mod, _first(node)
        assert mask_mod is not None and output is not None
        has_mask = fill(_result(mask_mod)) != 1 if isinstance(_result(mask_mod), fx.Node) else True

        def attention(query: Tensor, key: Tensor, value: Tensor, *buffers: Tensor) -> tuple[Any, ...]:
            mask = _mask(mask_mod, query, key, buffers) if has_mask else None
            grouped = bool(differ(query.shape[1], key.shape[1]))
            out = SDPA(query, key, value, mask, scale=call.scale, enable_gqa=grouped)
            if memory_order(out) != memory_order(output):
                for method, args in laid_out_as(output):
                    out = getattr(out, method)(*args)
            return out, None, None

        return trace(attention, (call.query, call.key, call.value, *call.mask_buffers))

    def closed_reasons(self, node: fx.Node) -> list[str]:
        call = FlexCall.of(node)
        if call is None:
            named = node.op == "call_function" and getattr(node.target, "__name__", "") == "flex_attention"
            return ["flex_attention=arguments of another form"] if named else []
        reasons = []
        found = submodule_of(call.score_mod) if isinstance(call.score_mod, fx.Node) else None
        if (changes := _changes_scores(found)) is not None:
            reasons.append(_reason("score_mod", changes, "none: scores as they are"))
        if any(user.args[1] != 0 and not reads_nothing(user) for user in node.users):
            reasons.append("flex_attention=its log-sum-exp or maxima are read (supported: the output alone)")
        unknown = "no graph" if call.mask_mod is None else _beyond_elements(call.mask_mod)
        if unknown is not None:
            reasons.append(
                _reason("mask_mod", unknown, "arithmetic, comparisons and logic of the indices, lookups")
            )
        backend = call.options.get("BACKEND", "AUTO") if isinstance(call.options, dict) else "AUTO"
        if backend != "AUTO":
            reasons.append(_reason("BACKEND", backend, "no explicit choice"))
        if not isinstance(call.scale, float):
            reasons.append(_reason("scale", call.scale, "a number"))
        tensors = [example_tensor(item) for item in (call.query, call.key, call.value)]
        buffers = [
            isinstance(item, fx.Node) and example_tensor(item) is not None for item in call.mask_buffers
        ]
        output, batches = _first(node), [tensor.shape[0] for tensor in tensors if tensor is not None]
        if len(batches) < 3 or not all(buffers) or output is None:
            reasons.append("flex_attention=operands that are no tensors")
        elif differ(*batches[:2]) or tensors[0] is None or tensors[0].dtype != output.dtype:
            reasons.append("flex_attention=operands of several batches or dtypes")
        return reasons

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        from torch.nn.attention.flex_attention import flex_attention

        yield flex_attention, tuple(torch.randn(1, 2, 128, 32) for _ in range(3))


def _reason(name: str, value: object, supported: str) -> str:
    return f"{name}={value} (supported: {supported})"


def _first(node: fx.Node) -> Tensor | None:
    """What tracing recorded for the output."""
    values = node.meta.get("example_value", node.meta.get("val"))
    found = values[0] if isinstance(values, (tuple, list)) and values else None
    return found if isinstance(found, Tensor) else None


def _mask(mask_mod: fx.GraphModule, query: Tensor, key: Tensor, buffers: tuple[Tensor, ...]) -> Tensor:
    """The mask, of indices that broadcast to `[batch, heads, q_len, kv_len]`."""
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    indices = [
        torch.arange(size, dtype=torch.int32, device=query.device)[(..., *[None] * after)]
        for size, after in zip(sizes, (3, 2, 1, 0), strict=True)
    ]
    mask: Tensor = mask_mod(*indices, *buffers)
    return mask if mask.dim() >= 2 else mask.expand(sizes[2], sizes[3])


def _result(module: fx.GraphModule) -> Any:
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0]


def _changes_scores(module: fx.GraphModule | None) -> str | None:
    """What a score_mod does to scores; None where it leaves them as they are."""
    if module is None:
        return "no graph"
    result = _result(module)
    (first, *_) = module.graph.find_nodes(op="placeholder")
    if result is first:
        return None
    calls = [node_name(node) for node in module.graph.nodes if node.op in ("call_function", "call_method")]
    return ", ".join(dict.fromkeys(calls)) or "another value"


def _beyond_elements(module: fx.GraphModule) -> str | None:
    """The first operation of a mask_mod that does not work element by element; None where all do."""
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        tensor = example_tensor(node)
        known = operation(node) in _BY_ELEMENT or fill(node) is not None
        if tensor is None or tensor.dim() != 0 or not known or node.target is operator.setitem:
            return node_name(node)
    return None
