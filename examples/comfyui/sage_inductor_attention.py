"""A node for ComfyUI: 8-bit attention of sage_inductor for the model that passes through it. Copy this file to custom_nodes/.

It sets `transformer_options["optimized_attention_override"]`, which ComfyUI calls in the place of its own attention. What the
kernels cannot or should not take goes to ComfyUI's own attention: a CPU, a model that asks for float32 or for no low
precision, sizes at which SDPA is faster (kernel "auto"), and options that this file does not know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sage_inductor import sage_attention

log = logging.getLogger(__name__)

KERNELS = ("auto", "hopper", "triton", "sageattention", "reference")
PRECISIONS = ("auto", "fast", "balanced", "accurate")
# What ComfyUI's attention functions are called with beside query, key, value and heads.
MASK, UPCAST, ANY_LOW_PRECISION = "mask", "attn_precision", "low_precision_attention"
SHAPES = ("skip_reshape", "skip_output_reshape")
PASSED_ON = ("scale", "enable_gqa")
WITHOUT_MEANING = ("transformer_options", "_inside_attn_wrapper")
POSITIONS = ("q", "k", "v", "heads", MASK, UPCAST, *SHAPES)

ROUNDING = 1e-5

_said: set[str] = set()


def make_override(
    kernel: str = "auto", precision: str = "auto", sigmas: tuple[float, float] | None = None
) -> Callable[..., Tensor]:
    """The override. `sigmas`: (highest, lowest) between which steps run in 8 bits; None for all."""

    def override(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(POSITIONS, args, strict=False)), **kwargs}
        if len(args) > len(POSITIONS) or reason_against(given, kernel, sigmas):
            return original(*args, **kwargs)
        q, k, v = (
            heads_apart(given[name], given["heads"], bool(given.get("skip_reshape"))) for name in "qkv"
        )
        options = {name: given[name] for name in PASSED_ON if given.get(name) is not None}
        out = attend(q, k, v, four_dims(given.get(MASK)), kernel=kernel, precision=precision, **options)
        return out if given.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    return override


def reason_against(given: dict[str, Any], kernel: str, sigmas: tuple[float, float] | None) -> str:
    """Why a call goes to ComfyUI's own attention; "" where it does not."""
    known = (*POSITIONS, ANY_LOW_PRECISION, *PASSED_ON, *WITHOUT_MEANING)
    unknown = [name for name, value in given.items() if name not in known and value is not None]
    if unknown:
        if unknown[0] not in _said:
            _said.add(unknown[0])
            log.warning(
                "attention with %s stays ComfyUI's own: the node does not know it", ", ".join(unknown)
            )
        return "unknown options"
    if given.get(ANY_LOW_PRECISION) is False:
        return "the model asks for no low precision"
    q = given["q"]
    if given.get(UPCAST) == torch.float32 and q.dtype != torch.float32:
        return "the model asks for float32"
    if kernel == "auto" and not q.is_cuda:
        return "not on a GPU"
    if sigmas is not None:
        options = given.get("transformer_options") or {}
        sigma = options.get("sigmas")
        # Sigmas of a sampler are float32: one at the end of the range is in it.
        if (
            sigma is not None
            and not sigmas[0] + ROUNDING >= float(sigma.flatten()[0]) >= sigmas[1] - ROUNDING
        ):
            return "a step outside of the range"
    return ""


def heads_apart(tensor: Tensor, heads: int, are_apart: bool) -> Tensor:
    """`[batch, tokens, heads * dim]` as `[batch, heads, tokens, dim]`, which it is already where `are_apart`."""
    return tensor if are_apart else tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def four_dims(mask: Tensor | None) -> Tensor | None:
    """`[queries, keys]` and `[batch, queries, keys]` with the dims that are missing."""
    if mask is not None and mask.dim() == 2:
        mask = mask[None]
    return mask[:, None] if mask is not None and mask.dim() == 3 else mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """`sage_attention` of all heads at once, or where memory runs out of half of them after the other. Its copies of query,
    key and value in 8 bits take about half of what they take themselves."""
    try:
        out = sage_attention(q, k, v, mask, **options)
        assert isinstance(out, Tensor)
        return out
    except torch.OutOfMemoryError:
        if k.shape[1] < 2:
            raise
    if q.is_cuda:
        torch.cuda.empty_cache()
    halves = []
    for part in range(2):
        query, key, value = (tensor.chunk(2, 1)[part] for tensor in (q, k, v))
        of_heads = mask if mask is None or mask.shape[1] == 1 else mask.chunk(2, 1)[part]
        halves.append(attend(query, key, value, of_heads, **options))
    return torch.cat(halves, 1)


class SageInductorAttention:
    """MODEL in, MODEL out."""

    CATEGORY = "model_patches/attention"
    DESCRIPTION = "8-bit attention (sage_inductor) for this model."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "kernel": (
                    list(KERNELS),
                    {"tooltip": "auto: the fastest kernel, and ComfyUI's own without a GPU"},
                ),
                "precision": (list(PRECISIONS), {"tooltip": "auto: the fastest that the GPU has"}),
                "start_percent": ("FLOAT", {"default": 0.0, **percent, "tooltip": "8 bits from here"}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent, "tooltip": "to here; exact outside"}),
            }
        }

    def patch(
        self,
        model: Any,
        kernel: str,
        precision: str,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> tuple[Any]:
        patched = model.clone()
        sigmas = None
        if (start_percent, end_percent) != (0.0, 1.0):
            sampling = patched.get_model_object("model_sampling")
            sigmas = (
                float(sampling.percent_to_sigma(start_percent)),
                float(sampling.percent_to_sigma(end_percent)),
            )
        options = patched.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = make_override(kernel, precision, sigmas)
        return (patched,)


NODE_CLASS_MAPPINGS = {"SageInductorAttention": SageInductorAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"SageInductorAttention": "8-bit Attention (sage_inductor)"}
