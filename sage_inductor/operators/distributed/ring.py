"""Attention whose sequence is sharded over the ranks of a ring, as torch's `context_parallel` shards it.

Forward, torch's own ring sends keys and values around; each part is attended to by our operator, and parts are merged by
their LSE. (Ring Attention, Liu et al. 2023.) With wires="8-bit" the ring is that of wires.py. Backward, every rank gathers keys and
values, takes the exact gradient of its queries, and sends back what belongs to others: the sums need no LSE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from sage_inductor.graph.sizes import size_hint
from sage_inductor.kernels.base import reason
from sage_inductor.operators import inference
from sage_inductor.operators.distributed.layouts import Layout
from sage_inductor.operators.distributed.wires import around, kernel_of_wires
from sage_inductor.operators.inputs import empty_output
from sage_inductor.operators.schemas import WIRES
from sage_inductor.operators.training import empty_gradients
from sage_inductor.torch_internals.distributed import context_parallel_is_balanced, ring_attention

SEQ = 2  # of `[batch, heads, seq, head_dim]`, to which torch's ring is bound
# Options of an operator that say something about the whole output, or the whole sequence.
_OF_THE_WHOLE = ("is_causal", "memory_order", "gradient_order", "sink")


def not_supported_reasons(tensors: Mapping[str, Any], options: Mapping[str, Any], mesh_dim: int) -> list[str]:
    """Every reason why attention of these DTensors has no ring along `mesh_dim`; empty where it has."""
    query, key = tensors["query"], tensors["key"]
    none = ("attn_mask", "sink", "query_segments")
    reasons = [reason(name, "given", "none in a ring") for name in none if name in tensors]
    for name in ("window_left", "window_right"):
        if options.get(name, -1) >= 0:
            reasons.append(reason(name, options[name], "none in a ring"))
    if query.dim() != 4:
        reasons.append(reason("dimensions", query.dim(), "4 in a ring"))
        return reasons
    is_causal = bool(options.get("is_causal"))
    if is_causal and size_hint(query.shape[SEQ]) != size_hint(key.shape[SEQ]):
        reasons.append(reason("kv_len", key.shape[SEQ], f"q_len={query.shape[SEQ]} in a ring that is causal"))
    balanced = context_parallel_is_balanced()
    if balanced and not is_causal:
        reasons.append("is_causal=False (supported: True where context_parallel balances the load)")
    parts = query.device_mesh.size(mesh_dim) * (2 if balanced else 1)
    for name, tensor in (("q_len", query), ("kv_len", key)):
        if (size_hint(tensor.shape[SEQ]) or 0) % parts:
            reasons.append(reason(name, tensor.shape[SEQ], f"multiples of {parts} in this ring"))
    return reasons


def attend(
    operator: Any, local: Mapping[str, Tensor], options: Mapping[str, Any], mesh: Any, layout: Layout
) -> Any:
    """What `operator` gives for this rank's shards `local` of a sequence that the ranks along the ring have together."""
    mesh_dim = layout.divisions.index("ring")
    if operator is torch.ops.sage_inductor.attention_backward.default:
        return _backward(local, options, mesh, mesh_dim)
    query, key, value = (local[name] for name in ("query", "key", "value"))
    is_causal, group = bool(options.get("is_causal")), mesh.get_group(mesh_dim)
    wires = options.get("wires", "inputs")
    if wires not in WIRES:
        raise ValueError(f"wires={wires!r} (valid: {', '.join(WIRES)})")
    found = kernel_of_wires(query, key, value, options) if wires == "8-bit" else None
    each = {name: item for name, item in options.items() if name not in (*_OF_THE_WHOLE, "bottom_right")}

    def part(query: Tensor, key: Tensor, value: Tensor, is_causal: bool | None = False, **_: Any) -> Any:
        return inference.attention_lse(query, key, value, None, bool(is_causal), **each)

    with torch.no_grad():
        if found is None:
            output, lse = ring_attention(group, part, query, key, value, is_causal)
        else:
            output, lse = around(
                group, mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), query, key, value, is_causal=is_causal,
                is_balanced=context_parallel_is_balanced(), scale=options.get("scale"), kernel_name=found.kernel,
                precision=found.precision, smoothing=found.smoothing, wires=wires,
            )  # fmt: skip
    # Merging leaves other strides.
    expected = empty_output(query, value, options.get("memory_order"))
    if output.stride() != expected.stride():
        output = expected.copy_(output)
    return (output, lse) if operator is torch.ops.sage_inductor.attention_lse.default else output


def _backward(local: Mapping[str, Tensor], options: Mapping[str, Any], mesh: Any, mesh_dim: int) -> Any:
    """Gradients of this rank's shards of query, key and value, each in the strides that the operator gives them."""
    if mesh.ndim > 1 and mesh.mesh_dim_names is None:
        raise NotImplementedError(
            f"gradients of attention around one dim of {mesh} (valid: a mesh whose dims have names, or one of one dim)"
        )
    ring = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[mesh_dim]]
    ranks, rank = ring.size(), ring.get_local_rank()
    key, value = (_gathered(local[name], ring) for name in ("key", "value"))
    is_causal = bool(options["is_causal"])
    # The numbers of the chunks that the ranks hold, one behind the other, of the sequence in its own order.
    held = [(rank,) for rank in range(ranks)]
    if context_parallel_is_balanced():
        held = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]  # type: ignore[misc]
    order = [chunk for chunks in held for chunk in chunks]
    if is_causal:
        back = [order.index(chunk) for chunk in range(len(order))]
        key, value = _reordered(key, back), _reordered(value, back)
    sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value)]
    of_queries = []
    mine = held[rank] if is_causal else (len(order) - 1,)
    parts = (local[name].chunk(len(mine), SEQ) for name in ("query", "grad_output"))
    for chunk, query, gradient in zip(mine, *parts, strict=True):
        seen = key.shape[SEQ] // len(order) * (chunk + 1)  # keys up to the last query of the chunk
        given = {
            **options,
            "attn_mask": None,
            "gradient_order": None,
            "bottom_right": is_causal,
            "grad_output": gradient,
            "query": query,
            "key": key[:, :, :seen],
            "value": value[:, :, :seen],
        }
        dq, dk, dv = torch.ops.sage_inductor.attention_backward(**given)
        of_queries.append(dq)
        for total, one in zip(sums, (dk, dv), strict=True):
            total[:, :, :seen] += one
    if is_causal:
        sums = [_reordered(total, order) for total in sums]
    shards = [
        DTensor.from_local(total, ring, [Partial()], run_check=False)
        .redistribute(placements=[Shard(SEQ)])
        .to_local()
        for total in sums
    ]
    gradients = torch.cat(of_queries, SEQ), *shards
    inputs = [local[name] for name in ("query", "key", "value")]
    empty = empty_gradients(inputs, options["gradient_order"])
    return tuple(into.copy_(one) for into, one in zip(empty, gradients, strict=True))


def _gathered(shard: Tensor, ring: Any) -> Tensor:
    """The whole sequence, in the order in which the ranks hold it."""
    whole = DTensor.from_local(shard.contiguous(), ring, [Shard(SEQ)], run_check=False)
    return whole.redistribute(placements=[Replicate()]).to_local()


def _reordered(tensor: Tensor, order: list[int]) -> Tensor:
    chunks = tensor.chunk(len(order), SEQ)
    return torch.cat([chunks[chunk] for chunk in order], SEQ)
