"""Rules by which the operators of this room are dispatched: one at autograd's key, one at autocast's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sage_inductor.torch_internals.dispatch import below_autograd, has_tangent, past_autocast, runs_eagerly


def autograd_rule(op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The rule at autograd's key. A call that computes numbers goes straight to `implementation`, which looks for itself at whether
    gradients are wanted. A trace records `op` where they are not wanted, and exact attention where they are."""

    def rule(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = (query, key, value, *args, *kwargs.values())
        if runs_eagerly(tensors) or any(map(_wants_gradients, tensors)):
            return implementation(query, key, value, *args, **kwargs)
        with below_autograd():
            return op(query, key, value, *args, **kwargs)

    return rule


def _wants_gradients(item: object) -> bool:
    return isinstance(item, Tensor) and (
        (item.requires_grad and torch.is_grad_enabled()) or has_tangent(item)
    )


def autocast_rule(op: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The rule at autocast's key. Query, key and value are cast, unless they are float64.

    A float mask keeps its dtype if that is float32 or the autocast dtype, and becomes float32 otherwise: scores that a model adds a
    mask to by hand are promoted so far. SDPA's own rule casts masks, too; a caller that stands for SDPA does that first
    (`cast_as_sdpa`)."""
    past_rules = past_autocast(device_type)

    def rule(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.dtype == torch.float64:
                return tensor
            return tensor.to(dtype) if tensor.device.type == device_type else tensor

        query, key, value = cast(query), cast(key), cast(value)
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            attn_mask = attn_mask.float()
        with past_rules():
            return op(query, key, value, attn_mask, *args, **kwargs)

    return rule


def cast_as_sdpa(attn_mask: Tensor | None) -> Tensor | None:
    """`attn_mask` as SDPA reads it. Under autocast a float mask is cast to the autocast dtype, unless it is float64."""
    if attn_mask is None or not attn_mask.is_floating_point() or attn_mask.dtype == torch.float64:
        return attn_mask
    device_type = attn_mask.device.type
    # Asked for a device that has none (meta), torch raises.
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return attn_mask
    return attn_mask.to(torch.get_autocast_dtype(device_type))
