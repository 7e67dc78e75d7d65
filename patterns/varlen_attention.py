"""`varlen_attn`: packed sequences, each of which attends to itself, as attention within segments.

`cu_seq_q` and `cu_seq_k` say where sequences begin; token t is of the sequence whose number is how many of them began, without
the first, until t. What stands in the graph then is SDPA with the mask of those numbers, of which the pass makes ids.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import SDPA, Expansion, OpaquePattern, example_tensor, trace
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.patterns.nodes import reads_nothing
from sage_inductor.torch_internals.operators import bound_arguments

# What `torch.nn.attention.varlen.varlen_attn` and `varlen_attn_out` call.
OPERATOR, OUT = "torch_attn._varlen_attn", "torch_attn._varlen_attn_out"


class VarlenAttention(OpaquePattern):
    """The operator that `torch.nn.attention.varlen` calls."""

    name = "varlen_attn"

    def expand(self, node: fx.Node) -> Expansion | None:
        if _operator(node) != OPERATOR or self.closed_reasons(node):
            return None
        options = bound_arguments(node.target, node.args, node.kwargs)
        inputs = tuple(options[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
        left, right = _window(options)
        scale, enable_gqa = options.get("scale"), _has_groups(options)

        def attention(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor) -> Any:
            q, k, v = (packed.unsqueeze(0).transpose(1, 2) for packed in (query, key, value))
            queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
            own = torch.searchsorted(cu_seq_q[1:], queries, right=True)
            other = torch.searchsorted(cu_seq_k[1:], keys, right=True)
            mask = own.unsqueeze(1) == other.unsqueeze(0)
            if right == 0:
                mask = mask & (keys.unsqueeze(0) <= queries.unsqueeze(1))
            elif right > 0:
                mask = mask & (keys.unsqueeze(0) - queries.unsqueeze(1) <= right)
            if left >= 0:
                mask = mask & (keys.unsqueeze(0) - queries.unsqueeze(1) >= -left)
            out = SDPA(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
            return out.transpose(1, 2).squeeze(0), None, None

        return trace(attention, inputs)

    def closed_reasons(self, node: fx.Node) -> list[str]:
        name = _operator(node)
        if name == OUT:
            return ["varlen_attn_out (supported: varlen_attn)"]
        if name != OPERATOR:
            return []
        options = bound_arguments(node.target, node.args, node.kwargs)
        reasons = [
            f"{name} of varlen_attn (supported: None)"
            for name in ("block_table", "seqused_k", "num_splits")
            if options.get(name) is not None
        ]
        if options["cu_seq_k"] is None:
            reasons.append("cu_seq_k=None (supported: a tensor)")
        elif _window(options) != (-1, -1) and options["cu_seq_q"] is not options["cu_seq_k"]:
            reasons.append("window of varlen_attn with cu_seq_q and cu_seq_k apart (supported: one for both)")
        if not all(map(_reads_output_only, node.users)):
            reasons.append("log-sum-exp of varlen_attn is read (supported: the output alone)")
        return reasons

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, 10, 40], dtype=torch.int32)
        yield (
            lambda q, k, v: varlen_attn(q, k, v, ends, ends, 30, 30),
            tuple(torch.randn(40, 4, 64) for _ in range(3)),
        )


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "overloadpacket", target)) if node.op == "call_function" else ""


def _window(options: dict[str, Any]) -> tuple[int, int]:
    left, right = options.get("window_size") or (-1, -1)
    return (left, 0) if options["is_causal"] else (left, right)


def _has_groups(options: dict[str, Any]) -> bool:
    query, key = example_tensor(options["query"]), example_tensor(options["key"])
    return query is not None and key is not None and bool(sizes_of(query)[1] != sizes_of(key)[1])


def _reads_output_only(user: fx.Node) -> bool:
    is_item = user.op == "call_function" and user.target is operator.getitem
    return bool(is_item and user.args[1] == 0) or reads_nothing(user)
