"""Graph changes that keep Inductor from miscompiling attention that we leave alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from sage_inductor.graph.call import example_tensor, laid_out_as, traced
from sage_inductor.patterns.nodes import DIV, SOFTMAX, argument
from sage_inductor.patterns.softmax import own_maximum, softmax


def apply(graph: fx.Graph, transformed: Collection[fx.Node]) -> None:
    """Apply all of them to `graph`, without its subgraphs. The nodes `transformed` are inside vmap and the like, where traced
    values must not be computed with."""
    for node in list(graph.nodes):
        _softmax_over_last_dim(node, with_values=node not in transformed)


def _softmax_over_last_dim(node: fx.Node, with_values: bool) -> None:
    """A softmax over a dim other than the last becomes one over the last dim of a transposed tensor.

    Inductor's `_sfdp_pattern_*` take `((q @ k^T) * s).softmax(dim) @ v` for attention whatever dim is (torch 2.13.0+cpu:
    relative errors .98, .96 and .21 for dims 0, 1 and 2 of 4; with 3 and 5 dims, too). The same holds for a softmax that is
    written out, the form in which they see every softmax. With the transposes they do not match.
    """
    if node in SOFTMAX:
        source, dim = argument(node, 0, "input"), argument(node, 1, "dim")
    else:
        found = softmax(node) if node in DIV else None
        if found is None or own_maximum(found.logits, found.dim) is None:
            return
        # With a cast between the exponential and the division Inductor's patterns do not match, and torch.softmax would lose
        # the cast. A cast that changes nothing is gone before Inductor looks.
        dtypes = {
            tensor.dtype for item in (found.logits, node) if (tensor := example_tensor(item)) is not None
        }
        if len(dtypes) > 1:
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
    # Users rely on strides.
    steps = (swap, ("contiguous", ())) if output is None else (swap, *laid_out_as(output))
    value = traced(output, [swap, ("contiguous", ())]) if with_values and output is not None else None
    with graph.inserting_before(node):
        transposed = graph.call_method(swap[0], (source, *swap[1]))
        transposed.meta = {**node.meta, "example_value": traced(tensor, [swap]) if with_values else None}
        if node in SOFTMAX:
            kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "dim")}
            last = graph.create_node(node.op, node.target, (transposed, -1, *node.args[2:]), kwargs)
        else:
            last = graph.call_function(torch.softmax, (transposed, -1))
        last.meta = {**node.meta, "example_value": value}
        for method, args in steps:
            value = None if value is None else traced(value, [(method, args)])
            last = graph.call_method(method, (last, *args))
            last.meta = {**node.meta, "example_value": value}
    node.replace_all_uses_with(last)
    graph.erase_node(node)
