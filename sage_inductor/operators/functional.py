"""`sage_attention`: the kernels called directly, with the signature of `F.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels.arguments import as_flag, as_number, as_scale, check_choice, check_tensor
from sage_inductor.kernels.base import gradient_problem, reason
from sage_inductor.kernels.skipping import decider_problem, threshold_problem
from sage_inductor.operators import inference
from sage_inductor.operators.dispatch_rules import cast_as_sdpa
from sage_inductor.operators.leading_dims import folded
from sage_inductor.operators.schemas import WIRES
from sage_inductor.operators.sharded import are_taught, is_dtensor
from sage_inductor.operators.unquantised import combined_mask, same_segment
from sage_inductor.operators.validation import validate_segments
from sage_inductor.torch_internals.dispatch import dispatches_itself
from sage_inductor.torch_internals.distributed import (
    context_parallel_is_active,
    context_parallel_mesh,
    is_replicated_implicitly,
)
from sage_inductor.torch_internals.sdpa import builtin_sdpa

# The end of errors about a rank that would attend to its own shard of the sequence.
CONTEXT_PARALLEL = "inside torch's context_parallel, where every rank holds a part of the sequence and would attend to that part alone"


# Defaults that Dynamo meets are ints: it makes symbols of floats with dynamic=True, and compiles twice.
def sage_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kernel: str = "auto",
    precision: str = "auto",
    smoothing: str = "auto",
    wires: str = "inputs",
    return_lse: bool = False,
    out: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    skip_threshold: float = 0,
    skip_by: str = "scores",
) -> Tensor | tuple[Tensor, Tensor]:
    """8-bit attention with SDPA's arguments and semantics.

    Args:
        query: `[batch, heads, q_len, head_dim]`, or the same without batch, or without batch and heads; or with more dims
            in front. Those in front of q_len broadcast among query, key and value, as SDPA's do.
        key: `[batch, kv_heads, kv_len, head_dim]`; kv_heads is heads, or a divisor of it with `enable_gqa`.
        value: `[batch, kv_heads, kv_len, value_head_dim]`. All three float16, bfloat16 or float32, in any
            memory layout.
        attn_mask: bool (True: attend) or additive, broadcasts to `[batch, heads, q_len, kv_len]`, or a causal bias of
            `torch.nn.attention.bias`. A query that may attend no key gets 0.
        dropout_p: only 0 can be served by a quantised kernel.
        is_causal: query i sees keys 0 .. i (top-left alignment); excludes attn_mask.
        scale: factor of the scores, `head_dim ** -0.5` when None.
        kernel: "auto" takes the first kernel that can run and is expected to win, and is exact SDPA where
            there is none; a name ("hopper", "triton", "sageattention", "reference") runs that kernel.
        precision: "fast", "balanced" or "accurate"; "auto" is the fastest of them that the GPU has.
        smoothing: "auto", "mean", "equalise", "rotate" or "both", as `Config.smoothing`: what keeps outliers in the channels of Q and K
            from taking the steps of all others.
        wires: "inputs" or "8-bit", as `Config.wires`: how keys and values travel in a ring of ranks (torch's `context_parallel`,
            DTensors). It means nothing elsewhere.
        return_lse: also return the natural log of the softmax denominators, fp32 `[batch, heads, q_len]`.
        out: written and returned instead of a new tensor, `[batch, heads, q_len, value_head_dim]` in any
            strides.
        query_segments: int32 `[batch, q_len]` (`[q_len]` for a query without batch), with key_segments: query i of a sequence
            attends to the keys of its own id only, beside what attn_mask and is_causal leave. Packed sequences count up, as
            in `[0, 0, 0, 1, 1]`; any numbers in any order are valid. A query of an id that no key has gets 0. Of the GPU
            kernels "triton" takes segments; "auto" computes exact attention, with a mask of q_len * kv_len bools.
        key_segments: int32 `[batch, kv_len]`, or `[kv_len]`.
        skip_threshold: from 0, which leaves nothing out, to below 1, as `Config.skip_threshold`: tiles in which no weight reaches
            this part of the largest one so far are left out. "hopper", "triton" and "reference" can.
        skip_by: "scores" or "sample", as `Config.skip_by`: what decides which tiles these are.

    Returns:
        `[batch, heads, q_len, value_head_dim]` in query's dtype and memory order; with `return_lse` a pair.

    Raises:
        NotEligibleError: a kernel asked for by name cannot run; it holds every reason. So do `return_lse` and `out` where exact attention is
            needed: for dropout, gradients and tangents of forward-mode AD.
        RuntimeError: the inputs or out do not fit together, as from SDPA, or are nested or sparse; or the call is compiled inside
            `torch.distributed.tensor.experimental.context_parallel`, where each rank has a shard of the sequence. A call that
            is not compiled rings there; NotImplementedError where it cannot (a mask).
        TypeError: an input or out is no tensor, scale no number.
        ValueError: an unknown kernel, precision, smoothing, wires or skip_by, a skip_threshold or dropout_p that is none, an is_causal or
            enable_gqa that is no bool.
    """
    required = {"query": query, "key": key, "value": value}
    optional = {
        "attn_mask": attn_mask,
        "query_segments": query_segments,
        "key_segments": key_segments,
        "out": out,
    }
    for name, tensor in (required | optional).items():
        check_tensor(name, tensor, name in optional)
        if tensor is not None and (tensor.is_nested or tensor.layout != torch.strided):
            raise RuntimeError(f"{name} is nested or sparse (valid: a strided tensor that is not nested)")
    check_choice("kernel", kernel, ("auto", *kernels.KERNELS))
    check_choice("precision", precision, kernels.PRECISION_CHOICES)
    check_choice("smoothing", smoothing, kernels.SMOOTHINGS)
    check_choice("wires", wires, WIRES)
    skip_threshold, dropout_p, scale = as_number(skip_threshold), as_number(dropout_p), as_scale(scale)
    is_causal, enable_gqa = as_flag("is_causal", is_causal), as_flag("enable_gqa", enable_gqa)
    if problem := threshold_problem(skip_threshold) or decider_problem(skip_by):
        raise ValueError(problem)
    if attn_mask is not None and is_causal:
        raise RuntimeError("sage_attention: attn_mask and is_causal=True exclude each other")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p={dropout_p!r} (valid: 0 to 1)")
    if return_lse and out is not None:
        raise ValueError("return_lse=True with out: only one of them is valid")

    has_segments = query_segments is not None or key_segments is not None
    dims = max(tensor.dim() for tensor in required.values())
    if has_segments and dims > 4:
        raise RuntimeError(f"sage_attention: segments of inputs with {dims} dims (valid: 2 to 4)")

    if not is_dtensor(query) and in_context_parallel():
        if torch.compiler.is_compiling():  # Dynamo then leaves the call to Python, unless told fullgraph=True
            raise RuntimeError(
                f"sage_attention compiled {CONTEXT_PARALLEL} (valid: F.scaled_dot_product_attention there, which "
                'torch.compile(backend="sage_inductor") rewrites; sage_attention that is not compiled; either outside)'
            )
        if has_segments:
            raise NotImplementedError(f"sage_attention with segments {CONTEXT_PARALLEL} (valid: none)")
        return _around_ring(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            kernel=kernel, precision=precision, smoothing=smoothing, wires=wires, return_lse=return_lse, out=out,
            skip_threshold=skip_threshold, skip_by=skip_by,
        )  # fmt: skip
    bottom_right = False
    if type(attn_mask) is not Tensor and attn_mask is not None:
        attn_mask, is_causal, bottom_right = _seen_through(attn_mask, query, key, is_causal)
    needs = _needs_of_exact_attention(query, key, value, attn_mask, dropout_p)
    if needs:
        if kernel != "auto" or return_lse or out is not None:
            raise NotEligibleError(f"kernel={kernel}", needs)
        if bottom_right and query.shape[-2] != key.shape[-2]:
            lengths = query.shape[-2], key.shape[-2]
            attn_mask = torch.ones(lengths, dtype=torch.bool, device=query.device).tril(
                lengths[1] - lengths[0]
            )
            is_causal = False
        if has_segments:
            validate_segments(query, key, query_segments, key_segments)
            assert query_segments is not None and key_segments is not None
            same = same_segment(query_segments, key_segments)
            attn_mask, is_causal = combined_mask(query, key, attn_mask, None, 0 if is_causal else None, same)
        return builtin_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    has_dtensors = any(map(is_dtensor, required.values()))
    if has_dtensors:
        are_taught()
    given = folded(query, key, value, cast_as_sdpa(attn_mask), enable_gqa)
    inputs = (given.query, given.key, given.value, given.attn_mask, is_causal)
    options: dict[str, Any] = {
        "scale": scale,
        "enable_gqa": given.enable_gqa,
        "bottom_right": bottom_right,
        "kernel_name": kernel,
        "precision": precision,
        "smoothing": smoothing,
        "skip_threshold": skip_threshold,
        "skip_by": skip_by,
    }
    if has_dtensors:
        options["wires"] = wires
    if has_segments:
        options |= {"query_segments": query_segments, "key_segments": key_segments}
    if return_lse:
        result, lse = inference.attention_lse(*inputs, **options, memory_order=given.memory_order)
        return given.unfolded(result), given.unfolded(lse, rows_only=True)
    if out is not None:
        buffer = None if is_dtensor(out) else given.buffer(out)
        if buffer is not None:
            inference.attention_out(*inputs, **options, output=buffer)
            return out
        return out.copy_(given.unfolded(inference.attention(*inputs, **options)))
    return given.unfolded(inference.attention(*inputs, **options, memory_order=given.memory_order))


def in_context_parallel() -> bool:
    """Whether a call of SDPA now would be taken, by torch's `context_parallel`, for one on shards of the sequence."""
    # The function is read by its name, so that Dynamo traces anew where another one stands there, as in that context.
    return F.scaled_dot_product_attention is not builtin_sdpa and context_parallel_is_active()


