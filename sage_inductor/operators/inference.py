"""The operators that graphs contain: schemas, shapes, autocast. Imports torch only; kernels load when first run.

    sage_inductor::attention        -> output
    sage_inductor::attention.out    -> nothing; writes into `output` (Dynamo takes no strided argument called out)
    sage_inductor::attention_lse    -> output and LSE

Inputs that need gradients get exact attention, which autograd records as it records SDPA; the quantised forward pass
with gradients is `sage_inductor::attention_training` in training.py. At autograd's key stands the implementation itself:
to dispatch a call twice would cost 4.3 us, half of what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.sizes import are_multiples, differ, known, memory_order
from sage_inductor.kernels import AttentionParams, AttentionProblem, Segments, TensorSpec
from sage_inductor.kernels.base import (
    Prepared,
    expanded_dim,
    mark_written,
    output_problem,
    reason,
    without_keys,
)
from sage_inductor.kernels.cache import Cache
from sage_inductor.operators.unquantised import exact_lse, sdpa
from sage_inductor.torch_internals.dispatch import below_autograd, past_autocast, runs_eagerly

NAMESPACE = "sage_inductor"
INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, *"
# kernel_name: Inductor's lowering has an argument of its own called kernel. Fewer than min_q_len queries or min_kv_len
# keys get exact attention, by which lengths that change from call to call are dispatched. With or_exact so do sizes that the
# kernel does not take: those of a graph may change from call to call.
PARAMS = (
    "float? scale=None, bool enable_gqa=False, bool bottom_right=False, int window_left=-1, "
    "int window_right=-1, str kernel_name='auto', str precision='fast', int min_q_len=0, int min_kv_len=0, "
    "bool or_exact=False"
)
EXACT = "sdpa"  # the kernel_name of attention that is not quantised, which calibration compares with
# Strides are part of the contract: the kernels read any, and Inductor must not copy inputs into another
# layout.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

_Library: Any = torch.library.Library  # torch leaves it untyped
LIBRARY = _Library(NAMESPACE, "FRAGMENT")
# sink: logits beside those of the keys, which take weight and have no value; they broadcast to `[batch, heads, q_len]`.
# *_segments: int32 ids, `[batch, q_len]` and `[batch, kv_len]`, without batch where query has none; see `Segments`.
SEGMENTS = "Tensor? query_segments=None, Tensor? key_segments=None"
LIBRARY.define(
    f"attention({INPUTS}, {PARAMS}, int[]? memory_order=None, Tensor? sink=None, {SEGMENTS}) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(f"attention.out({INPUTS}, {PARAMS}, Tensor(a!) output, {SEGMENTS}) -> ()", tags=TAGS)
LIBRARY.define(
    f"attention_lse({INPUTS}, {PARAMS}, int[]? memory_order=None, {SEGMENTS}) -> (Tensor, Tensor)", tags=TAGS
)


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    out: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> None:
    """Raise RuntimeError, as SDPA does, for inputs that do not fit together. Works on real and on traced
    tensors."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not 2 <= tensor.dim() <= 4:
            raise _misfit(f"{name} has {tensor.dim()} dimensions (valid: 2 to 4)")
        if tensor.dim() != query.dim():
            raise _misfit(f"{name} has {tensor.dim()} dimensions, query has {query.dim()}")
        if tensor.dtype != query.dtype:
            raise _misfit(f"{name} is {tensor.dtype}, query is {query.dtype}")
        if tensor.device != query.device:
            raise _misfit(f"{name} is on {tensor.device}, query on {query.device}")
        if query.dim() == 4 and differ(tensor.shape[0], query.shape[0]):
            raise _misfit(f"{name} has batch {tensor.shape[0]}, query {query.shape[0]}")
    if not query.is_floating_point():
        raise _misfit(f"query, key and value are {query.dtype} (valid: a floating-point dtype)")
    if differ(query.shape[-1], key.shape[-1]):
        raise _misfit(f"head_dim of query is {query.shape[-1]}, of key {key.shape[-1]}")
    if differ(key.shape[-2], value.shape[-2]):
        raise _misfit(f"kv_len of key is {key.shape[-2]}, of value {value.shape[-2]}")
    if query.dim() >= 3:
        heads, kv_heads = known(query.shape[-3]), known(key.shape[-3])
        if differ(value.shape[-3], kv_heads):
            raise _misfit(f"value has {value.shape[-3]} heads, key has {kv_heads}")
        are_known = isinstance(heads, int) and isinstance(kv_heads, int)
        if enable_gqa and are_known and not are_multiples(heads, kv_heads):
            raise _misfit(f"{heads} query heads are not a multiple of {kv_heads} key heads")
        if not enable_gqa and differ(heads, kv_heads):
            raise _misfit(f"query has {heads} heads, key has {kv_heads}; enable_gqa is False")
    if attn_mask is not None:
        _validate_mask(query, key, attn_mask)
    if query_segments is not None or key_segments is not None:
        validate_segments(query, key, query_segments, key_segments)
    if out is not None:
        expected = (*query.shape[:-1], value.shape[-1])
        if out.dim() != len(expected) or any(map(differ, out.shape, expected)):
            raise _misfit(f"out is {tuple(out.shape)}, the output {expected}")
        if out.dtype != query.dtype:
            raise _misfit(f"out is {out.dtype}, query is {query.dtype}")
        if out.device != query.device:
            raise _misfit(f"out is on {out.device}, query on {query.device}")
        if (dim := expanded_dim(out)) is not None:
            raise _misfit(f"out is expanded in dim {dim}: its {out.shape[dim]} elements are one in memory")


