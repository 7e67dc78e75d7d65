"""Packed sequences, each of which attends to itself, as attention within segments: torch's `varlen_attn`, and the operators of
FlashAttention and xformers.

`ends` and `key_ends` (`cu_seqlens`) say where sequences begin; token t is of the sequence whose number is how many of them
began, without the first, until t. What stands in the graph then is SDPA with the mask of those numbers, of which the pass
makes ids.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import (
    SDPA,
    SDPA_TARGETS,
    Expansion,
    OpaquePattern,
    example_tensor,
    example_value,
    laid_out_as,
    trace,
)
from sage_inductor.graph.sizes import differ, sizes_of, strides_of
from sage_inductor.patterns import efficient_attention, flash_attention
from sage_inductor.patterns.flash_attention import PackedCall
from sage_inductor.patterns.nodes import reads_nothing
from sage_inductor.torch_internals.operators import bound_arguments, operator_name

# What `torch.nn.attention.varlen.varlen_attn` and `varlen_attn_out` call.
OPERATOR, OUT = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_out"


class VarlenAttention(OpaquePattern):
    """A call of one of the operators, whose output alone is read."""

    name = "varlen_attn"

    def expand(self, node: fx.Node) -> Expansion | None:
        call = _packed_call(node)
        if call is None or self.closed_reasons(node):
            return None
        assert call.ends is not None and call.key_ends is not None
        left, right = call.window
        items, expected = example_value(node), _output(node)
        dims, enable_gqa = expected.dim(), _has_groups(call)
        # One that the graph computes, as where head_dim is symbolic, is put in after tracing, which knows tensors only.
        scale = 1.0 if isinstance(call.scale, fx.Node) else call.scale

        def attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor) -> Any:
            q, k, v = (
                packed.reshape(1, *packed.shape[-3:]).transpose(1, 2) for packed in (query, key, value)
            )
            queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
            own = torch.searchsorted(ends[1:], queries, right=True)
            other = torch.searchsorted(key_ends[1:], keys, right=True)
            mask = own.unsqueeze(1) == other.unsqueeze(0)
            if right == 0:
                mask = mask & (keys.unsqueeze(0) <= queries.unsqueeze(1))
            elif right > 0:
                mask = mask & (keys.unsqueeze(0) - queries.unsqueeze(1) <= right)
            if left >= 0:
                mask = mask & (keys.unsqueeze(0) - queries.unsqueeze(1) >= -left)
            out = SDPA(q, k, v, mask, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)
            out = out if dims == 4 else out.squeeze(0)
            if strides_of(out) != strides_of(expected):  # the operator's own order of dims in memory
                for method, args in laid_out_as(expected):
                    out = getattr(out, method)(*args)
            return out, *([None] * (len(items) - 1))

        expansion = trace(attention, (call.query, call.key, call.value, call.ends, call.key_ends))
        if expansion is not None and isinstance(call.scale, fx.Node):
            return _scaled(expansion, call.scale)
        return expansion

    def closed_reasons(self, node: fx.Node) -> list[str]:
        name = operator_name(node.target) if node.op == "call_function" else None
        if name == OUT:
            return ["varlen_attn_out (supported: varlen_attn)"]
        call = _packed_call(node)
        if call is None or call.reasons:
            return [] if call is None else list(call.reasons)
        name = called(node)
        reasons = []
        if call.ends is None or call.key_ends is None:
            reasons.append(f"cu_seq_{'q' if call.ends is None else 'k'}=None (supported: a tensor)")
        elif counts := _different_counts(call.ends, call.key_ends):
            reasons.append(f"cu_seq_q and cu_seq_k of {counts} numbers (supported: as many in both)")
        elif call.window != (-1, -1) and call.ends is not call.key_ends:
            reasons.append(f"window of {name} with cu_seq_q and cu_seq_k apart (supported: one for both)")
        inputs = [example_tensor(item) for item in (call.query, call.key, call.value)]
        if any(tensor is None or not _is_packed(tensor) for tensor in inputs):
            reasons.append(f"shapes of {name} (supported: [total, heads, head_dim])")
        if name != self.name and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            # Around it stands a function whose backward pass takes output and log-sum-exp for exact.
            reasons.append("requires_grad=inputs (supported: none; torch.no_grad())")
        if not all(map(_reads_output_only, node.users)):
            reasons.append(f"log-sum-exp of {name} is read (supported: the output alone)")
        return reasons

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, 10, 40], dtype=torch.int32)
        yield (
            lambda q, k, v: varlen_attn(q, k, v, ends, ends, 30, 30),
            tuple(torch.randn(40, 4, 64) for _ in range(3)),
        )


def called(node: fx.Node) -> str:
    """What the user calls it by."""
    name = str(operator_name(node.target))
    return VarlenAttention.name if name in (OPERATOR, OUT) else name


def _packed_call(node: fx.Node) -> PackedCall | None:
    readers = (_of_torch, flash_attention.packed_call, efficient_attention.packed_call)
    return next((call for call in (read(node) for read in readers) if call is not None), None)


def _of_torch(node: fx.Node) -> PackedCall | None:
    if node.op != "call_function" or operator_name(node.target) != OPERATOR:
        return None
    options = bound_arguments(node.target, node.args, node.kwargs)
    left, right = options.get("window_size") or (-1, -1)
    reasons = [
        f"{name} of varlen_attn (supported: None)"
        for name in ("block_table", "seqused_k", "num_splits")
        if options.get(name) is not None
    ]
    return PackedCall(
        options["query"],
        options["key"],
        options["value"],
        options["cu_seq_q"],
        options["cu_seq_k"],
        scale=options.get("scale"),
        window=(left, 0 if options["is_causal"] else right),
        reasons=tuple(reasons),
    )


def _scaled(expansion: Expansion, scale: fx.Node) -> Expansion:
    """`expansion` with `scale` in its SDPA."""
    graph = expansion.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        placeholder = graph.placeholder("scale")
    placeholder.meta["val"] = example_value(scale)
    for node in graph.nodes:
        if node.target in SDPA_TARGETS:
            node.kwargs = {**node.kwargs, "scale": placeholder}
    return Expansion(graph, (scale, *expansion.inputs))


def _output(node: fx.Node) -> Tensor:
    output = example_value(node)[0]
    assert isinstance(output, Tensor)
    return output


def _is_packed(tensor: Tensor) -> bool:
    return tensor.dim() == 3 or (tensor.dim() == 4 and sizes_of(tensor)[0] == 1)


def _different_counts(ends: fx.Node, key_ends: fx.Node) -> str | None:
    """How many numbers two `cu_seqlens` have that are not of the same sequences, which the operators refuse."""
    counts = [tensor.shape[0] for tensor in map(example_tensor, (ends, key_ends)) if tensor is not None]
    return " and ".join(map(str, counts)) if len(counts) == 2 and differ(*counts) else None


def _has_groups(call: PackedCall) -> bool:
    query, key = example_tensor(call.query), example_tensor(call.key)
    return query is not None and key is not None and bool(sizes_of(query)[-2] != sizes_of(key)[-2])


def _reads_output_only(user: fx.Node) -> bool:
    is_item = user.op == "call_function" and user.target is operator.getitem
    return bool(is_item and user.args[1] == 0) or reads_nothing(user)
