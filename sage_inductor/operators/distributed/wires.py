"""A ring whose keys and values travel in 8 bits.

Each rank quantises its shard once, sends it on as bytes, and attends to what comes around as it came. That is about half of what
bf16 takes, and a shard is not quantised again by each rank that receives it. K's mean, which is subtracted before, and the
factors that even channels are the shard's own. So each rank quantises its queries for each shard: what the mean took from their
scores is put back into the LSE of that part, which makes merging the parts exact, and queries are multiplied by the very factors
that the keys were divided by. Factors in common would save that pass over the queries (a hundredth of a step) and cost all ranks
a collective that they wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.smoothing import EQUALISING, resolved_smoothing
from sage_inductor.operators.prequantized import (
    attention_prequantized_op,
    can_prequantize,
    quantize_key_value_op,
)
from sage_inductor.operators.schemas import EXACT
from sage_inductor.torch_internals.distributed import arrived, sent_to_next

SEQ = 2  # of `[batch, heads, seq, head_dim]`


def kernel_of_wires(
    query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
) -> tuple[str, str] | None:
    """(kernel, precision) with which this rank's shards go around in 8 bits; None where attention is exact: for kernel "auto"
    where there is no faster one, for lengths below `min_q_len` or `min_kv_len`. Ranks whose shards and GPUs are alike find the
    same. Raises NotEligibleError for a kernel asked for by name that cannot do it, and for a skip_threshold."""
    name = options.get("kernel_name", "auto")
    if threshold := options.get("skip_threshold"):
        raise NotEligibleError(
            f'kernel={name} with wires="8-bit"', [reason("skip_threshold", threshold, "0")]
        )
    least = options.get("min_q_len", 0), options.get("min_kv_len", 0)
    if name == EXACT or query.shape[SEQ] < least[0] or key.shape[SEQ] < least[1]:
        return None
    tensors = query, key, value
    return _kernel_for(
        tuple([tuple(tensor.shape) for tensor in tensors]),
        tuple([tuple(tensor.stride()) for tensor in tensors]),
        query.dtype,
        query.device,
        name,
        options.get("precision", "fast"),
        options.get("smoothing", "auto"),
        bool(options.get("or_exact")),
    )


def _kernel_for(
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    name: str,
    precision: str,
    smoothing: str,
    or_exact: bool,
) -> tuple[str, str] | None:
    precision = kernels.precision_on(device, precision, name)
    query, key, value = (
        TensorSpec(shape, stride, dtype, device) for shape, stride in zip(shapes, strides, strict=True)
    )
    params = AttentionParams(precision=precision, smoothing=smoothing)
    chosen, reasons = kernels.select(AttentionProblem(query, key, value, None, params, True), name)
    if chosen is not None or name != "auto":
        reasons = can_prequantize(kernels.get(name) if chosen is None else chosen) or reasons
    if not reasons:
        assert chosen is not None
        return chosen.name, precision
    if name == "auto" or (chosen is None and or_exact):
        return None
    raise NotEligibleError(f'kernel={name} with wires="8-bit"', reasons)


# Dynamo calls it while tracing, and takes what it returns for a constant.
_kernel_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    group: Any,
    rank: int,
    ranks: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: str,
    precision: str,
    smoothing: str = "auto",
    scale: float | None = None,
    is_causal: bool = False,
    is_balanced: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, LSE) of this rank's queries `[batch, heads, seq / ranks, head_dim]` to the keys of all ranks of `group`, of which
    it is number `rank` of `ranks`. With `is_balanced` each rank's shard is a chunk from the head of the sequence and one from its
    tail, as torch's `context_parallel` balances causal attention. The output is dense, float32 inside and rounded at the end.
    """
    smoothing = resolved_smoothing(smoothing, kernels.get(kernel).smoothings)
    how = {"kernel_name": kernel, "precision": precision, "smoothing": smoothing}
    evened = query if smoothing in EQUALISING else None
    packed = quantize_key_value_op(key, value, evened, **how)
    keys = key.shape[SEQ]

    def part(query: Tensor, packed: Tensor, kv_len: int, causal: bool) -> Any:
        return attention_prequantized_op(
            query, packed, kv_heads=key.shape[1], kv_len=kv_len, stored_len=keys, value_head_dim=value.shape[-1],
            is_causal=causal, scale=scale, **how,
        )  # fmt: skip

    half, late = keys // 2, slice(query.shape[SEQ] // 2, None)
    output = lse = coming = None
    for turn in range(ranks):
        if coming is not None:
            packed = arrived(coming)  # the shard of the rank that is `turn` before this one
        if turn < ranks - 1:
            coming = sent_to_next(packed, group, rank, ranks)  # on its way while this one is attended to
        if output is None or lse is None:
            output, lse = part(query, packed, keys, is_causal)
            output = output.float()
        elif not is_causal:
            _merge(output, lse, *part(query, packed, keys, False))
        elif turn <= rank:  # of a rank before this one: all of it, or its chunk from the head
            _merge(output, lse, *part(query, packed, half if is_balanced else keys, False))
        elif is_balanced:  # of a rank behind: the queries from the tail see all of it
            _merge(output[:, :, late], lse[:, :, late], *part(query[:, :, late], packed, keys, False))
    assert output is not None and lse is not None
    return output.to(query.dtype), lse


def _merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put a part into `output` and `lse`, in place."""
    # A row that has seen no key in either, whose LSE are -inf, would become NaN.
    gap = torch.where(part_lse == lse, 0.0, part_lse - lse)
    output.lerp_(part.float(), torch.sigmoid(gap).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))
