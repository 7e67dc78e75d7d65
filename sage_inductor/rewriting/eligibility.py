"""The rules that hold for every kernel: the reasons why an attention call must stay as it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from sage_inductor.config import Config
from sage_inductor.graph.call import AttentionCall, example_tensor, example_value
from sage_inductor.graph.sizes import are_multiples, differ, is_dense, memory_order, sizes_of
from sage_inductor.graph.surroundings import Surroundings
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.base import reason
from sage_inductor.patterns.varlen_attention import called
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.torch_internals.dispatch import dispatches_itself
from sage_inductor.torch_internals.sizes import number_of
from sage_inductor.tuning import SdpaCall


def ineligible_reasons(call: AttentionCall, mask: Mask, config: Config, around: Surroundings) -> list[str]:
    """Every reason why no kernel can replace `call`. Empty where one may."""
    reasons = []
    if around.transforms:
        reasons.append(reason("transform", around.transforms, "none"))
    if around.pinned is not None:
        reasons.append(reason("sdpa_kernel", around.pinned, "no explicit choice of an SDPA backend"))
    if around.own_gradients:
        # Its backward may take what the forward gave for exact, as one that reads saved outputs does.
        reasons.append(reason("gradients", "of an autograd.Function", "none; torch.no_grad()"))
    dropout_p = call.dropout_p
    if isinstance(dropout_p, fx.Node):  # a float argument of a model that is compiled for dynamic shapes
        dropout_p = number_of(example_value(dropout_p))
    if not isinstance(dropout_p, (int, float)) or dropout_p != 0.0:
        reasons.append(reason("dropout_p", dropout_p, 0.0))
    if not isinstance(call.is_causal, bool):
        reasons.append(reason("is_causal", call.is_causal, "True or False known while compiling"))
    if isinstance(call.scale, fx.Node) and not isinstance(
        example_value(call.scale), (int, float, torch.SymFloat)
    ):
        reasons.append(reason("scale", f"node {call.scale}", "a number"))
    if call.attn_mask is not None and call.is_causal is True:
        reasons.append("attn_mask with is_causal=True (SDPA refuses it)")

    output = call.output()
    if call.lse is not None and output is not None:
        reasons += _autocast_reasons(output, around)

    if mask.left_bound is not None or mask.right_bound is not None:
        operands = map(example_tensor, (call.query, call.key, call.value))
        if any(tensor is not None and dispatches_itself(tensor) for tensor in operands):
            reasons.append(reason("window", "computed", "a number beside tensor subclasses"))
        if output is not None and output.requires_grad:
            reasons.append(reason("window", "computed", "a number where gradients are wanted"))

    tensors = {"query": call.query, "key": call.key, "value": call.value}
    values = {name: example_tensor(node) for name, node in tensors.items()}
    missing = [name for name, value in values.items() if value is None]
    if missing or output is None:
        return [*reasons, f"no traced shape of {', '.join(missing) or 'the output'}"]
    present = {name: value for name, value in values.items() if value is not None}
    reasons += _subclass_reasons(call)
    reasons += _gradient_reasons(call, present, config)
    return reasons + _shape_reasons(call, present)


def _autocast_reasons(output: Tensor, around: Surroundings) -> list[str]:
    """Why a call of another kernel's own operator has to stay: autocast casts what our operator is given, and not its inputs."""
    cast = around.autocast_dtype(output.device.type)
    if cast in (None, output.dtype):
        return []
    return [reason("autocast", cast, f"{output.dtype}, as the inputs of the kernel, or none")]


def _subclass_reasons(call: AttentionCall) -> list[str]:
    """Reasons for operands of tensor subclasses with a dispatch of their own, which have no rule for our operator. A DTensor
    has one; what is judged then are plain tensors, this rank's parts (`sharded.py`), unless others are none."""
    nodes = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "attn_mask": call.attn_mask,
        "sink": call.sink,
    }
    names: dict[str, list[str]] = {}
    for name, node in nodes.items():
        value = example_tensor(node)
        # Nested tensors are refused by their layout.
        if value is not None and not value.is_nested and dispatches_itself(value):
            names.setdefault(type(value).__name__, []).append(name)
    valid = "plain tensors, or DTensors alone"
    return [reason(f"type of {', '.join(found)}", kind, valid) for kind, found in names.items()]


