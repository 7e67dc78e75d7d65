"""`flex_attention`: opened where its score_mod adds nothing, a row over keys or a tensor, and its mask_mod works element by element.

What is inside is SDPA with the mask that the two give. Whether that mask can be said without writing it out is asked
later, and so is whether the lists of a block_mask say the same as its mask_mod: see `rewriting/block_lists.py`.
"""

from __future__ import annotations

import math
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
    example_value,
    laid_out_as,
    node_name,
    trace,
)
from sage_inductor.graph.facts import fill
from sage_inductor.graph.sizes import differ, memory_order, sizes_of
from sage_inductor.graph.writes import submodule_of
from sage_inductor.patterns.flex_scores import ModifiedScores, read_scores, works_by_element
from sage_inductor.patterns.nodes import reads_nothing

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
    score_buffers: tuple[Any, ...]
    mask_buffers: tuple[Any, ...]

    @classmethod
    def of(cls, node: fx.Node) -> FlexCall | None:
        """The call at `node`; None where that is another."""
        if node.op != "call_function" or getattr(node.target, "__name__", "") != "flex_attention":
            return None
        args = node.args
        if len(args) < 7 or not isinstance(args[4], tuple) or len(args[4]) < 13:
            return None
        others: list[Any] = [args[at] if len(args) > at else () for at in (7, 8)]
        of_scores, of_mask = (tuple(item) if isinstance(item, (tuple, list)) else () for item in others)
        query, key, value = args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        return cls(node, query, key, value, args[3], args[4], args[5], args[6], of_scores, of_mask)

    @property
    def scores(self) -> ModifiedScores | str:
        """What the score_mod does, or the operations in it that make it something else."""
        return read_scores(submodule_of(self.score_mod) if isinstance(self.score_mod, fx.Node) else None)

    @property
    def hides_nothing(self) -> bool:
        """Whether the mask_mod allows all keys."""
        result = None if self.mask_mod is None else _result(self.mask_mod)
        return isinstance(result, fx.Node) and fill(result) == 1

    @property
    def adds_a_tensor(self) -> bool:
        """Whether what is added to the scores is a tensor as large as they are, which is there in any case."""
        scores = self.scores
        return not isinstance(scores, str) and scores.tensor is not None

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
        scores, output = call.scores, _first(node)
        assert isinstance(scores, ModifiedScores) and output is not None
        count = len(call.score_buffers)

        def attention(query: Tensor, key: Tensor, value: Tensor, *buffers: Tensor) -> tuple[Any, ...]:
            mask = _mask(call, scores, (query, key), buffers[:count], buffers[count:])
            grouped = bool(differ(query.shape[1], key.shape[1]))
            out = SDPA(query, key, value, mask, scale=call.scale, enable_gqa=grouped)
            if memory_order(out) != memory_order(output):
                for method, args in laid_out_as(output):
                    out = getattr(out, method)(*args)
            return out, None, None

        return trace(attention, (call.query, call.key, call.value, *call.score_buffers, *call.mask_buffers))

    def closed_reasons(self, node: fx.Node) -> list[str]:
        call = FlexCall.of(node)
        if call is None:
            named = node.op == "call_function" and getattr(node.target, "__name__", "") == "flex_attention"
            return ["flex_attention=arguments of another form"] if named else []
        reasons = []
        if (changes := _score_reason(call)) is not None:
            reasons.append(changes)
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
            isinstance(item, fx.Node) and isinstance(example_value(item), (Tensor, torch.SymInt))
            for item in (*call.score_buffers, *call.mask_buffers)
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


def _mask(
    call: FlexCall,
    scores: ModifiedScores,
    query_and_key: tuple[Tensor, Tensor],
    score_buffers: tuple[Tensor, ...],
    mask_buffers: tuple[Tensor, ...],
) -> Tensor | None:
    """The mask, bool or additive, of what broadcasts to `[batch, heads, q_len, kv_len]`. None where nothing is hidden or added."""
    query, key = query_and_key
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    indices = tuple(
        torch.arange(size, dtype=torch.int32, device=query.device)[(..., *[None] * after)]
        for size, after in zip(sizes, (3, 2, 1, 0), strict=True)
    )
    mask = None if call.hides_nothing or call.mask_mod is None else call.mask_mod(*indices, *mask_buffers)
    if scores.conditions:
        kept = scores.condition(indices, score_buffers)
        assert kept is not None
        mask = kept if mask is None else mask & kept
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(sizes[2], sizes[3])
    if scores.scored is None:
        return mask
    added = (scores.row if scores.tensor is None else scores.held)(indices, score_buffers)
    return added if mask is None else torch.where(mask, added, -math.inf)


def _result(module: fx.GraphModule) -> Any:
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0]


def _score_reason(call: FlexCall) -> str | None:
    """Why the score_mod keeps the call as it is; None where it does not."""
    scores = call.scores
    if isinstance(scores, str):
        supported = (
            "none, a sum of what depends on the key and of finite numbers of the query, bias[b, h, q, k]"
        )
        return _reason("score_mod", scores, supported)
    if scores.tensor is None:
        return None
    if scores.conditions or not call.hides_nothing:
        return _reason("score_mod", "a tensor beside a mask", "either: both would be written out")
    query, key = example_tensor(call.query), example_tensor(call.key)
    held = call.score_buffers[scores.buffers.index(scores.tensor.buffer)]
    tensor = example_tensor(held) if isinstance(held, fx.Node) else None
    if query is None or key is None or tensor is None:
        return "score_mod=operands that are no tensors"
    if tensor.dtype not in (torch.float32, query.dtype):
        return _reason("score_mod", f"a tensor of {tensor.dtype}", f"torch.float32, {query.dtype}")
    wanted = (*sizes_of(query)[:3], sizes_of(key)[2])
    dims = scores.tensor.dims
    if any(differ(size, wanted[dim]) for size, dim in zip(sizes_of(tensor)[2:], dims[2:], strict=True)) and (
        not all(isinstance(size, int) for size in (*wanted, *tensor.shape))
    ):
        return _reason("score_mod", "a tensor of another length", "lengths known while compiling")
    return None


def _beyond_elements(module: fx.GraphModule) -> str | None:
    """The first operation of a mask_mod that does not work element by element; None where all do."""
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output") and not works_by_element(node):
            return node_name(node)
    return None
