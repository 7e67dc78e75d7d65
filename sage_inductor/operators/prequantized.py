"""The two halves of attention apart: `quantize_key_value`, and `attention_prequantized` to what that gave.

Keys and values that several calls attend to are quantised once, and travel between ranks in 8 bits. The operators

    sage_inductor::quantize_key_value      -> a buffer of bytes, laid out as the kernel reads it
    sage_inductor::attention_prequantized  -> output and LSE

take the kernel by its name. Inference only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.arguments import check_choice
from sage_inductor.kernels.base import Kernel, gradient_problem, reason
from sage_inductor.kernels.cache import Cache
from sage_inductor.kernels.key_value import Attend, KeyValueForm, Quantize
from sage_inductor.kernels.smoothing import EQUALISING
from sage_inductor.operators.inputs import empty_lse, empty_output
from sage_inductor.operators.schemas import LIBRARY, NAMESPACE, TAGS
from sage_inductor.operators.validation import misfit, validate
from sage_inductor.torch_internals.dispatch import below_autograd, runs_eagerly
from sage_inductor.torch_internals.distributed import is_dtensor

DIMS = 4
ALIGNMENT = 16  # bytes, of what kernels read
# kv_len: keys that are attended to, the first of stored_len in the buffer.
LIBRARY.define(
    "quantize_key_value(Tensor key, Tensor value, Tensor? query=None, *, str kernel_name, str precision='fast', "
    "str smoothing='mean') -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "attention_prequantized(Tensor query, Tensor packed, *, SymInt kv_heads, SymInt kv_len, SymInt stored_len, "
    "SymInt value_head_dim, str kernel_name, str precision='fast', str smoothing='mean', bool is_causal=False, "
    "float? scale=None, bool bottom_right=False, SymInt window_left=-1, SymInt window_right=-1, "
    "int[]? memory_order=None) -> (Tensor, Tensor)",
    tags=TAGS,
)


# Each kind of call is worked out once, as in inference.py.
_quantize: Cache[tuple[Any, ...], Quantize] = Cache(1024)
_attend: Cache[tuple[Any, ...], Attend] = Cache(1024)


def _quantize_key_value(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    *,
    kernel_name: str,
    precision: str = "fast",
    smoothing: str = "mean",
) -> Tensor:
    kind = (*map(_facts, (key, value, query)), kernel_name, precision, smoothing)
    run = _quantize.get(kind)
    if run is None:
        form, family = _quantized_form(key, value, query, kernel_name, precision, smoothing)
        if form.batch * form.kv_heads * form.kv_len == 0:
            size = family.key_value_layout(form).bytes
            return torch.zeros(size, dtype=torch.uint8, device=key.device)
        run = _quantize.keep(kind, family.prepare_key_value(key, value, query, form))
    return run(key, value, query)


def _fake_quantize_key_value(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    *,
    kernel_name: str,
    precision: str = "fast",
    smoothing: str = "mean",
) -> Tensor:
    check_inputs(key, value, query, smoothing)
    form = form_of(key, value, precision, smoothing)
    return key.new_empty(kernels.get(kernel_name).key_value_layout(form).bytes, dtype=torch.uint8)


def _attention_prequantized(
    query: Tensor,
    packed: Tensor,
    *,
    kv_heads: int,
    kv_len: int,
    stored_len: int,
    value_head_dim: int,
    kernel_name: str,
    precision: str = "fast",
    smoothing: str = "mean",
    is_causal: bool = False,
    scale: float | None = None,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    memory_order: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    if packed.data_ptr() % ALIGNMENT:  # a part of a larger buffer, say
        packed = packed.clone()
    params = AttentionParams(is_causal, bottom_right, window_left, window_right, scale, precision, smoothing)
    form = KeyValueForm(
        query.shape[0],
        kv_heads,
        stored_len,
        query.shape[-1],
        value_head_dim,
        query.dtype,
        precision,
        smoothing,
    )
    order = None if memory_order is None else tuple(memory_order)
    kind = (_facts(query), _facts(packed), kv_len, kernel_name, order, form, params)
    run = _attend.get(kind)
    if run is None:
        check_names(kernel_name, precision, smoothing)
        _check_query(query, packed, form, kv_len, kernels.get(kernel_name))
    out, lse = _empty_output(query, value_head_dim, memory_order), empty_lse(query)
    if run is None:
        family = family_for(kernel_name, problem_of(TensorSpec.of(query), form, kv_len, params))
        if out.numel() == 0 or kv_len == 0:
            return out.zero_(), lse.fill_(-math.inf)
        run = _attend.keep(kind, family.prepare_prequantized(query, form, kv_len, params, out, lse))
    run(query, packed, out, lse)
    return out, lse


def _fake_attention_prequantized(
    query: Tensor,
    packed: Tensor,
    *,
    value_head_dim: int,
    memory_order: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value_head_dim, memory_order), empty_lse(query)


def _empty_output(query: Tensor, value_head_dim: int, memory_order: Sequence[int] | None) -> Tensor:
    like_value = query[..., :1].expand(*query.shape[:-1], value_head_dim)
    return empty_output(query, like_value, memory_order)


def _facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def form_of(key: Tensor, value: Tensor, precision: str, smoothing: str) -> KeyValueForm:
    return KeyValueForm(
        key.shape[0],
        key.shape[1],
        key.shape[2],
        key.shape[3],
        value.shape[3],
        key.dtype,
        precision,
        smoothing,
    )


def _quantized_form(
    key: Tensor, value: Tensor, query: Tensor | None, kernel: str, precision: str, smoothing: str
) -> tuple[KeyValueForm, Kernel]:
    check_names(kernel, precision, smoothing)
    check_inputs(key, value, query, smoothing)
    form = form_of(key, value, precision, smoothing)
    params = AttentionParams(precision=precision, smoothing=smoothing)
    return form, family_for(kernel, problem_of(TensorSpec.of(key), form, form.kv_len, params))


def problem_of(
    query: TensorSpec, form: KeyValueForm, kv_len: int, params: AttentionParams
) -> AttentionProblem:
    """As kernels judge it. Keys count as dense, and their own dtype as that of the query."""
    keys = form.batch, form.kv_heads, kv_len

    def spec(dim: int) -> TensorSpec:
        strides = (form.kv_heads * kv_len * dim, kv_len * dim, dim, 1)
        return TensorSpec((*keys, dim), strides, form.dtype, query.device)

    return AttentionProblem(query, spec(form.head_dim), spec(form.value_head_dim), None, params, True)


def can_prequantize(kernel: Kernel) -> list[str]:
    """Why `kernel` cannot quantise K and V apart from attention to them; empty where it can."""
    able = [name for name in kernels.KERNELS if kernels.get(name).prequantizes]
    return [] if kernel.prequantizes else [reason("kernel", kernel.name, able)]


def family_for(name: str, problem: AttentionProblem) -> Kernel:
    """The kernel family called `name`, or for "auto" the first that can run, however fast. Raises NotEligibleError where there
    is none."""
    if name != "auto":
        family = kernels.get(name)
        reasons = can_prequantize(family) or kernels.select(problem, name)[1]
        if reasons:
            raise NotEligibleError(f"kernel={name}", reasons)
        return family
    able, refused = kernels.candidates(problem)
    for family in able:
        if family.prequantizes:
            return family
        refused[family.name] = can_prequantize(family)
    raise NotEligibleError("kernel=auto", [text for reasons in refused.values() for text in reasons])


def check_names(kernel: str, precision: str, smoothing: str) -> None:
    check_choice("kernel", kernel, ("auto", *kernels.KERNELS))
    check_choice("precision", precision, kernels.PRECISION_CHOICES)
    # What "auto" stands for is part of the buffer's form.
    check_choice("smoothing", smoothing, [name for name in kernels.SMOOTHINGS if name != "auto"])


def check_are_plain(**tensors: Tensor | None) -> None:
    """Raise RuntimeError for DTensors: what is quantised apart is one rank's own, to be sent by whoever wants it elsewhere."""
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise misfit(f"{name} is a DTensor (valid: a plain tensor, such as its to_local())")