def refuse_context_parallel() -> None:
    """Raises RuntimeError in torch's `context_parallel`: attention must see the whole sequence."""
    if in_context_parallel():
        raise RuntimeError(f"attention {CONTEXT_PARALLEL} (valid: F.scaled_dot_product_attention there)")


def _around_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    out: Tensor | None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sage_attention` of this rank's shards of a sequence, inside an active `context_parallel`. Inputs become DTensors, as those
    of SDPA do there, and the output is this rank's part of theirs. Raises NotImplementedError for what no ring computes, such as a
    mask."""
    from torch.distributed.tensor import DTensor, Shard

    mesh, seq_dim = context_parallel_mesh()
    if query.dim() != seq_dim + 2:
        raise NotImplementedError(
            f"sage_attention of {query.dim()} dimensions {CONTEXT_PARALLEL} (valid: {seq_dim + 2}: it shards dim {seq_dim})"
        )
    shards = [
        DTensor.from_local(tensor, mesh, [Shard(seq_dim)], run_check=False) for tensor in (query, key, value)
    ]
    if attn_mask is not None:
        raise NotImplementedError(
            f"sage_attention with attn_mask {CONTEXT_PARALLEL} (valid: is_causal, or no mask)"
        )
    found = sage_attention(shards[0], shards[1], shards[2], **options)
    if isinstance(found, tuple):
        return found[0].to_local(), found[1].to_local()  # type: ignore[attr-defined]
    local: Tensor = found.to_local()  # type: ignore[attr-defined]
    return local if out is None else out.copy_(local)


def _seen_through(
    attn_mask: Tensor, query: Tensor, key: Tensor, is_causal: bool
) -> tuple[Tensor | None, bool, bool]:
    """(attn_mask, is_causal, bottom_right) of a mask that is a subclass of Tensor. `causal_lower_right` and `causal_upper_left`
    of `torch.nn.attention.bias` hold no data: they mean causality. Raises RuntimeError for one of other lengths."""
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal, False
    lengths, expected = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if lengths != expected:
        raise RuntimeError(
            f"sage_attention: attn_mask is a causal bias for lengths {lengths}, not {expected}"
        )
    return None, True, attn_mask.variant == CausalVariant.LOWER_RIGHT


def _needs_of_exact_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> list[str]:
    """Reasons for exact attention: dropout, gradients, and subclasses of Tensor, which carry out SDPA in their own way."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    are_sharded = [is_dtensor(tensor) for tensor in present.values()]
    sharded = all(are_sharded) or (any(are_sharded) and is_replicated_implicitly())
    valid = "plain tensors, or DTensors alone"
    if any(are_sharded):
        valid += ", but for implicit_replication()"
    reasons = [
        reason(f"type of {name}", type(tensor).__name__, valid)
        for name, tensor in present.items()
        if not sharded and dispatches_itself(tensor)
    ]
    if dropout_p > 0.0:
        reasons.append(reason("dropout_p", dropout_p, 0.0))
    wanting = gradient_problem(query=query, key=key, value=value, attn_mask=attn_mask)
    return reasons if wanting is None else [*reasons, wanting]
