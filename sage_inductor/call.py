"""The records that flow through the stages of the pass: what a pattern finds, and what a pattern is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class AttentionCall:
    """One attention found in a graph. `node` is the node whose value is the attention output.

    query `[batch, heads, q_len, head_dim]`, key and value `[batch, kv_heads, kv_len, ...]` (batch, or batch
    and heads, may be missing), attn_mask as for `F.scaled_dot_product_attention`. An option that the graph
    computes at run time is held as its node.
    """

    node: fx.Node
    pattern: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None = None
    dropout_p: float | fx.Node = 0.0
    is_causal: bool | fx.Node = False
    scale: float | fx.Node | None = None
    enable_gqa: bool = False


class Pattern(ABC):
    """One way in which attention is written."""

    name: ClassVar[str]

    @abstractmethod
    def match(self, node: fx.Node) -> AttentionCall | None:
        """The call whose output is `node`, or None when `node` is not this idiom. Must not change the
        graph."""

    @abstractmethod
    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        """(function, inputs) pairs that hold the idiom: they feed the tests and the cache key."""


def example_value(node: fx.Node) -> Any:
    """What tracing recorded for `node`: Dynamo's `example_value`, or `val` in an exported or AOT graph."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def example_tensor(node: fx.Node | None) -> Tensor | None:
    """`example_value` when it is a tensor."""
    value = None if node is None else example_value(node)
    return value if isinstance(value, torch.Tensor) else None
