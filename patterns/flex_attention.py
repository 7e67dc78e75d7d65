"""`flex_attention`: seen and left alone. What it adds to scores and masks are programs, for a kernel of Inductor's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expansion, OpaquePattern


class FlexAttention(OpaquePattern):
    """The operator that `torch.nn.attention.flex_attention` calls, with a score_mod and a block_mask or without."""

    name = "flex_attention"

    def expand(self, node: fx.Node) -> Expansion | None:
        return None

    def closed_reasons(self, node: fx.Node) -> list[str]:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or name != "flex_attention":
            return []
        return ["flex_attention (supported: scaled_dot_product_attention; a score_mod is a program)"]

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        from torch.nn.attention.flex_attention import flex_attention

        yield flex_attention, tuple(torch.randn(1, 2, 128, 32) for _ in range(3))
