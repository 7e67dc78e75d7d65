"""`varlen_attn`: seen and left alone. The graph's operator takes sequences of one length; packed ones have a kernel that is
called directly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expansion, OpaquePattern

# What `torch.nn.attention.varlen.varlen_attn` and `varlen_attn_out` call.
OPERATORS = ("torch_attn._varlen_attn", "torch_attn._varlen_attn_out")


class VarlenAttention(OpaquePattern):
    """The operator that `torch.nn.attention.varlen` calls, with packed or paged keys."""

    name = "varlen_attn"

    def expand(self, node: fx.Node) -> Expansion | None:
        return None

    def closed_reasons(self, node: fx.Node) -> list[str]:
        target: Any = node.target
        name = str(getattr(target, "overloadpacket", target))
        if node.op != "call_function" or name not in OPERATORS:
            return []
        return [
            "varlen_attn (supported: scaled_dot_product_attention; "
            "sage_inductor.kernels.triton.attention_varlen, called directly, takes packed sequences)"
        ]

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, 10, 40], dtype=torch.int32)
        yield (
            lambda q, k, v: varlen_attn(q, k, v, ends, ends, 30, 30),
            tuple(torch.randn(40, 4, 64) for _ in range(3)),
        )
