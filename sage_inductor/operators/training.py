"""`sage_inductor::attention_training`: quantised forward, exact backward (`Config(training=True)`).

The gradient is that of unquantised attention at the same inputs, a straight-through estimate: rounding has no useful
derivative. SDPA's own backward computes it and recomputes the forward pass, so nothing but the inputs is saved.

`gradient_order` holds the memory orders of the gradients of query, key and value, one behind the other: it begins with
`[0, 1, 2, 3, 0, 2, 1, 3, ...]` where query's lies in HND and key's in NHD. It is given where users rely on the strides that SDPA
gives; without it gradients lie in memory as their inputs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.sizes import memory_order
from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.base import reason
from sage_inductor.operators import inference
from sage_inductor.operators.dispatch_rules import autocast_rule
from sage_inductor.operators.inputs import as_4d, as_segments
from sage_inductor.operators.schemas import INPUTS, LIBRARY, NAMESPACE, PARAMS, SEGMENTS, TAGS
from sage_inductor.operators.unquantised import sdpa
from sage_inductor.torch_internals.dispatch import above_autograd, has_tangent

# The segments are positional: torch registers gradients for no operator whose tensors are keywords.
_INPUTS = INPUTS.replace("*", f"{SEGMENTS}, *")
LIBRARY.define(
    f"attention_training({_INPUTS}, {PARAMS}, int[]? memory_order=None, "
    "int[]? gradient_order=None) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "bool is_causal, float? scale, bool enable_gqa, bool bottom_right, int window_left, int window_right, "
    f"int[]? gradient_order, {SEGMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _attention_training(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    *,
    gradient_order: Sequence[int] | None = None,
    **kwargs: Any,
) -> Tensor:
    if query_segments is not None or key_segments is not None:
        kwargs |= {"query_segments": query_segments, "key_segments": key_segments}
    if any(map(has_tangent, (query, key, value))):
        reasons = [reason("forward-mode tangent", "of query, key or value", "none; gradients backward")]
        raise NotEligibleError("attention_training", reasons)
    with torch.no_grad():
        out: Tensor = inference.attention(query, key, value, attn_mask, is_causal, **kwargs)
    return out


def _fake_training(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    kwargs |= {"query_segments": query_segments, "key_segments": key_segments}
    return inference.fake_attention(query, key, value, attn_mask, is_causal, **kwargs)


def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    gradient_order: Sequence[int] | None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    params = AttentionParams(is_causal, bottom_right, window_left, window_right, scale)
    # Inside a branch of torch.cond that runs eagerly, dispatch is below autograd already.
    with torch.enable_grad(), above_autograd():
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        q, k, v = map(as_4d, inputs)
        mask = None if attn_mask is None else as_4d(attn_mask)
        output = sdpa(q, k, v, mask, params, as_segments(query_segments, key_segments))
        grads = torch.autograd.grad(output, inputs, as_4d(grad_output))
    # The traced backward was told these strides.
    empty = empty_gradients((query, key, value), gradient_order)
    dq, dk, dv = (gradient.copy_(grad) for gradient, grad in zip(empty, grads, strict=True))
    return dq, dk, dv


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(empty_gradients((query, key, value), args[_GRADIENT_ORDER]))


def empty_gradients(inputs: Sequence[Tensor], order: Sequence[int] | None) -> list[Tensor]:
    """Tensors for the gradients of query, key and value, in `gradient_order`."""
    dims = inputs[0].dim()
    orders = (
        [memory_order(tensor, guarded=True) for tensor in inputs]
        if order is None
        else [list(order[start : start + dims]) for start in range(0, 3 * dims, dims)]
    )
    return [
        torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
        for tensor, order in zip(inputs, orders, strict=True)
    ]


_GRADIENT_ORDER = 7  # where it stands behind value in the schema of the backward
_SAVED = ("scale", "enable_gqa", "bottom_right", "window_left", "window_right", "gradient_order")


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    query, key, value, attn_mask, is_causal, query_segments, key_segments = inputs
    ctx.save_for_backward(query, key, value, attn_mask, query_segments, key_segments)
    ctx.is_causal = is_causal
    ctx.params = [keyword_only_inputs[name] for name in _SAVED]


def _backward(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    query, key, value, attn_mask, *segments = ctx.saved_tensors
    grads = torch.ops.sage_inductor.attention_backward(
        grad_output, query, key, value, attn_mask, ctx.is_causal, *ctx.params, *segments
    )
    return (*grads, None, None, None, None)


def _register() -> None:
    for backend in ("CPU", "CUDA"):
        LIBRARY.impl("attention_training", _attention_training, backend)
        LIBRARY.impl("attention_backward", _attention_backward, backend)
    torch.library.register_fake(f"{NAMESPACE}::attention_training", _fake_training, lib=LIBRARY)
    torch.library.register_fake(f"{NAMESPACE}::attention_backward", _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::attention_training",
        _backward,
        setup_context=_setup_context,
        lib=LIBRARY,
    )
    op = torch.ops.sage_inductor.attention_training.default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl("attention_training", autocast_rule(op, device_type), key)


_register()
attention_training = torch.ops.sage_inductor.attention_training.default