def _validate_mask(query: Tensor, key: Tensor, attn_mask: Tensor) -> None:
    if attn_mask.device != query.device:
        raise _misfit(f"attn_mask is on {attn_mask.device}, query on {query.device}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        valid = dict.fromkeys(map(str, (torch.bool, torch.float32, query.dtype)))
        raise _misfit(f"attn_mask is {attn_mask.dtype} (valid: {', '.join(valid)})")
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dim() > len(scores):
        raise _misfit(f"attn_mask has {attn_mask.dim()} dimensions, the scores {scores}")
    for size, expected in zip(reversed(attn_mask.shape), reversed(scores), strict=False):
        if known(size) != 1 and differ(size, expected):
            raise _misfit(f"attn_mask {tuple(attn_mask.shape)} does not broadcast to the scores {scores}")


def validate_segments(
    query: Tensor, key: Tensor, query_segments: Tensor | None, key_segments: Tensor | None
) -> None:
    """Raise RuntimeError for ids that are not those of query and key, or of only one of them."""
    if query_segments is None or key_segments is None:
        missing, given = ("query", "key") if query_segments is None else ("key", "query")
        raise _misfit(f"{given}_segments without {missing}_segments (valid: both, or neither)")
    for name, ids, rows in (("query", query_segments, query), ("key", key_segments, key)):
        if ids.dtype != torch.int32:
            raise _misfit(f"{name}_segments is {ids.dtype} (valid: torch.int32)")
        if ids.device != query.device:
            raise _misfit(f"{name}_segments is on {ids.device}, query on {query.device}")
        expected = (*query.shape[:-3], rows.shape[-2])
        if ids.dim() != len(expected) or any(map(differ, ids.shape, expected)):
            dims = "[batch, {0}]" if query.dim() == 4 else "[{0}]"
            length = {"query": "q_len", "key": "kv_len"}[name]
            raise _misfit(f"{name}_segments is {tuple(ids.shape)} (valid: {dims.format(length)}, {expected})")


def _misfit(message: str) -> RuntimeError:
    return RuntimeError(f"sage_inductor attention: {message}")


def empty_output(query: Tensor, value: Tensor, order: Sequence[int] | None) -> Tensor:
    if order is None:
        order = memory_order(query, guarded=True)
    elif sorted(order) != list(range(query.dim())):
        raise _misfit(f"memory_order={list(order)} is no order of {query.dim()} dims")
    shape = (*query.shape[:-1], value.shape[-1])
    return torch.empty_permuted(shape, list(order), dtype=query.dtype, device=query.device)


def _empty_lse(query: Tensor) -> Tensor:
    return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)


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
        raise _misfit(problem)
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
    """What calls of one kind come down to."""

    run: Prepared | None  # None: exact attention
    params: AttentionParams
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]