def check_inputs(key: Tensor, value: Tensor, query: Tensor | None, smoothing: str) -> None:
    check_are_plain(key=key, value=value, query=query)
    if key.dim() != DIMS:
        raise misfit(f"key has {key.dim()} dimensions (valid: {DIMS}: batch, heads, kv_len, head_dim)")
    if smoothing in EQUALISING and query is None:
        raise misfit(f"smoothing={smoothing!r} without query, by whose sizes K's channels are scaled")
    validate(key if query is None else query, key, value, None, enable_gqa=True)


def _check_query(query: Tensor, packed: Tensor, form: KeyValueForm, kv_len: int, family: Kernel) -> None:
    if query.dim() != DIMS:
        raise misfit(f"query has {query.dim()} dimensions (valid: {DIMS}: batch, heads, q_len, head_dim)")
    if reasons := can_prequantize(family):
        raise NotEligibleError(f"kernel={family.name}", reasons)
    if packed.device != query.device:
        raise misfit(f"packed is on {packed.device}, query on {query.device}")
    if form.kv_heads == 0 or query.shape[1] % form.kv_heads:
        raise misfit(f"{query.shape[1]} query heads are not a multiple of {form.kv_heads} key heads")
    if not 0 <= kv_len <= form.kv_len:
        raise misfit(f"kv_len={kv_len} (valid: 0 to {form.kv_len}, what was quantised)")
    size = family.key_value_layout(form).bytes
    if packed.shape != (size,) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise misfit(
            f"packed is {tuple(packed.shape)} {packed.dtype} (valid: ({size},) torch.uint8, contiguous: keys for a query "
            f"{tuple(query.shape)} {query.dtype})"
        )


def inference_only(
    op: Callable[..., Any], implementation: Callable[..., Any], what: str
) -> Callable[..., Any]:
    """The rule at autograd's key that raises where gradients of `what` are wanted: none are computed."""
    names = tuple(inspect.signature(implementation).parameters)

    def rule(*args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = {name: arg for name, arg in named.items() if isinstance(arg, Tensor)}
        if wanting := gradient_problem(**tensors):
            raise NotEligibleError(what, [wanting])
        if runs_eagerly((*args, *kwargs.values())):
            return implementation(*args, **kwargs)
        with below_autograd():
            return op(*args, **kwargs)

    return rule


def _register() -> None:
    for name, implementation, fake in (
        ("quantize_key_value", _quantize_key_value, _fake_quantize_key_value),
        ("attention_prequantized", _attention_prequantized, _fake_attention_prequantized),
    ):
        op = getattr(torch.ops.sage_inductor, name).default
        for backend in ("CPU", "CUDA"):
            LIBRARY.impl(name, implementation, backend)
            LIBRARY.impl(
                name, inference_only(op, implementation, "attention to quantised keys"), f"Autograd{backend}"
            )
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


_register()
quantize_key_value_op = torch.ops.sage_inductor.quantize_key_value.default
attention_prequantized_op = torch.ops.sage_inductor.attention_prequantized.default
