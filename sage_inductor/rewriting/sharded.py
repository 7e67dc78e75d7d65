"""Attention of DTensors as one rank sees it: its part of each input, in the layout that the operator will choose."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, tracing
from sage_inductor.graph.sizes import all_in_memory_order, is_dense, memory_order, size_hint
from sage_inductor.kernels import AttentionProblem, TensorSpec
from sage_inductor.kernels.base import reason
from sage_inductor.operators.sharded import are_taught, is_dtensor
from sage_inductor.rewriting.masks.mask import Mask


@dataclass(frozen=True)
class Seen:
    """A call and its mask as kernels are to judge it: of plain tensors, which are this rank's parts where the model has
    DTensors. `reasons` speak against it."""

    call: AttentionCall
    mask: Mask
    reasons: tuple[str, ...] = ()
    gives_lse: bool = False
    """Whether the parts of a ring are merged by their LSE."""
    placements: tuple[str, str, str] = ("", "", "")
    """Of query, key and value in the model: "tp=2: S(1)"."""
    whole: str = ""
    """What the ranks have in common where each has a part of it: whole shapes and placements."""
    moves_to: tuple[int, ...] | None = None
    """The dims by which the graph has the output sharded, one for each dim of its mesh (-1: replicated), where the operator
    leaves it otherwise."""


def on_this_rank(call: AttentionCall, mask: Mask) -> Seen:
    """`call` as this rank carries it out. Whatever holds no DTensors is as it was."""
    if not is_dtensor(example_tensor(call.query)):  # this is asked for every site
        return Seen(call, mask)
    named = _inputs(call, mask)
    if not all(map(is_dtensor, named.values())):  # a mixture is refused for the type of its tensors
        return Seen(call, mask)
    placements = (_described(named["query"]), _described(named["key"]), _described(named["value"]))
    whole = "; ".join(
        f"{name} {tuple(map(str, tensor.shape))} {_described(tensor)}" for name, tensor in named.items()
    )
    output: Any = call.output()
    seen = Seen(call, mask, placements=placements, whole=whole)
    if call.lse is not None:
        kinds = reason("type of query, key, value", "DTensor", "plain tensors where a fused kernel is called")
        return replace(seen, reasons=(kinds,))
    if not is_dtensor(output):
        return replace(seen, reasons=(reason("type of the output", type(output).__name__, "a DTensor"),))
    if _dims(output) is None:
        return replace(
            seen, reasons=(reason("placements of the output", _described(output), "Shard and Replicate"),)
        )
    are_taught()
    from sage_inductor.operators.distributed.handler import is_outside, layout_of

    if is_outside(output.device_mesh):
        return replace(seen, reasons=(reason("this rank", "outside", f"those of {output.device_mesh}"),))
    options = {
        "is_causal": mask.is_causal,
        "window_left": mask.window_left,
        "window_right": mask.window_right,
    }
    try:
        layout = layout_of(named, options)
    except NotImplementedError as error:
        return replace(seen, reasons=(str(error),))
    dims = named["query"].dim()
    outcome = layout.placements("output", output.shape, dims)
    moved = [(name, tensor, layout.placements(name, tensor.shape, dims)) for name, tensor in named.items()]
    moved += [("output", output, outcome)]
    symbolic = [name for name, tensor, then in moved if _moves_symbolic_sizes(tensor, then)]
    if symbolic:
        # torch 2.13 compiles what moves them to code that fails where ranks run it.
        kinds = reason(
            f"placements of {', '.join(symbolic)}", "changed along a symbolic size", "known sizes there"
        )
        return replace(seen, reasons=(kinds,))
    local = {
        name: _part(tensor, layout.placements(name, tensor.shape, dims)) for name, tensor in named.items()
    }
    order = memory_order(output) if is_dense(output, memory_order(output)) else None
    with tracing(output):
        shape = (*local["query"].shape[:-1], local["value"].shape[-1])
        part = (
            output.to_local()
            if order is None
            else torch.empty_permuted(shape, order, dtype=output.dtype, device=output.device)
        )
        if output.requires_grad and not part.requires_grad:
            part.requires_grad_()

    def seen_as(name: str, item: Value) -> Expr:
        return Expr("to_local", (item,), value=local[name])

    judged = dataclasses.replace(
        call,
        query=seen_as("query", call.query),
        key=seen_as("key", call.key),
        value=seen_as("value", call.value),
        sink=None if call.sink is None else seen_as("sink", call.sink),
        attn_mask=None
        if call.attn_mask is None
        else Expr("to_local", (call.attn_mask,), value=_mask_part(call, layout, dims)),
        output_value=part,
    )
    read: dict[str, Any] = {
        name: seen_as(name, item)
        for name in ("attn_mask", "query_segments", "key_segments")
        if (item := getattr(mask, name)) is not None
    }
    return replace(
        seen,
        moves_to=None if outcome == tuple(output.placements) else tuple(_dims(output) or ()),
        call=judged,
        mask=replace(mask, **read),
        gives_lse="ring" in layout.divisions,
    )


def ring_parts(problem: AttentionProblem) -> list[AttentionProblem]:
    """The other problems that a ring makes of `problem`, this rank's own part: all keys of another rank; where ranks hold a
    chunk from the head and one from the tail of a causal sequence, half of them, or all of them for half of the queries."""
    if not problem.params.is_causal:
        return []
    params = replace(problem.params, is_causal=False)
    q, k, v = (_halved(spec) for spec in (problem.query, problem.key, problem.value))
    return [
        replace(problem, params=params),
        replace(problem, params=params, query=q),
        replace(problem, params=params, key=k, value=v),
    ]


def _halved(spec: TensorSpec) -> TensorSpec:
    *outer, length, dim = spec.shape
    return replace(spec, shape=(*outer, length // 2, dim))


def _inputs(call: AttentionCall, mask: Mask) -> dict[str, Any]:
    items = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "attn_mask": mask.attn_mask,
        "sink": call.sink,
        "query_segments": mask.query_segments,
        "key_segments": mask.key_segments,
    }
    return {name: example_tensor(item) for name, item in items.items() if item is not None}


def _mask_part(call: AttentionCall, layout: Any, dims: int) -> Tensor | None:
    mask = example_tensor(call.attn_mask)
    if not is_dtensor(mask):
        return mask
    assert mask is not None
    return _part(mask, layout.placements("attn_mask", mask.shape, dims))


def _part(tensor: Any, placements: Any) -> Tensor:
    """This rank's part of a traced DTensor that is brought to `placements`; nothing is sent. Where parts are of several sizes it has
    the largest, so that all ranks decide alike: one that stays sends otherwise, and leaves the others waiting."""
    wants_gradients = tensor.requires_grad
    with tracing(tensor), torch.no_grad():
        part: Tensor = tensor.redistribute(placements=placements).to_local().detach()
        largest = list(tensor.shape)
        for mesh_dim, placement in enumerate(placements):
            if placement.is_shard():
                largest[placement.dim] = -(-largest[placement.dim] // tensor.device_mesh.size(mesh_dim))
        if [*map(size_hint, part.shape)] != [*map(size_hint, largest)]:
            order = all_in_memory_order(part)
            part = torch.empty_permuted(largest, order, dtype=part.dtype, device=part.device)
        return part.requires_grad_() if wants_gradients else part


def _moves_symbolic_sizes(tensor: Any, placements: Any) -> bool:
    """Whether `tensor` comes to be sharded otherwise along a dim whose size is symbolic."""
    if tuple(tensor.placements) == tuple(placements):
        return False
    touched = [item.dim for item in (*tensor.placements, *placements) if item.is_shard()]
    return any(not isinstance(tensor.shape[dim], int) for dim in touched)


def _dims(tensor: Any) -> list[int] | None:
    """The dim that each placement shards; None where one is neither Shard nor Replicate."""
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        return None
    return [placement.dim if placement.is_shard() else -1 for placement in tensor.placements]


def _described(tensor: Any) -> str:
    """ "dp=4: S(0), tp=2: R": the dims of the mesh, their sizes, and the placement along each."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    return ", ".join(
        f"{name and name + '='}{mesh.size(dim)}: {_short(placement)}"
        for dim, (name, placement) in enumerate(zip(names, tensor.placements, strict=True))
    )


def _short(placement: Any) -> str:
    return (
        "R" if placement.is_replicate() else f"S({placement.dim})" if placement.is_shard() else str(placement)
    )
