"""What DTensor does with our operators: bring each input to the layout that is chosen, run the operator on what this rank
has of them, and say what the result is a shard of.

It stands in DTensor's table of operators that are handled by hand, not in that of sharding strategies: a strategy's cache
goes by tensors and the arguments that it is told of, keyword tensors (a sink) keep the placements they had, and inside
`context_parallel` a strategy alone gives every rank attention to its own part of the sequence, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sage_inductor.graph.sizes import all_in_memory_order, differ, known, memory_order
from sage_inductor.operators.distributed import ring
from sage_inductor.operators.distributed.layouts import Layout, choose, ring_dim
from sage_inductor.operators.validation import misfit, validate
from sage_inductor.torch_internals.distributed import handle_dtensors, is_replicated_implicitly, rings_are_on
from sage_inductor.torch_internals.operators import bound_arguments

TENSORS = (
    "query", "key", "value", "attn_mask", "sink", "query_segments", "key_segments", "grad_output",
)  # fmt: skip
# `ring` has imported both modules that define them.
OPERATORS = (
    torch.ops.sage_inductor.attention.default,
    torch.ops.sage_inductor.attention_lse.default,
    torch.ops.sage_inductor.attention_training.default,
    torch.ops.sage_inductor.attention_backward.default,
)
# Those whose gradients an attention_backward returns, in order.
_DIFFERENTIABLE = ("query", "key", "value")


def register() -> None:
    """Teach DTensor our operators. Raises RuntimeError where this torch's DTensor is not as known."""
    handle_dtensors(OPERATORS, _handle)


