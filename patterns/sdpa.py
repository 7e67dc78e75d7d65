"""`F.scaled_dot_product_attention`, and its aten overload in exported programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import SDPA, SDPA_TARGETS, AttentionCall, Expr, Pattern, example_tensor
from sage_inductor.graph.sizes import is_dense
from sage_inductor.graph.surroundings import Surroundings
from sage_inductor.patterns.heads import folded, folded_mask, same_batch
from sage_inductor.patterns.nodes import shape_of


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
    under_transforms = True

    def match(self, node: fx.Node) -> AttentionCall | None:
        if node.op != "call_function" or node.target not in SDPA_TARGETS:
            return None
        bound = SIGNATURE.bind(*node.args, **node.kwargs)
        return AttentionCall(node, self.name, **bound.arguments)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        q, k, v = (torch.randn(1, 2, 16, 64) for _ in range(3))
        yield SDPA, (q, k, v)
        yield lambda q, k, v: SDPA(q, k, v, is_causal=True), (q, k, v)


def as_autocast_reads(call: AttentionCall, around: Surroundings) -> AttentionCall:
    """`call` with its mask in the dtype in which SDPA reads it: autocast casts float masks as it does queries, so that the
    lowest float32 becomes -inf. Attention by hand is left as it is: its own nodes say what is cast."""
    mask, query, output = (example_tensor(item) for item in (call.attn_mask, call.query, call.node))
    if (
        call.node.target not in SDPA_TARGETS
        or mask is None
        or query is None
        or output is None
        or around.transforms
    ):
        return call
    cast = query.dtype != output.dtype or around.autocast_dtype(output.device.type) == output.dtype
    if not cast or not mask.is_floating_point() or mask.dtype in (torch.float64, output.dtype):
        return call
    return replace(call, attn_mask=Expr.of("to", call.attn_mask, output.dtype))


class ManyDims(ScaledDotProductAttention):
    """A call of five dims and more, or one whose batch is broadcast, which no kernel takes."""

    under_transforms = False

    def match(self, node: fx.Node) -> AttentionCall | None:
        call = super().match(node)
        return None if call is None else _folded(call)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        yield SDPA, tuple(torch.randn(1, 2, 3, 16, 64) for _ in range(3))


def _folded(call: AttentionCall) -> AttentionCall | None:
    """`call` with all dims but the first and the last two as heads; of four dims with one batch for all."""
    output, inputs = example_tensor(call.node), (call.query, call.key, call.value)
    if output is None or {len(shape_of(item)) for item in inputs} != {output.dim()}:
        return None
    if output.dim() < 5:
        query, key, value = same_batch(*inputs)
        changed = (query, key, value) != inputs
        return replace(call, query=query, key=key, value=value) if changed else None
    if call.enable_gqa or not is_dense(output):
        return None
    grouped = folded(*inputs)
    if grouped is None or shape_of(call.query)[:-2] != shape_of(call.node)[:-2]:
        return None
    mask = call.attn_mask
    if mask is not None:
        mask = folded_mask(mask, (*shape_of(call.query)[:-1], shape_of(call.key)[-2]))
        if mask is None:
            return None
    return replace(
        call,
        attn_mask=mask,
        query=grouped.query,
        key=grouped.key,
        value=grouped.value,
        enable_gqa=grouped.enable_gqa,
        restore=grouped.restore,
        undo=grouped.undo,
    )
