"""Graph changes that keep Inductor from miscompiling what we leave alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sage_inductor.call import example_tensor, traced
from sage_inductor.patterns.nodes import DIV, SOFTMAX, argument
from sage_inductor.patterns.softmax import own_maximum, softmax


def apply(graph: fx.Graph, transformed: Collection[fx.Node]) -> None:
    """All of them, on `graph` and nothing below it. The traced values of the nodes `transformed`, inside vmap and the
    like, are not computed with."""
    for node in list(graph.nodes):
        _softmax_over_last_dim(node, with_values=node not in transformed)


def _softmax_over_last_dim(node: fx.Node, with_values: bool) -> None:
    """A softmax over a dim other than the last becomes one over the last dim of a transposed tensor.

    Inductor's `_sfdp_pattern_*` take `((q @ k^T) * s).softmax(dim) @ v` for attention whatever dim is (torch
    2.13.0+cpu: relative errors .98, .96 and .21 for dims 0, 1 and 2 of 4; of 3 and 5 dims too), and a softmax that is
    written out, which is what they see of any; with the transposes they do not match.
    """
    if node in SOFTMAX:
        source, dim = argument(node, 0, "input"), argument(node, 1, "dim")
    else:
        found = softmax(node) if node in DIV else None
        if found is None or own_maximum(found.logits, found.dim) is None:
            return
        source, dim = found.logits, found.dim
    tensor = example_tensor(source) if isinstance(source, fx.Node) else None
    if tensor is None or tensor.dim() < 3:
        return
    if dim is None:  # as torch chooses it, with a warning
        dim = 0 if tensor.dim() == 3 else 1
    if not isinstance(dim, int) or dim % tensor.dim() == tensor.dim() - 1:
        return
    graph, output = node.graph, example_tensor(node)
    swap = ("transpose", (dim, -1))
    # Users rely on strides: torch's softmax is contiguous, a quotient lies in memory as its operand does.
    order = tuple(range(tensor.dim()))
    if node not in SOFTMAX and output is not None:
        order = tuple(sorted(order, key=output.stride, reverse=True))
    back = tuple(order.index(each) for each in range(tensor.dim()))
    steps: list[tuple[str, tuple[Any, ...]]] = [swap, ("contiguous", ())]
    if order != tuple(range(tensor.dim())):
        steps = [swap, ("permute", (order,)), ("contiguous", ()), ("permute", (back,))]
    values: list[Any] = [None] * (2 + len(steps))
    if with_values and output is not None:
        values = [traced(tensor, [swap]), traced(output, [swap, ("contiguous", ())])]
        for step in steps:
            values.append(traced(values[-1], [step]))
    with graph.inserting_before(node):
        nodes = [graph.call_method(swap[0], (source, *swap[1]))]
        if node in SOFTMAX:
            kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "dim")}
            nodes.append(graph.create_node(node.op, node.target, (nodes[0], -1, *node.args[2:]), kwargs))
        else:
            nodes.append(graph.call_function(torch.softmax, (nodes[0], -1)))
        for method, args in steps:
            nodes.append(graph.call_method(method, (nodes[-1], *args)))
    for new, value in zip(nodes, values, strict=True):
        new.meta = {**node.meta, "example_value": value}
    node.replace_all_uses_with(nodes[-1])
    graph.erase_node(node)