def _handle(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bound = bound_arguments(operator, args, kwargs)
    tensors = _tensors(bound)
    options = {name: value for name, value in bound.items() if name not in TENSORS}
    is_backward = operator is torch.ops.sage_inductor.attention_backward.default
    # In memory, results lie as the whole inputs do: what has been sent lies in an order of its own.
    orders = {name: memory_order(tensors[name], guarded=True) for name in _DIFFERENTIABLE}
    if is_backward:
        if options["gradient_order"] is None:
            options["gradient_order"] = [dim for order in orders.values() for dim in order]
    else:
        _validate(tensors, bool(options["enable_gqa"]))
        if options["memory_order"] is None:
            options["memory_order"] = orders["query"]
    layout = layout_of(tensors, options)
    mesh, dims = tensors["query"].device_mesh, tensors["query"].dim()
    if is_outside(mesh):
        empty = tensors["query"].to_local().new_empty(0)
        results: Any = (empty,) * len(operator._schema.returns)
    else:
        results = _of_parts(operator, tensors, options, layout)
    if is_backward:
        given = options["gradient_order"]
        return tuple(
            _gradient(gradient, tensors[name], layout, name, given[start : start + dims])
            for gradient, name, start in zip(results, _DIFFERENTIABLE, range(0, 3 * dims, dims), strict=True)
        )
    shape = (*tensors["query"].shape[:-1], tensors["value"].shape[-1])
    placements = layout.placements("output", shape, dims)
    output, *lse = (results,) if isinstance(results, Tensor) else results
    wrapped = _wrapped(output, mesh, placements, shape, options["memory_order"])
    if len(operator._schema.returns) == 1:
        return wrapped
    return wrapped, _wrapped(lse[0], mesh, placements, shape[:-1], range(dims - 1))


def _of_parts(operator: Any, tensors: Mapping[str, Any], options: Mapping[str, Any], layout: Layout) -> Any:
    """What `operator` gives for this rank's parts of `tensors`."""
    query = tensors["query"]
    with torch.no_grad():
        local = {
            name: _part(tensor, layout.placements(name, tensor.shape, query.dim()))
            for name, tensor in tensors.items()
        }
    if "ring" in layout.divisions:
        return ring.attend(operator, local, options, query.device_mesh, layout)
    if operator is torch.ops.sage_inductor.attention_backward.default:
        without_mask = {name: tensor for name, tensor in local.items() if name != "attn_mask"}
        return operator(attn_mask=local.get("attn_mask"), **without_mask, **options)
    return operator(**local, **options)


def is_outside(mesh: Any) -> bool:
    """Whether this rank has no part of the DTensors on `mesh`: it is none of its ranks."""
    return mesh.get_coordinate() is None


def _validate(tensors: Mapping[str, Any], enable_gqa: bool) -> None:
    """Raise RuntimeError for whole inputs that do not fit together. Their parts may: of a mask of 2 sequences beside a query of
    4 each of two ranks has one, which broadcasts."""
    query, key, value = (tensors[name] for name in _DIFFERENTIABLE)
    optional = (tensors.get(name) for name in ("query_segments", "key_segments"))
    validate(query, key, value, tensors.get("attn_mask"), enable_gqa, None, *optional)
    if (sink := tensors.get("sink")) is not None:
        rows = query.shape[:-1]
        sizes = zip(reversed(sink.shape), reversed(rows), strict=False)
        if sink.dim() > len(rows) or any(known(size) != 1 and differ(size, row) for size, row in sizes):
            raise misfit(f"sink {tuple(sink.shape)} does not broadcast to the rows {tuple(rows)}")


def _part(tensor: Any, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of a DTensor that is brought to `placements`. It is detached before: one that requires gradients is
    given back as such by `redistribute`, and below autograd, where this runs, torch 2.11 cannot take that from it again
    ("aten.detach_ does not have a sharding strategy")."""
    if tuple(tensor.placements) != tuple(placements):
        tensor = tensor.detach().redistribute(placements=placements)
    local: Tensor = tensor.to_local()
    return local


def layout_of(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Layout:
    """The layout for an operator given `tensors`. Raises NotImplementedError for a ring that attention with these options
    does not have."""
    query, key, value = (tensors[name] for name in _DIFFERENTIABLE)
    around = ring_dim(query, key, value) if rings_are_on() else None
    if around is not None:
        reasons = ring.not_supported_reasons(tensors, options, around)
        if reasons:
            raise NotImplementedError(
                f"attention with its sequence sharded over ranks: {'; '.join(reasons)}. Outside of context_parallel keys and "
                "values are gathered"
            )
    return choose(tensors, is_banded(options), around)


def is_banded(options: Mapping[str, Any]) -> bool:
    """Whether which keys a query sees depends on where it stands."""
    windows = (options.get("window_left", -1), options.get("window_right", -1))
    return bool(options.get("is_causal")) or max(windows) >= 0


def _tensors(bound: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors among the arguments, as DTensors on one mesh. Raises RuntimeError for others."""
    found = {name: bound[name] for name in TENSORS if bound.get(name) is not None}
    meshes = [tensor.device_mesh for tensor in found.values() if isinstance(tensor, DTensor)]
    plain = [name for name, tensor in found.items() if not isinstance(tensor, DTensor)]
    if plain and not is_replicated_implicitly():
        raise RuntimeError(
            f"sage_inductor attention: {', '.join(plain)} is a plain tensor beside DTensors (valid: DTensors alone, or "
            "implicit_replication())"
        )
    for name, tensor in found.items():
        if name in plain:
            whole = [Replicate()] * meshes[0].ndim
            found[name] = DTensor.from_local(tensor, meshes[0], whole, run_check=False)
        elif tensor.device_mesh != meshes[0]:
            raise RuntimeError(
                f"sage_inductor attention: {name} is on {tensor.device_mesh}, others on {meshes[0]} (valid: one mesh)"
            )
    return found


def _gradient(gradient: Tensor, of: Any, layout: Layout, name: str, order: Sequence[int]) -> Any:
    """The gradient of the DTensor `of`, placed as that is; what is only a sum over ranks then is added up."""
    mesh, shape = of.device_mesh, tuple(of.shape)
    whole = _wrapped(gradient, mesh, layout.gradients(name, shape, of.dim()), shape, order)
    is_known = all(type(placement) in (Shard, Replicate) for placement in of.placements)
    return _brought_to(whole, tuple(of.placements)) if is_known else whole


def _wrapped(
    local: Tensor, mesh: Any, placements: Sequence[Placement], shape: Sequence[Any], order: Sequence[int]
) -> Any:
    """`local` as this rank's part of a dense tensor of `shape`, whose dims lie in memory in `order`, from outermost to innermost."""
    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def placed(output: Any, dims: Sequence[int]) -> Any:
    """`output` sharded, along each dim of its mesh, by the dim in `dims`; -1 for replicated. Those are the placements that the
    graph's own attention had, by which the nodes behind it were traced. Differentiable."""
    return _brought_to(output, tuple(Replicate() if dim < 0 else Shard(dim) for dim in dims))


def _brought_to(tensor: Any, placements: tuple[Placement, ...]) -> Any:
    """The dense DTensor `tensor` with `placements`. Its dims lie in memory in the order in which they did. Differentiable."""
    if tuple(tensor.placements) == placements:
        return tensor
    local = tensor.redistribute(placements=placements).to_local()
    # What is gathered is contiguous, whatever strides DTensor goes on to say it has: a view behind would fail.
    order = all_in_memory_order(tensor)
    if not is_outside(tensor.device_mesh) and all_in_memory_order(local) != order:
        local = local.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
    return _wrapped(local, tensor.device_mesh, placements, tuple(tensor.shape), order)


def for_view(tensor: Any, dims: Sequence[int], sizes: Sequence[int]) -> Any:
    """`tensor` so placed that torch can flatten its adjacent `dims`, which have `sizes`, or unflatten the one of them to `sizes`.
    Shards of those dims stay shards only of the outermost that is more than 1, where they are even, as torch asks. Dims of 1 are
    not sharded behind."""
    size = next((size for size in sizes if size != 1), 1)
    outermost = next((dim for dim in dims if tensor.shape[dim] != 1), None)
    placements = list(tensor.placements)
    ranks = 1
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            if placement.dim == outermost and size % (ranks * tensor.device_mesh.size(mesh_dim)) == 0:
                ranks *= tensor.device_mesh.size(mesh_dim)
            elif placement.dim in dims or tensor.shape[placement.dim] == 1:
                placements[mesh_dim] = Replicate()
        elif not isinstance(placement, (Replicate, Partial)):
            placements[mesh_dim] = Replicate()
    return _brought_to(tensor, tuple(placements))
