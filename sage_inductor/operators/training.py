"""`sage_inductor::attention_training`: quantised forward, exact backward (`Config(training=True)`).

The gradient is that of unquantised attention at the same inputs, a straight-through estimate: rounding has no
useful derivative. It is computed by SDPA's own backward, recomputing the forward pass, so nothing but the
inputs is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sage_inductor.graph.sizes import memory_order
from sage_inductor.kernels import AttentionParams
from sage_inductor.operators import inference
from sage_inductor.operators.unquantised import combined_mask
from sage_inductor.torch_internals import builtin_sdpa

inference.LIBRARY.define(
    f"attention_training({inference.INPUTS}, {inference.PARAMS}, int[]? memory_order=None) -> Tensor",
    tags=inference.TAGS,
)
inference.LIBRARY.define(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "bool is_causal, float? scale, bool enable_gqa, bool bottom_right, int window_left, int window_right) "
    "-> (Tensor, Tensor, Tensor)",
    tags=inference.TAGS,
)


def _attention_training(*args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = inference.attention(*args, **kwargs)
    return out


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
) -> tuple[Tensor, Tensor, Tensor]:
    params = AttentionParams(is_causal, bottom_right, window_left, window_right, scale)
    low, high = params.bounds(query.shape[-2], key.shape[-2])
    attn_mask, plain_causal = combined_mask(query, key, attn_mask, low, high)
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        output = builtin_sdpa(q, k, v, attn_mask, is_causal=plain_causal, scale=scale, enable_gqa=enable_gqa)
        grads = torch.autograd.grad(output, (q, k, v), grad_output)
    # In the strides that the traced backward was told.
    dq, dk, dv = (
        _empty_like(tensor).copy_(grad) for tensor, grad in zip((query, key, value), grads, strict=True)
    )
    return dq, dk, dv


def _fake_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
    return tuple(_empty_like(tensor) for tensor in (query, key, value))


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_permuted(
        tensor.shape, memory_order(tensor, guarded=True), dtype=tensor.dtype, device=tensor.device
    )


_SAVED = ("scale", "enable_gqa", "bottom_right", "window_left", "window_right")


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    query, key, value, attn_mask, is_causal = inputs
    ctx.save_for_backward(query, key, value, attn_mask)
    ctx.is_causal = is_causal
    ctx.params = [keyword_only_inputs[name] for name in _SAVED]


def _backward(ctx: Any, grad_output: Tensor) -> Sequence[Tensor | None]:
    query, key, value, attn_mask = ctx.saved_tensors
    grads = torch.ops.sage_inductor.attention_backward(
        grad_output, query, key, value, attn_mask, ctx.is_causal, *ctx.params
    )
    return (*grads, None, None)


def _register() -> None:
    for backend in ("CPU", "CUDA"):
        inference.LIBRARY.impl("attention_training", _attention_training, backend)
        inference.LIBRARY.impl("attention_backward", _attention_backward, backend)
    torch.library.register_fake(
        f"{inference.NAMESPACE}::attention_training", inference.fake_attention, lib=inference.LIBRARY
    )
    torch.library.register_fake(
        f"{inference.NAMESPACE}::attention_backward", _fake_backward, lib=inference.LIBRARY
    )
    torch.library.register_autograd(
        f"{inference.NAMESPACE}::attention_training",
        _backward,
        setup_context=_setup_context,
        lib=inference.LIBRARY,
    )
    op = torch.ops.sage_inductor.attention_training.default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        inference.LIBRARY.impl("attention_training", inference.autocast_rule(op, device_type), key)


_register()
attention_training = torch.ops.sage_inductor.attention_training.default
