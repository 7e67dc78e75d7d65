"""`F.scaled_dot_product_attention`, and its aten overload in exported programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.call import AttentionCall, Pattern

TARGETS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _schema(
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    attn_mask: fx.Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None: ...


SIGNATURE = inspect.signature(_schema)


class ScaledDotProductAttention(Pattern):
    """A call of SDPA itself, its arguments bound by the operator's schema."""

    name = "sdpa"

    def match(self, node: fx.Node) -> AttentionCall | None:
        if node.op != "call_function" or node.target not in TARGETS:
            return None
        bound = SIGNATURE.bind(*node.args, **node.kwargs)
        return AttentionCall(node, self.name, **bound.arguments)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        q, k, v = (torch.randn(1, 2, 16, 64) for _ in range(3))
        yield F.scaled_dot_product_attention, (q, k, v)
        yield lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)
