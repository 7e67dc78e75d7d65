"""The operators that graphs contain. This module imports torch only; kernels load when they first run.

    sage_inductor::attention        -> output
    sage_inductor::attention.out    -> nothing; writes into `output` (Dynamo takes no strided argument called out)
    sage_inductor::attention_lse    -> output and LSE

Inputs that need gradients get exact attention, which autograd records as it records SDPA. The quantised forward pass with
gradients is another operator, `sage_inductor::attention_training` (training.py).

`_run` looks up what calls of a kind come down to. At autograd's key stands the implementation itself: to dispatch a call a
second time would cost 4.3 us, half of what a call costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, Segments
from sage_inductor.kernels.base import (
    Prepared,
    gradient_problem,
    mark_written,
    output_problem,
    without_keys,
)
from sage_inductor.kernels.cache import Cache
from sage_inductor.kernels.skipping import decider_problem, threshold_problem
from sage_inductor.operators.dispatch_rules import autocast_rule, autograd_rule
from sage_inductor.operators.inputs import (
    as_4d,
    as_segments,
    empty_lse,
    empty_output,
    make_problem,
)
from sage_inductor.operators.schemas import EXACT, LIBRARY, NAMESPACE, WIRES
from sage_inductor.operators.unquantised import exact_lse, sdpa
from sage_inductor.operators.validation import misfit, validate
from sage_inductor.torch_internals.dispatch import in_forward_ad


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    sink: Tensor | None = None,
    **options: Any,
) -> Tensor:
    out, lse = _run(query, key, value, attn_mask, is_causal, None, sink is not None, sink, **options)
    if sink is None:
        return out
    assert lse is not None
    # What of all weight the keys have: exp(lse) / (exp(lse) + exp(sink)).
    weight = torch.sigmoid(lse - sink).unsqueeze(-1)
    return (out * weight).to(out.dtype) if weight.requires_grad else out.mul_(weight)


def _attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    output: Tensor,
    **options: Any,
) -> None:
    read = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    segments = {name: options.get(name) for name in ("query_segments", "key_segments")}
    if problem := output_problem(output, **read, **segments):
        raise misfit(problem)
    _run(query, key, value, attn_mask, is_causal, output, False, None, **options)
    mark_written(output)


def _attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out, lse = _run(query, key, value, attn_mask, is_causal, None, True, None, **options)
    assert lse is not None
    return out, lse


class _Resolved(NamedTuple):
    """What all calls of one kind come down to. Calls are of one kind where shapes, strides, dtypes, devices and options are the
    same."""

    run: Prepared | None  # None: exact attention
    params: AttentionParams
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]


# Each kind is worked out once: the checks, and the numbers that kernels take, cost more than the launches.
_resolved: Cache[tuple[Any, ...], _Resolved] = Cache(4096)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    out: Tensor | None,
    return_lse: bool,
    sink: Tensor | None,
    *,
    memory_order: Sequence[int] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    kernel_name: str = "auto",
    precision: str = "fast",
    min_q_len: int = 0,
    min_kv_len: int = 0,
    or_exact: bool = False,
    smoothing: str = "auto",
    wires: str = "inputs",
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    left_is_bound: bool = False,
    skip_threshold: float = 0.0,
    skip_by: str = "scores",
) -> tuple[Tensor, Tensor | None]:
    """(output, LSE). The LSE is None unless `return_lse` asks for it; the output is `out` where that is given. `wires` says
    something of DTensors only."""
    if wires not in WIRES:
        raise ValueError(f"wires={wires!r} (valid: {', '.join(WIRES)})")
    if left_is_bound and window_left < 0:  # no key is seen
        validate(query, key, value, attn_mask, enable_gqa, out, query_segments, key_segments)
        out = empty_output(query, value, memory_order) if out is None else out
        return out.zero_(), empty_lse(query).fill_(-math.inf) if return_lse else None
    given_segments = query_segments, key_segments
    if wanting := gradient_problem(query=query, key=key, value=value, attn_mask=attn_mask, sink=sink):
        if out is not None:
            raise NotEligibleError(f"kernel={kernel_name}", [wanting])
        params = AttentionParams(is_causal, bottom_right, window_left, window_right, scale, precision)
        validate(query, key, value, attn_mask, enable_gqa, None, *given_segments)
        segments = as_segments(*given_segments)
        return _differentiable(query, key, value, attn_mask, params, memory_order, return_lse, segments)
    kind = (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        None if attn_mask is None
        else (attn_mask.shape, attn_mask.stride(), attn_mask.dtype, attn_mask.device),
        None if out is None else (out.shape, out.stride(), out.dtype, out.device),
        *[None if ids is None else (ids.shape, ids.stride(), ids.dtype, ids.device) for ids in given_segments],
        None if memory_order is None else tuple(memory_order),
        return_lse, is_causal, scale, enable_gqa, bottom_right, window_left, window_right, kernel_name, precision,
        min_q_len, min_kv_len, or_exact, smoothing, skip_threshold, skip_by,
    )  # fmt: skip
    resolved = _resolved.get(kind)
    if resolved is None:
        validate(query, key, value, attn_mask, enable_gqa, out, *given_segments)
    given, lse = out, empty_lse(query) if return_lse else None
    if out is None:
        if resolved is None:
            out = empty_output(query, value, memory_order)
        else:
            out = torch.empty_strided(
                resolved.out_shape, resolved.out_strides, dtype=query.dtype, device=query.device
            )
    result = out, lse
    if query.dim() != 4:
        query, key, value, out = (as_4d(tensor) for tensor in (query, key, value, out))
        lse = None if lse is None else lse.view(query.shape[:-1])
    if attn_mask is not None:
        attn_mask = as_4d(attn_mask)
    segments = as_segments(*given_segments)
    if resolved is None:
        precision = kernels.precision_on(query.device, precision, kernel_name)
        params = AttentionParams(
            is_causal,
            bottom_right,
            window_left,
            window_right,
            scale,
            precision,
            smoothing,
            skip_threshold,
            skip_by,
        )
        run = _resolve(
            query,
            key,
            value,
            attn_mask,
            params,
            out,
            lse,
            kernel_name,
            (min_q_len, min_kv_len),
            or_exact,
            segments,
        )
        resolved = _Resolved(run, params, result[0].shape, result[0].stride())
        _resolved.keep(kind, resolved)
    if resolved.run is not None:
        if segments is None:
            resolved.run(query, key, value, attn_mask, out, lse)
        else:
            resolved.run(query, key, value, attn_mask, out, lse, segments=segments)
        return result
    exact = sdpa(query, key, value, attn_mask, resolved.params, segments)
    if lse is not None:
        exact_lse(query, key, attn_mask, resolved.params, lse, segments)
    if given is None and out is result[0] and exact.stride() == out.stride():
        return exact, lse  # `out` was made here and can be dropped
    out.copy_(exact)
    return result


def _resolve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    out: Tensor,
    lse: Tensor | None,
    name: str,
    least: tuple[int, int],
    or_exact: bool,
    segments: Segments | None,
) -> Prepared | None:
    """What to run; None means exact attention.

    Attention is exact where `name` asks for it, where "auto" finds no kernel, where queries or keys are fewer than `least`, and,
    with `or_exact`, where the kernel does not take these sizes. Raises NotEligibleError where a kernel asked for by name cannot
    run, ValueError for an unknown precision, smoothing or skip_by, or a skip_threshold that is none."""
    if params.precision not in kernels.PRECISIONS:
        raise ValueError(f"precision={params.precision!r} (valid: {', '.join(kernels.PRECISION_CHOICES)})")
    if params.smoothing not in kernels.SMOOTHINGS:
        raise ValueError(f"smoothing={params.smoothing!r} (valid: {', '.join(kernels.SMOOTHINGS)})")
    if problem_text := threshold_problem(params.skip_threshold) or decider_problem(params.skip_by):
        raise ValueError(problem_text)
    chosen = None
    if name != EXACT:
        problem = make_problem(query, key, value, attn_mask, params, lse is not None, segments)
        chosen, reasons = kernels.select(problem, name)
        falls_back = name == "auto" or (or_exact and not kernels.get(name).unavailable_reasons(query.device))
        if chosen is None and not falls_back:
            raise NotEligibleError(f"kernel={name}", reasons)
    if out.numel() == 0 or key.shape[2] == 0:
        return without_keys
    if chosen is None or query.shape[2] < least[0] or key.shape[2] < least[1]:
        return None
    if segments is None:
        return chosen.prepare(query, key, value, attn_mask, params, out, lse)
    return chosen.prepare(query, key, value, attn_mask, params, out, lse, segments)


def _differentiable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    memory_order: Sequence[int] | None,
    return_lse: bool,
    segments: Segments | None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention that autograd records, and its LSE if asked for. The output has the strides that the operator's has."""
    q, k, v = map(as_4d, (query, key, value))
    mask = None if attn_mask is None else as_4d(attn_mask)
    # No other backend of SDPA has forward-mode gradients.
    backends = sdpa_kernel(SDPBackend.MATH) if in_forward_ad() else nullcontext()
    with backends:
        out = sdpa(q, k, v, mask, params, segments).view(*query.shape[:-1], value.shape[-1])
    expected = empty_output(query.detach(), value.detach(), memory_order)
    if out.stride() != expected.stride():
        out = expected.copy_(out)
    if not return_lse:
        return out, None
    lse = empty_lse(q)
    exact_lse(q, k, mask, params, lse, segments)
    return out, lse.view(query.shape[:-1])


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
    memory_order: Sequence[int] | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    **params: Any,
) -> Tensor:
    validate(query, key, value, attn_mask, enable_gqa, None, query_segments, key_segments)
    return empty_output(query, value, memory_order)


