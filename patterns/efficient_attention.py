"""xformers' memory-efficient attention, which calls PyTorch's own copy of the CUTLASS kernel by its operator.

Inputs are `[batch, seq, heads, head_dim]`. `custom_mask_type` 1 is causal at the upper left, 2 at the lower right; with a
`window_size` w query i sees keys i - w + 1 .. i of those. The LSE is that of the fused kernel "efficient"
(fused_attention.py). Packed sequences are read in varlen_attention.py.

`aten::_efficient_attention_forward` is what xformers calls since 0.0.29, `xformers::efficient_attention_forward_cutlass` what it
called before that, with the same arguments (ops/fmha/cutlass.py, csrc/attention/attention.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import (
    AttentionCall,
    Band,
    Expansion,
    Expr,
    LseForm,
    OpaquePattern,
    Pattern,
    Standing,
    example_tensor,
    example_value,
)
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.patterns.flash_attention import PackedCall, called, dropout_reasons, items_read, running
from sage_inductor.patterns.fused_attention import lse_steps
from sage_inductor.torch_internals.operators import operator_name

OPERATORS = ("aten::_efficient_attention_forward", "xformers::efficient_attention_forward_cutlass")
_READ = {
    *(
        "query",
        "key",
        "value",
        "bias",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "dropout_p",
    ),
    *("custom_mask_type", "compute_log_sumexp", "scale", "seqlen_k", "window_size"),
}
_NO_MASK, _UPPER_LEFT, _LOWER_RIGHT = 0, 1, 2


class EfficientAttention(Pattern, OpaquePattern):
    """A call of one of `OPERATORS` whose output is read, and its LSE or not."""

    name = "efficient_attention"

    def match(self, node: fx.Node) -> AttentionCall | None:
        given = _dense(node)
        if given is None or self.closed_reasons(node):
            return None
        inputs = [given[name] for name in ("query", "key", "value")]
        query, key, value = (Expr.of("transpose", item, 1, 2) for item in inputs)
        swap = (("transpose", (1, 2)),)
        window = _window(given)
        aligned = given["custom_mask_type"] == _LOWER_RIGHT or window[0] >= 0
        form = LseForm(is_read=False)
        if 1 in items_read(node):
            lse = example_value(node)[1]
            form = LseForm(True, lse_steps(lse, query.value) or (), lse)
        return AttentionCall(
            node,
            self.name,
            query,
            key,
            value,
            attn_mask=given["bias"],
            is_causal=given["custom_mask_type"] == _UPPER_LEFT and not aligned,
            scale=given["scale"],
            restore=swap,
            undo=swap,
            lse=form,
            band=Band(*window) if aligned else None,
            standing=Standing(str(operator_name(node.target)), running(node, inputs)),
        )

    def expand(self, node: fx.Node) -> Expansion | None:
        return None

    def closed_reasons(self, node: fx.Node) -> list[str]:
        given = _dense(node)
        return [] if given is None else _reasons_of_arguments(given) or _reasons_of_values(node, given)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            options = (None, None, None, None, None, 0.0, 1)
            return torch.ops.xformers.efficient_attention_forward_cutlass(q, k, v, *options)[0]

        yield attend, tuple(torch.randn(1, 16, 2, 64) for _ in range(3))


def packed_call(node: fx.Node) -> PackedCall | None:
    """`node` as a call on packed sequences; None where it is none."""
    given = called(node, OPERATORS)
    if given is None or not _is_packed(given):
        return None
    reasons = _reasons_of_arguments(given)
    if given["bias"] is not None:
        reasons.append("bias beside packed sequences (supported: None)")
    return PackedCall(
        given["query"],
        given["key"],
        given["value"],
        given["cu_seqlens_q"],
        given["cu_seqlens_k"],
        scale=given["scale"],
        window=(-1, -1) if reasons else _window(given),
        reasons=tuple(reasons),
    )


def _dense(node: fx.Node) -> dict[str, Any] | None:
    given = called(node, OPERATORS)
    return None if given is None or _is_packed(given) else given


def _is_packed(given: dict[str, Any]) -> bool:
    return given.get("cu_seqlens_q") is not None or given.get("cu_seqlens_k") is not None


def _window(given: dict[str, Any]) -> tuple[int, int]:
    size = given["window_size"]
    return (size - 1 if size else -1, -1 if given["custom_mask_type"] == _NO_MASK else 0)


def _reasons_of_arguments(given: dict[str, Any]) -> list[str]:
    unknown = given.keys() ^ _READ
    if unknown:
        return [f"arguments={', '.join(sorted(unknown))} (supported: those of xformers 0.0.27 and later)"]
    reasons = dropout_reasons(given["dropout_p"])
    kind, size = given["custom_mask_type"], given["window_size"]
    if isinstance(kind, fx.Node):
        reasons.append("custom_mask_type=a number of the graph (supported: one known while compiling)")
    elif kind not in (_NO_MASK, _UPPER_LEFT, _LOWER_RIGHT):
        reasons.append(f"custom_mask_type={kind} (supported: 0, 1, 2)")
    if size is not None and (not isinstance(size, int) or (size > 0 and kind == _NO_MASK)):
        reasons.append(
            f"window_size={size} beside custom_mask_type={kind} (supported: a number beside 1 or 2)"
        )
    if given["seqlen_k"] is not None:
        reasons.append("seqlen_k=a tensor (supported: None; padded keys are read by its own kernel)")
    return reasons


def _reasons_of_values(node: fx.Node, given: dict[str, Any]) -> list[str]:
    query, key, value = (example_tensor(given[name]) for name in ("query", "key", "value"))
    items = example_value(node)
    if query is None or key is None or value is None or not isinstance(items, (tuple, list)):
        return ["shapes=unknown (supported: those that tracing recorded)"]
    reasons = []
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return ["shapes=not those of query, key and value (supported: [batch, seq, heads, head_dim])"]
    if any(tensor.requires_grad for tensor in (query, key, value)):
        # A function of xformers stands around it, whose backward pass takes output and LSE for exact.
        reasons.append("requires_grad=inputs (supported: none; torch.no_grad())")
    kind, size = given["custom_mask_type"], given["window_size"]
    if given["bias"] is not None and kind != _NO_MASK:
        reasons.append(f"bias beside custom_mask_type={kind} (supported: one of them)")
    lengths = sizes_of(query)[1], sizes_of(key)[1]
    if kind == _UPPER_LEFT and size and lengths[0] != lengths[1]:
        reasons.append("window_size beside custom_mask_type=1 (supported: as many queries as keys)")
    read = items_read(node)
    if read - {0, 1}:
        reasons.append("read=what belongs to a backward pass (supported: the output and its LSE)")
    shorter = all(isinstance(length, int) for length in lengths) and lengths[0] <= lengths[1]
    if 1 in read and kind == _LOWER_RIGHT and lengths[0] != lengths[1] and not shorter:
        reasons.append("logsumexp=read where queries may see no key (supported: no more queries than keys)")
    if 1 in read and lse_steps(items[1], query.transpose(1, 2)) is None:
        reasons.append(
            "logsumexp=of another form, or length (supported: compute_log_sumexp=True, a length that is known)"
        )
    return reasons
