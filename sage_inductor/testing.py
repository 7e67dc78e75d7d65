"""For tests of patterns, kernels and models: captured graphs as text, and error figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.config import Config
from sage_inductor.graph.call import example_value
from sage_inductor.measurement.metrics import max_error as max_error  # for tests to import from here
from sage_inductor.measurement.metrics import relative_l2 as relative_l2
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.torch_internals.operators import is_overload


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> fx.GraphModule:
    """The one graph that Dynamo makes of `function(*args, **kwargs)`. Raises AssertionError when it makes several."""
    graphs: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*args, **kwargs)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0]


class RewritingBackend:
    """A Dynamo backend that rewrites graphs and runs them eagerly: all of the pass, none of Inductor's time.

    `sites` and `graphs` collect what was seen."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sites: list[Site] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.sites.extend(rewrite_graph(graph_module.graph, self.config, example_inputs))
        graph_module.recompile()
        self.graphs.append(graph_module)
        return graph_module.forward


def graph_text(graph: fx.Graph) -> str:
    """`graph`, one node a line, without what differs between torch versions: `name = target(args): 2x4x16x64`.

    Nodes are called a, b, c ... in order; only call nodes and the output are written.
    """
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        names[node] = _letter(len(names))
        if node.op == "placeholder":
            lines.append(f"{names[node]} = input{_annotation(node)}")
            continue
        args = [_text(item, names) for item in node.args]
        args += [f"{key}={_text(item, names)}" for key, item in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {', '.join(args)}")
        else:
            lines.append(f"{names[node]} = {_target(node)}({', '.join(args)}){_annotation(node)}")
    return "\n".join(lines)


def _letter(index: int) -> str:
    first, second = divmod(index, 26)
    return (chr(ord("a") + first - 1) if first else "") + chr(ord("a") + second)


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return f".{node.target}" if node.op == "call_method" else str(node.target)
    if is_overload(node.target):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _text(item: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(item, fx.Node):
        return names[item]
    if isinstance(item, (tuple, list)):
        return "(" + ", ".join(_text(inner, names) for inner in item) + ")"
    if isinstance(item, slice):
        return ":".join("" if part is None else _text(part, names) for part in (item.start, item.stop))
    return repr(item)


def _annotation(node: fx.Node) -> str:
    value = example_value(node)
    if not isinstance(value, Tensor):
        return ""
    return f": {'x'.join(map(str, value.shape))}"