def fake_attention_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
    output: Tensor,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    **params: Any,
) -> None:
    validate(query, key, value, attn_mask, enable_gqa, output, query_segments, key_segments)


def fake_attention_lse(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(query, *args, **kwargs), empty_lse(query)


def _out_of_views(*args: Any, output: Tensor, **options: Any) -> None:
    """`attention.out` where a tensor is a negative or conjugate view, such as `x.conj().imag`. torch's own rule would give the
    operator a copy to write to. It is for operators that return what they write to, and this one returns nothing."""
    if problem := output_problem(output):
        raise misfit(problem)
    resolved = (arg.resolve_neg().resolve_conj() if isinstance(arg, Tensor) else arg for arg in args)
    torch.ops.sage_inductor.attention.out(*resolved, output=output, **options)


def _register() -> None:
    for name, implementation, fake in (
        ("attention", _attention, fake_attention),
        ("attention.out", _attention_out, fake_attention_out),
        ("attention_lse", _attention_lse, fake_attention_lse),
    ):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.sage_inductor, packet), overload or "default")
        for backend in ("CPU", "CUDA"):
            LIBRARY.impl(name, implementation, backend)
            LIBRARY.impl(name, autograd_rule(op, implementation), f"Autograd{backend}")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(name, autocast_rule(op, device_type), key)
    for key in ("Negative", "Conjugate"):
        LIBRARY.impl("attention.out", _out_of_views, key)


_register()
attention = torch.ops.sage_inductor.attention.default
attention_out = torch.ops.sage_inductor.attention.out
attention_lse = torch.ops.sage_inductor.attention_lse.default