# It depends on shapes, strides and options alone, so it is worked out once for each: the checks and all the numbers that
# kernels take would otherwise cost more than the launches.
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
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, LSE if asked for); the output is `out` where that is given."""
    given_segments = query_segments, key_segments
    if torch.is_grad_enabled() and (wanting := wanting_gradients(query, key, value, attn_mask, sink)):
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
        min_q_len, min_kv_len, or_exact,
    )  # fmt: skip
    resolved = _resolved.get(kind)
    if resolved is None:
        validate(query, key, value, attn_mask, enable_gqa, out, *given_segments)
    given, lse = out, _empty_lse(query) if return_lse else None
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
        params = AttentionParams(is_causal, bottom_right, window_left, window_right, scale, precision)
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
        return exact, lse  # nobody else has seen ours
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
    """What to run; None for exact attention, asked for, fallen back to by "auto", for fewer than `least` queries and keys,
    or, with `or_exact`, for sizes that the kernel does not take."""
    if params.precision not in kernels.PRECISIONS:
        raise ValueError(f"precision={params.precision!r} (valid: {', '.join(kernels.PRECISION_CHOICES)})")
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
    """Exact attention, and its LSE if asked for, that autograd records; the output in the strides of the operator's."""
    q, k, v = map(as_4d, (query, key, value))
    mask = None if attn_mask is None else as_4d(attn_mask)
    out = sdpa(q, k, v, mask, params, segments).view(*query.shape[:-1], value.shape[-1])
    expected = empty_output(query.detach(), value.detach(), memory_order)
    if out.stride() != expected.stride():
        out = expected.copy_(out)
    if not return_lse:
        return out, None
    lse = _empty_lse(q)
    exact_lse(q, k, mask, params, lse, segments)
    return out, lse.view(query.shape[:-1])


def wanting_gradients(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, sink: Tensor | None = None
) -> str | None:
    """The reason against an inference kernel when an input requires gradients."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "sink": sink}
    wanting = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    return reason("requires_grad", wanting, "none; use torch.no_grad()") if wanting else None


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    return_lse: bool = False,
    segments: Segments | None = None,
) -> AttentionProblem:
    """The problem as kernels judge it: inputs of 2 to 4 dimensions seen as 4-D. Real or traced tensors."""
    mask = None if attn_mask is None else TensorSpec.of(attn_mask).as_4d()
    q, k, v = (TensorSpec.of(tensor).as_4d() for tensor in (query, key, value))
    ids = (None, None) if segments is None else tuple(map(TensorSpec.of, segments))
    return AttentionProblem(q, k, v, mask, params, return_lse, *ids)


def as_4d(tensor: Tensor) -> Tensor:
    """`[..., seq, head_dim]` seen as `[batch, heads, seq, head_dim]`; masks alike."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor


def as_segments(query_segments: Tensor | None, key_segments: Tensor | None) -> Segments | None:
    """The ids as kernels take them, with a batch of 1 where there is none."""
    if query_segments is None or key_segments is None:
        return None
    if query_segments.dim() == 1:
        query_segments, key_segments = query_segments[None], key_segments[None]
    return Segments(query_segments, key_segments)


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
    return fake_attention(query, *args, **kwargs), _empty_lse(query)


def _autograd_rule(op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What stands at autograd's key: the implementation, which looks for itself at whether gradients are wanted. Tracing
    records `op` where they are not, and exact attention where they are."""

    def rule(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = (query, key, value, *args, *kwargs.values())
        if runs_eagerly(tensors) or (torch.is_grad_enabled() and any(map(_requires_grad, tensors))):
            return implementation(query, key, value, *args, **kwargs)
        with below_autograd():
            return op(query, key, value, *args, **kwargs)

    return rule


def _requires_grad(item: object) -> bool:
    return isinstance(item, Tensor) and item.requires_grad


def autocast_rule(op: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Autocast casts query, key and value, but float64. A float mask is read as it is, or as float32 where its dtype is
    neither that nor the autocast dtype: the scores that a model adds it to by hand are promoted as far. (SDPA's own rule
    casts masks too; who stands for SDPA does that beforehand, `cast_as_sdpa`.)"""
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
    """`attn_mask` as SDPA reads it: under autocast a float mask, but of float64, is cast to the autocast dtype."""
    if attn_mask is None or not attn_mask.is_floating_point() or attn_mask.dtype == torch.float64:
        return attn_mask
    device_type = attn_mask.device.type
    if not torch.is_autocast_enabled(device_type):
        return attn_mask
    return attn_mask.to(torch.get_autocast_dtype(device_type))


def _out_of_views(*args: Any, output: Tensor, **options: Any) -> None:
    """`attention.out` where a tensor is a negative or conjugate view. torch's own rule, which would give the operator a
    tensor of its own and copy that back, is for operators that return what they write to."""
    if problem := output_problem(output):
        raise _misfit(problem)
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
            LIBRARY.impl(name, _autograd_rule(op, implementation), f"Autograd{backend}")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(name, autocast_rule(op, device_type), key)
    for key in ("Negative", "Conjugate"):
        LIBRARY.impl("attention.out", _out_of_views, key)


_register()
attention = torch.ops.sage_inductor.attention.default
attention_out = torch.ops.sage_inductor.attention.out
attention_lse = torch.ops.sage_inductor.attention_lse.default
