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
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from sage_inductor.graph.sizes import all_in_memory_order
from sage_inductor.operators.distributed import ring
from sage_inductor.operators.distributed.layouts import Layout, choose, ring_dim
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
    layout = layout_of(tensors, options)
    dims = tensors["query"].dim()
    with torch.no_grad():
        local = {
            name: _part(tensor, layout.placements(name, tensor.shape, dims))
            for name, tensor in tensors.items()
        }
    if "ring" in layout.divisions:
        results = ring.attend(operator, local, options, tensors["query"].device_mesh, layout)
    elif operator is torch.ops.sage_inductor.attention_backward.default:
        without_mask = {name: tensor for name, tensor in local.items() if name != "attn_mask"}
        results = operator(attn_mask=local.get("attn_mask"), **without_mask, **options)
    else:
        results = operator(**local, **options)
    if operator is torch.ops.sage_inductor.attention_backward.default:
        return tuple(
            _gradient(gradient, tensors[name], layout, name)
            for name, gradient in zip(_DIFFERENTIABLE, results, strict=True)
        )
    shape = (*tensors["query"].shape[:-1], tensors["value"].shape[-1])
    placements = layout.placements("output", shape, dims)
    mesh = tensors["query"].device_mesh
    if isinstance(results, Tensor):
        return _wrapped(results, mesh, placements, shape)
    output, lse = results
    return _wrapped(output, mesh, placements, shape), _wrapped(lse, mesh, placements, shape[:-1])


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


def _gradient(gradient: Tensor, of: Any, layout: Layout, name: str) -> Any:
    """The gradient of the DTensor `of`, placed as that is; what is only a sum over ranks then is added up."""
    mesh, shape = of.device_mesh, tuple(of.shape)
    placed = _wrapped(gradient, mesh, layout.gradients(name, shape, of.dim()), shape)
    known = all(type(placement) in (Shard, Replicate) for placement in of.placements)
    return placed.redistribute(placements=of.placements) if known else placed


def _wrapped(local: Tensor, mesh: Any, placements: Sequence[Placement], shape: Sequence[Any]) -> Any:
    """`local` as this rank's part of a dense tensor of `shape`, whose dims lie in memory in the same order."""
    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    for dim in reversed(all_in_memory_order(local)):
        strides[dim] = step
        step = step * shape[dim]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )


def placed(output: Any, dims: Sequence[int]) -> Any:
    """`output` sharded, along each dim of its mesh, by the dim in `dims`; -1 for replicated. Those are the placements that the
    graph's own attention had, by which the nodes behind it were traced. Differentiable."""
    placements = tuple(Replicate() if dim < 0 else Shard(dim) for dim in dims)
    if output.placements == placements:
        return output
    local = output.redistribute(placements=placements).to_local()
    # What is gathered is contiguous, whatever strides DTensor goes on to say it has: a view behind would fail.
    order = all_in_memory_order(output)
    if all_in_memory_order(local) != order:
        local = local.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
    return _wrapped(local, output.device_mesh, placements, tuple(output.shape))
