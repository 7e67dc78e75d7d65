"""Values of a graph that depend on nothing but constants, worked out while compiling."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expr, Value, example_tensor, example_value, leaves
from sage_inductor.graph.facts import fill, is_function, operation
from sage_inductor.graph.sizes import is_static, size_hint
from sage_inductor.graph.writes import Writes, writes_in_place
from sage_inductor.torch_internals.dispatch import outside_fake_tensors
from sage_inductor.torch_internals.distributed import is_dtensor
from sage_inductor.torch_internals.traced import fake_mode_of

log = logging.getLogger(__name__)

NO_INPUTS: Mapping[fx.Node, Any] = MappingProxyType({})

# Scores a constant mask may have to be worked out while compiling: 2^26 take a second on a CPU, and a GPU does four times
# that as easily. Where they are worked out at once, and not by blocks of rows, that is under a gigabyte.
MAX_CONSTANT_SCORES = {"cpu": 2**26, "cuda": 2**28}


def constant_value(node: Value, writes: Writes) -> Tensor | None:
    """The value of `node` when nothing in it depends on inputs, parameters or chance; None otherwise, and where it cannot be
    worked out. `writes` are those of its graph."""
    example = example_tensor(node)
    if example is None:
        return None
    nodes = leaves(node)
    ancestors = _constant_ancestors(nodes, writes) if nodes else []
    # To make a DTensor may send something, which other ranks would have to receive.
    if ancestors is None or any(is_dtensor(example_tensor(item)) for item in (node, *ancestors)):
        return None
    device, limit = evaluation_device(example.device), scores_limit(example.device)
    sizes = [tensor.numel() for tensor in map(example_tensor, ancestors) if tensor is not None]
    if any(not isinstance(size, int) or size > limit for size in sizes):
        return None
    try:
        value = _worked_out(node, ancestors, device)
    except RuntimeError as error:
        # Eager mode refuses what Inductor takes, such as float32's lowest number in a tensor of bfloat16, and memory ends.
        log.debug("the value of %s is not known: %s", node, error)
        return None
    return value if isinstance(value, Tensor) else None


def value_with(node: Value, inputs: Mapping[fx.Node, Any], writes: Writes) -> Tensor | None:
    """The value of `node` for these `inputs` of its graph, and for the sizes that it was traced with; None where it depends on
    more than these and constants."""
    nodes, example = leaves(node), example_tensor(node)
    inputs = _WithSizes(inputs)
    ancestors = _constant_ancestors(nodes, writes, inputs) if nodes else []
    if example is None or ancestors is None or any(fake_mode_of(inputs.get(item)) for item in ancestors):
        return None
    try:
        value = _worked_out(node, ancestors, example.device, inputs)
    except RuntimeError as error:
        log.debug("the value of %s is not known: %s", node, error)
        return None
    return value if isinstance(value, Tensor) else None


def evaluation_device(device: torch.device) -> torch.device:
    """Where constants on `device` are worked out: on the CPU where there is no such GPU."""
    return torch.device("cpu" if device.type == "cuda" and not torch.cuda.is_available() else device.type)


def scores_limit(device: torch.device) -> int:
    """How many scores a mask on `device` may have to be worked out."""
    return MAX_CONSTANT_SCORES.get(evaluation_device(device).type, 0)


def _worked_out(
    node: Value, ancestors: list[fx.Node], device: torch.device, inputs: Mapping[fx.Node, Any] = NO_INPUTS
) -> Any:
    values: dict[fx.Node, Any] = {}
    with outside_fake_tensors(), torch.no_grad():
        for ancestor in ancestors:
            if ancestor in inputs:
                values[ancestor] = inputs[ancestor]
                continue
            filled, cast = _filled(ancestor), example_tensor(ancestor)
            if filled is not None:
                values[ancestor] = torch.full(filled.shape, filled.number, dtype=filled.dtype, device=device)
                continue
            if cast is not None and _takes_dtype_only(ancestor):
                values[ancestor] = values[ancestor.all_input_nodes[0]].to(cast.dtype)
                continue
            args, kwargs = fx.node.map_aggregate(
                (ancestor.args, ancestor.kwargs), lambda item: _materialised(item, values, device)
            )
            if ancestor.op == "call_method":
                values[ancestor] = getattr(args[0], str(ancestor.target))(*args[1:], **kwargs)
            else:
                assert callable(ancestor.target)
                values[ancestor] = ancestor.target(*args, **kwargs)
        return _evaluated(node, values, device)


def _evaluated(item: Any, values: dict[fx.Node, Any], device: torch.device) -> Any:
    if not isinstance(item, Expr):
        return _materialised(item, values, device)
    args = [_evaluated(arg, values, device) for arg in item.args]
    function = getattr(torch.Tensor, item.target) if isinstance(item.target, str) else item.target
    return function(*args, **item.kwargs)


def _materialised(item: Any, values: dict[fx.Node, Any], device: torch.device) -> Any:
    """An argument for evaluation: nodes by their values, devices by the one we evaluate on."""
    if isinstance(item, fx.Node):
        return values[item]
    if isinstance(item, torch.device) or (
        isinstance(item, str) and item.partition(":")[0] in ("cpu", "cuda")
    ):
        return device
    return item


def _constant_ancestors(
    nodes: list[fx.Node], writes: Writes, inputs: Mapping[fx.Node, Any] = NO_INPUTS
) -> list[fx.Node] | None:
    """`nodes` and all they depend on, in graph order; None when something there is not a pure function of constants and
    of `inputs`."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        current = pending.pop()
        if current in found:
            continue
        if current in inputs:
            found.add(current)
            continue
        if writes_in_place(current) or not is_function(current):
            return None
        found.add(current)
        if _filled(current) is None:
            sources = current.all_input_nodes
            pending.extend(sources[:1] if _takes_dtype_only(current) else sources)
    # What anything writes to, through whatever view, is more than a function of its arguments.
    if any(map(writes.touch, found)):
        return None
    return [ancestor for ancestor in nodes[0].graph.nodes if ancestor in found]


class _WithSizes(dict[fx.Node, Any]):
    """Inputs, and the sizes in a graph as they were traced."""

    def __contains__(self, node: object) -> bool:
        return super().__contains__(node) or (isinstance(node, fx.Node) and self._size(node) is not None)

    def __missing__(self, node: fx.Node) -> Any:
        return self._size(node)

    def _size(self, node: fx.Node) -> int | None:
        value = example_value(node)
        return size_hint(value) if isinstance(value, torch.SymInt) else None


@dataclass(frozen=True)
class _Filled:
    shape: tuple[int, ...]
    number: float
    dtype: torch.dtype


def _filled(node: fx.Node) -> _Filled | None:
    """What `node` is where it is filled with a number, and takes but its shape and dtype from other tensors."""
    tensor, number = example_tensor(node), fill(node)
    if tensor is None or not isinstance(number, (int, float)) or not is_static(tensor):
        return None
    return _Filled(tuple(tensor.shape), number, tensor.dtype)


def _takes_dtype_only(node: fx.Node) -> bool:
    """Whether `node` is a cast to the dtype of another tensor."""
    return operation(node) == "type_as" and len(node.args) == 2