def _gradient_reasons(call: AttentionCall, tensors: dict[str, Tensor], config: Config) -> list[str]:
    output = call.output()
    if output is None or not output.requires_grad:
        return []
    if call.sink is not None:
        return [reason("requires_grad", "output", "none beside an attention sink; torch.no_grad()")]
    if call.lse is not None and call.lse.is_read:
        return [reason("requires_grad", "output", "none where the LSE is read; torch.no_grad()")]
    mask = example_tensor(call.attn_mask)
    if mask is not None and mask.requires_grad:
        return [reason("requires_grad", "attn_mask", "query, key and value, with training=True")]
    if config.training and config.skip_threshold:
        return [reason("skip_threshold", config.skip_threshold, "0 where gradients are wanted")]
    if config.training:
        return []
    wanting = [name for name, tensor in tensors.items() if tensor.requires_grad]
    return [reason("requires_grad", wanting or "output", "none; torch.no_grad() or training=True")]


def gradient_reasons(node: fx.Node, config: Config) -> list[str]:
    """Why an opaque node cannot be opened for the gradients that flow through it."""
    values = example_value(node)
    outputs = values if isinstance(values, (tuple, list)) else [values]
    if config.training or not any(isinstance(value, Tensor) and value.requires_grad for value in outputs):
        return []
    return [reason("requires_grad", "output", "none; torch.no_grad() or training=True")]


def varlen_reasons(node: fx.Node, mask: Mask, config: Config, around: Surroundings) -> list[str]:
    """Why the attention of packed sequences at `node` has to stay, of which `mask` is made. It never reads a mask, so that it
    is no alternative to one, and no time of SDPA with a mask says what it takes."""
    reasons = []
    if config.kernel == "auto":
        reasons.append(f'{called(node)} (supported: a kernel by name; "auto" has no measurement against it)')
    if mask.query_segments is None or mask.attn_mask is not None:
        reasons.append(reason(f"mask of {called(node)}", mask, "segments, causal or within a window"))
    values = example_value(node)
    reasons += _autocast_reasons(values[0], around)
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        reasons.append(reason("requires_grad", "output", f"none of {called(node)}; torch.no_grad()"))
    return reasons


def flex_reasons(mask: Mask, config: Config) -> list[str]:
    """Why a flex_attention with `mask` has to stay. It passes over the blocks of other documents, as kernels do, and needs none of what
    the graph computes for them: ids of 32 bits, and whether the lists of the block_mask fit. No measurement has that in it."""
    if config.kernel == "auto" and mask.query_segments is not None:
        what = (
            'flex_attention with segments (supported: a kernel by name; "auto" has no measurement against it)'
        )
        return [what]
    return []


def _shape_reasons(call: AttentionCall, tensors: dict[str, Tensor]) -> list[str]:
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    dims = {tensor.dim() for tensor in tensors.values()}
    empty = [name for name, tensor in tensors.items() if 0 in sizes_of(tensor)]
    if empty:
        return [reason(f"shape of {name}", tuple(tensors[name].shape), "no dim of 0") for name in empty]
    if any(tensor.layout != torch.strided or tensor.is_nested for tensor in tensors.values()):
        return [reason("layout", {str(tensor.layout) for tensor in tensors.values()}, "strided, not nested")]
    if len(dims) != 1 or not dims <= {2, 3, 4}:
        return [reason("dimensions", sorted(dims), "2, 3 or 4, alike for query, key and value")]
    reasons = []
    sizes = [sizes_of(tensor) for tensor in (query, key, value)]
    if query.dim() == 4 and len(batches := [size[0] for size in sizes]) != batches.count(batches[0]):
        reasons.append(reason("batch", batches, "alike for query, key and value"))
    if query.dim() >= 3:
        heads, kv_heads, value_heads = (size[-3] for size in sizes)
        grouped = call.enable_gqa and are_multiples(heads, kv_heads)
        if kv_heads != value_heads or (heads != kv_heads and not grouped):
            reasons.append(
                reason("heads", [heads, kv_heads, value_heads], "alike, or a multiple with enable_gqa")
            )
    lengths = [size[-2] for size in sizes[1:]]
    if differ(*lengths):
        # SDPA's behaviour then depends on the device.
        reasons.append(reason("kv_len", lengths, "alike for key and value"))
    devices = {str(tensor.device) for tensor in (query, key, value)}
    if len(devices) != 1:
        reasons.append(reason("devices", sorted(devices), "one"))
    if sizes[0][-2] == 1:
        reasons.append(
            "q_len=1 (supported: 2 and more; a decode step is bound by reading K and V, not by arithmetic)"
        )
    reasons += _stride_reasons(call)
    return reasons


