"""The kernel that is chosen while Dynamo traces, for tensors whose sizes may be symbolic.

Python code that Dynamo traces has no way to the value that a symbolic size was traced with: to look at it is a guard, and one more
compile for each length; functions that Dynamo takes for constants are given constants only. An operator's fake implementation is
given the tensors, and reads the hints of their sizes. It answers by the length of a tensor, which is a plain number to
Dynamo. Nothing reads the tensor itself, so that AOTAutograd takes the call out of the graph.

Without a query the choice is one for any lengths.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.key_value import KeyValueForm
from sage_inductor.kernels.smoothing import resolved_smoothing
from sage_inductor.operators.prequantized import can_prequantize, family_for, problem_of
from sage_inductor.operators.schemas import LIBRARY, NAMESPACE
from sage_inductor.torch_internals.dynamo import leave_graph


class QuantizationChoice(NamedTuple):
    """How keys and values are quantised."""

    kernel: str
    precision: str
    smoothing: str


# Each by a number; 0 is exact attention, and the one behind the last what cannot be done.
_NAMED = (
    None,
    *(
        QuantizationChoice(*names)
        for names in product(
            kernels.KERNELS, kernels.PRECISIONS, [name for name in kernels.SMOOTHINGS if name != "auto"]
        )
    ),
)
_REFUSED = len(_NAMED)

LIBRARY.define(
    "choice(Tensor? query, Tensor key, Tensor value, *, str kernel_name, str precision, str smoothing, bool or_exact=False) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def chosen(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    kernel: str,
    precision: str,
    smoothing: str,
    or_exact: bool = False,
) -> QuantizationChoice | None:
    """What quantises `key` and `value` apart from attention of `query` to them; None where that attention is exact: for kernel
    "auto" where there is no faster one, and with `or_exact` where the kernel cannot do it. Without a query it is never exact.
    Symbolic sizes count as they were traced, and leave no guards. Raises NotEligibleError for what cannot be done."""
    if not torch.compiler.is_dynamo_compiling():
        return _chosen(query, key, value, kernel, precision, smoothing, or_exact)
    number = torch.ops.sage_inductor.choice(
        query, key, value, kernel_name=kernel, precision=precision, smoothing=smoothing, or_exact=or_exact
    ).shape[0]
    if number == _REFUSED:
        leave_graph()  # what runs uncompiled raises, with its reasons
        return _chosen(query, key, value, kernel, precision, smoothing, or_exact)
    found: QuantizationChoice | None = _NAMED[number]
    return found


def _chosen(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    name: str,
    precision: str,
    smoothing: str,
    or_exact: bool,
) -> QuantizationChoice | None:
    precision = kernels.precision_on(key.device, precision, name)
    if query is None:
        if name == "auto":
            name = _for_any_lengths(key, value, precision, smoothing)
        return QuantizationChoice(name, precision, smoothing)
    params = AttentionParams(precision=precision, smoothing=smoothing)
    of_query, of_key, of_value = (TensorSpec.of(tensor) for tensor in (query, key, value))
    kernel, reasons = kernels.select(AttentionProblem(of_query, of_key, of_value, None, params, True), name)
    if kernel is not None or name != "auto":
        reasons = can_prequantize(kernels.get(name) if kernel is None else kernel) or reasons
    if not reasons:
        assert kernel is not None
        return QuantizationChoice(kernel.name, precision, resolved_smoothing(smoothing, kernel.smoothings))
    if name == "auto" or (kernel is None and or_exact):
        return None
    raise NotEligibleError(f'kernel={name} with wires="8-bit"', reasons)


def _for_any_lengths(key: Tensor, value: Tensor, precision: str, smoothing: str) -> str:
    head_dim, value_head_dim = key.shape[-1], value.shape[-1]
    form = KeyValueForm(1, 1, 1, head_dim, value_head_dim, key.dtype, precision, smoothing)
    query = TensorSpec((1, 1, 1, head_dim), (head_dim, head_dim, head_dim, 1), key.dtype, key.device)
    params = AttentionParams(precision=precision, smoothing=smoothing)
    return family_for("auto", problem_of(query, form, 1, params)).name


def _choice(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    kernel_name: str,
    precision: str,
    smoothing: str,
    or_exact: bool = False,
) -> Tensor:
    try:
        found = _chosen(query, key, value, kernel_name, precision, smoothing, or_exact)
    except NotEligibleError:
        return key.new_zeros(_REFUSED)
    return key.new_zeros(_NAMED.index(found))


def _register() -> None:
    for backend in ("CPU", "CUDA"):
        LIBRARY.impl("choice", _choice, backend)
    torch.library.register_fake(f"{NAMESPACE}::choice", _choice, lib=LIBRARY)


_register()
