"""The attention function of a registered name.

Three ways lead on from a call:

- *quantised*: our operator, which is exact where it finds that quantising does not pay;
- the *library's*: transformers' function of "sdpa". What is exact goes there, and what our backend compiles: it finds SDPA calls
  and decides by its own options;
- *by hand*: `eager_attention_forward` of the model's module, for what the other two do not compute, such as softcaps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.integrations.transformers.chosen import chosen_keys, within
from sage_inductor.integrations.transformers.compiling import is_compiled_by_our_pass
from sage_inductor.integrations.transformers.masks import additive, causal, with_bias
from sage_inductor.kernels.base import reason
from sage_inductor.operators import inference, training
from sage_inductor.operators.dispatch_rules import cast_as_sdpa
from sage_inductor.operators.functional import refuse_context_parallel
from sage_inductor.operators.sharded import are_taught, is_dtensor
from sage_inductor.torch_internals.dispatch import has_tangent

NHD = (0, 2, 1, 3)  # models turn the output into [batch, seq, heads, head_dim], which then is no copy
ONE_QUERY = "q_len=1 (supported: 2 and more; a decode step is bound by reading K and V, not by arithmetic)"
# Arguments of `eager_attention_forward`, over all models, that each of the ways knows, or that the mask has seen to.
_KNOWN = frozenset(
    ("module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "position_bias")
    + ("s_aux", "sinks", "sliding_window", "softcap")
)

AttentionResult = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Call:
    """A call as the model makes it. query `[batch, heads, q_len, head_dim]`; key, value `[batch, kv_heads, kv_len, ...]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    """Bool or additive, broadcasts to `[batch, heads, q_len, kv_len]`. None: all keys, or causality alone."""
    is_causal: bool
    """Whether query i sees the keys up to `kv_len - q_len + i`. Only without a mask, and with several queries."""
    position_bias: Tensor | None
    sink: Tensor | None
    """Broadcasts to `[batch, heads, q_len]`."""
    dropout: float
    scaling: float | None
    by_hand: Callable[..., AttentionResult] | None
    needs_hand: list[str]
    """Why nothing but attention by hand computes it."""
    options: dict[str, Any]


def make_forward(config: Config) -> Callable[..., AttentionResult]:
    """What transformers' `AttentionInterface` calls, with `config`."""

    def sage_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **options: Any,
    ) -> AttentionResult:
        """The output `[batch, q_len, heads, head_dim]`; the weights where attention was computed by hand, else None."""
        if options.get("cache") is not None:
            key, value = _paged(module, key, value, options)
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        chosen = chosen_keys(module, query, key, options)
        if chosen is not None:
            if attention_mask is None and is_causal:
                attention_mask = causal(query, key)
            attention_mask = within(attention_mask, chosen)
        if (
            query.shape[2] == 1 or attention_mask is not None
        ):  # branches: an expression would be a number of the graph
            is_causal = False
        by_hand = _by_hand_of(module)
        call = _Call(
            module, query, key, value, attention_mask, is_causal, position_bias, _sink(options), dropout, scaling,
            by_hand, _needs_hand(by_hand, options), options,
        )  # fmt: skip
        if not is_compiled_by_our_pass():
            reasons = _exact_reasons(call, config)
            if not reasons:
                return _quantised(call, config)
            if config.fallback == "error" and reasons != [ONE_QUERY]:
                raise NotEligibleError(f"attention of {type(module).__name__}", reasons)
        if call.needs_hand or call.sink is not None:
            return _by_hand(call)
        return _by_library(call)

    return sage_attention_forward


def _paged(module: nn.Module, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys and values of continuous batching, with those of its cache."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    if not isinstance(options["cache"], PagedAttentionCache):
        return key, value
    cache: Any = options.pop("cache")
    layer: Any = module.layer_idx
    updated: tuple[Tensor, Tensor] = cache.update(
        key_states=key, value_states=value, layer_idx=layer, kwargs=options
    )
    return updated


def _sink(options: dict[str, Any]) -> Tensor | None:
    """The logits beside those of the keys: one a head (gpt-oss), or one a query (Inkling), which come as `[..., 1]`."""
    if (of_heads := options.get("s_aux")) is not None:
        return of_heads[:, None]  # type: ignore[no-any-return]
    if (of_queries := options.get("sinks")) is not None:
        return of_queries.squeeze(-1)  # type: ignore[no-any-return]
    return None


def _by_hand_of(module: nn.Module) -> Callable[..., AttentionResult] | None:
    """`eager_attention_forward` beside the class of `module`, or beside one that it is derived from."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _needs_hand(by_hand: Callable[..., AttentionResult] | None, options: dict[str, Any]) -> list[str]:
    reasons = []
    if options.get("softcap") is not None:
        reasons.append(reason("softcap", options["softcap"], "none"))
    if options.get("output_attentions"):
        reasons.append(reason("output_attentions", True, False))
    code: Any = getattr(by_hand, "__code__", None)
    if code is not None:
        named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        strange = [name for name in named if name not in _KNOWN and options.get(name) is not None]
        reasons += [
            reason("argument", name, "those of transformers' attention functions") for name in strange
        ]
    return reasons


def _exact_reasons(call: _Call, config: Config) -> list[str]:
    """Why `call` is not for a quantised kernel, whichever. What one kernel cannot do, the operator finds."""
    if call.query.shape[2] == 1:
        return [ONE_QUERY]
    reasons = list(call.needs_hand)
    if call.dropout > 0.0:
        reasons.append(reason("dropout_p", call.dropout, 0.0))
    if call.query.shape[0] != call.key.shape[0]:
        batches = [call.query.shape[0], call.key.shape[0]]
        reasons.append(reason("batch", batches, "alike for query, key and value"))
    if config.kernel == "auto" and call.query.device.type == "cpu":
        reasons.append(reason("device", "cpu", "cuda; or a kernel named"))
    if torch.is_grad_enabled():
        reasons += _gradient_reasons(call, config)
    inputs = (call.query, call.key, call.value, call.mask, call.position_bias, call.sink)
    if any(tensor is not None and has_tangent(tensor) for tensor in inputs):
        reasons.append(reason("forward-mode tangent", True, "none"))
    return reasons


def _gradient_reasons(call: _Call, config: Config) -> list[str]:
    added = [tensor for tensor in (call.mask, call.position_bias, call.sink) if tensor is not None]
    if any(tensor.requires_grad for tensor in added):
        return [
            reason("requires_grad", "mask, position bias or sink", "query, key and value, with training=True")
        ]
    if not any(tensor.requires_grad for tensor in (call.query, call.key, call.value)):
        return []
    if call.sink is not None:
        return [reason("requires_grad", "output", "none beside an attention sink; torch.no_grad()")]
    if not config.training:
        return [reason("requires_grad", "output", "none; torch.no_grad() or training=True")]
    if config.skip_threshold:
        return [reason("skip_threshold", config.skip_threshold, "0 where gradients are wanted")]
    return []


def _quantised(call: _Call, config: Config) -> AttentionResult:
    refuse_context_parallel()
    query, key = call.query, call.key
    mask, is_causal = _mask_with_bias(call)
    options: dict[str, Any] = {
        "scale": call.scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_name": config.kernel,
        "precision": config.precision,
        "smoothing": config.smoothing,
        # A named kernel that does not take these sizes raises its reasons, or the call is exact.
        "or_exact": config.fallback != "error",
        "memory_order": NHD,
    }
    if is_causal and query.shape[2] != key.shape[2]:
        options["bottom_right"] = True
    if call.sink is not None:
        options["sink"] = call.sink
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, call.value))
    if is_dtensor(query):
        are_taught()
    operator = training.attention_training if wanted else inference.attention
    if not wanted:
        options |= {"skip_threshold": config.skip_threshold, "skip_by": config.skip_by}
    out = operator(query, key, call.value, cast_as_sdpa(mask), is_causal, **options)
    return out.transpose(1, 2).contiguous(), None


def _mask_with_bias(call: _Call) -> tuple[Tensor | None, bool]:
    """(mask, is_causal) of `call`, its position bias in the mask."""
    if call.position_bias is None:
        return call.mask, call.is_causal
    mask = causal(call.query, call.key) if call.is_causal else call.mask
    return with_bias(mask, call.position_bias), False


def _by_hand(call: _Call) -> AttentionResult:
    if call.by_hand is None:
        wanting = "; ".join(call.needs_hand) or "an attention sink"
        raise NotImplementedError(
            f"{type(call.module).__name__}: {wanting}, and no eager_attention_forward beside the class "
            '(valid: attn_implementation="eager")'
        )
    mask = causal(call.query, call.key) if call.is_causal else call.mask
    options = dict(call.options)
    if call.position_bias is not None:
        options["position_bias"] = call.position_bias
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    return call.by_hand(
        call.module, call.query, call.key, call.value, additive(mask, call.query.dtype), dropout=call.dropout,
        scaling=scaling, **options,
    )  # fmt: skip


def _by_library(call: _Call) -> AttentionResult:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask, is_causal = _mask_with_bias(call)
    if is_causal and call.query.shape[2] != call.key.shape[2]:
        # Without a mask it would let causality start at the first key.
        mask, is_causal = causal(call.query, call.key), False
    result: AttentionResult = sdpa_attention_forward(
        call.module, call.query, call.key, call.value, mask, dropout=call.dropout, scaling=call.scaling,
        is_causal=is_causal, **call.options,
    )  # fmt: skip
    return result