def _stride_reasons(call: AttentionCall) -> list[str]:
    output = call.output()
    assert output is not None
    if output_order(output) is None:
        return [reason("output strides", tuple(output.stride()), "dense, head_dim innermost")]
    return []


def output_order(output: Tensor) -> list[int] | None:
    """The order of the output's dims in memory, outermost first, on which users of the node may rely. None when no dense tensor
    has its strides."""
    order = memory_order(output)
    return order if is_dense(output, order) else None


def make_problem(
    call: AttentionCall, mask: Mask, config: Config, gives_lse: bool = False
) -> AttentionProblem | None:
    """The problem that kernels judge; None where shapes are missing, or are not of 2 to 4 dims. Its dtype is that of the output,
    which autocast decides. `gives_lse`: the output's parts are merged by their LSE."""
    output = call.output()
    tensors = [example_tensor(node) for node in (call.query, call.key, call.value)]
    if output is None or any(tensor is None or not 2 <= tensor.dim() <= 4 for tensor in tensors):
        return None
    attn_mask = example_tensor(mask.attn_mask)
    scale = call.scale if isinstance(call.scale, (int, float)) else None
    params = AttentionParams(
        mask.is_causal,
        mask.bottom_right,
        mask.window_left,
        mask.window_right,
        scale,
        config.precision,
        config.smoothing,
        config.skip_threshold,
        config.skip_by,
    )
    q, k, v = (_spec_as_cast(tensor, output).as_4d() for tensor in tensors if tensor is not None)
    spec = None if attn_mask is None else TensorSpec.of(attn_mask).as_4d()
    gives_lse = gives_lse or call.sink is not None or (call.lse is not None and call.lse.is_read)
    ids = [example_tensor(ids) for ids in (mask.query_segments, mask.key_segments)]
    segments = [None if tensor is None else TensorSpec.of(tensor).as_2d() for tensor in ids]
    return AttentionProblem(q, k, v, spec, params, gives_lse, *segments)


def make_sdpa_call(call: AttentionCall) -> SdpaCall | None:
    """The SDPA call that `call`, as the model makes it, stands for; None where shapes are missing."""
    output = call.output()
    tensors = [example_tensor(node) for node in (call.query, call.key, call.value)]
    mask = example_tensor(call.attn_mask)
    if output is None or any(tensor is None for tensor in tensors):
        return None
    query, key, value = (_spec_as_cast(tensor, output) for tensor in tensors if tensor is not None)
    return SdpaCall(
        query,
        key,
        value,
        None if mask is None else _spec_as_cast(mask, output),
        is_causal=call.is_causal is True,
        scale=call.scale if isinstance(call.scale, (int, float)) else None,
        enable_gqa=call.enable_gqa,
        standing=call.standing,
    )


def _spec_as_cast(tensor: Tensor, output: Tensor) -> TensorSpec:
    """`tensor` as attention reads it: autocast casts floats to the dtype of the output."""
    spec = TensorSpec.of(tensor)
    return replace(spec, dtype=output.dtype) if tensor.is_floating_point() else spec
