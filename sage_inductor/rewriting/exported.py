"""Rewriting of exported programs, whose graphs hold operators only, a traced value for each node, and outputs by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sage_inductor.config import Config
from sage_inductor.graph.call import trace
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.rewriting.substitution import insert_expansion
from sage_inductor.torch_internals.operators import is_operator


def rewrite_program(program: torch.export.ExportedProgram, config: Config) -> None:
    """Rewrite the graph of `program` in place, so that it stays valid for torch.export. Raises as `rewrite_graph`."""
    graph_module = program.graph_module
    before = _outputs(graph_module.graph)
    rewrite_graph(graph_module.graph, config)
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _conform(module.graph)
            module.recompile()
    for old, new in zip(before, _outputs(graph_module.graph), strict=True):
        if old != new:
            program.graph_signature.replace_all_uses(old, new)


def _outputs(graph: fx.Graph) -> list[str]:
    (output,) = graph.find_nodes(op="output")
    names: list[str] = []
    fx.node.map_arg(output.args, lambda node: names.append(node.name))
    return names


def _conform(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if "example_value" in node.meta and _is_python(node):
            expansion = trace(_caller(node), tuple(node.all_input_nodes))
            if expansion is not None:
                insert_expansion(node, expansion).replace(node)
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")


def _is_python(node: fx.Node) -> bool:
    """Whether `node` calls a method or a function, as the pass writes them, and no operator."""
    return node.op == "call_method" or (node.op == "call_function" and not is_operator(node.target))


def _caller(node: fx.Node) -> Any:
    """The call of `node` as a function of the tensors that it reads."""

    def call(*tensors: torch.Tensor) -> Any:
        values = dict(zip(node.all_input_nodes, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    return call
