"""Graph changes that keep Inductor from miscompiling what we leave alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sage_inductor.call import example_tensor

_SOFTMAX = (F.softmax, torch.softmax, torch.nn.functional.softmax)


def apply(graph: fx.Graph) -> None:
    """All of them, on `graph` and nothing below it."""
    for node in list(graph.nodes):
        _softmax_over_last_dim(node)


def _softmax_over_last_dim(node: fx.Node) -> None:
    """softmax(x, dim) of a 4-D x with dim other than the last becomes a softmax over the last dim of a
    transposed x.

    Inductor's `_sfdp_pattern_*` take `((q @ k^T) * s).softmax(dim) @ v` for attention whatever dim is (torch
    2.13.0+cpu: relative errors .98, .96 and .21 for dims 0, 1 and 2); with the transposes they do not match.
    """
    is_method = node.op == "call_method" and node.target == "softmax"
    if not is_method and not (node.op == "call_function" and node.target in _SOFTMAX):
        return
    arguments = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
    source, dim = arguments.get("input"), arguments.get("dim")
    tensor = example_tensor(source) if isinstance(source, fx.Node) else None
    if tensor is None or tensor.dim() != 4 or not isinstance(dim, int) or dim % 4 == 3:
        return
    with node.graph.inserting_before(node):
        transposed = _call(node.graph, "transpose", tensor, source, dim, -1)
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "dim")}
    node.args, node.kwargs = (transposed,), {**kwargs, "dim": -1}
    output = example_tensor(node)
    with node.graph.inserting_after(node):
        back = _call(node.graph, "transpose", output, node, dim, -1)
    back.meta = dict(node.meta)
    if output is not None:
        node.meta = {**node.meta, "example_value": output.transpose(dim, -1)}
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _call(graph: fx.Graph, method: str, tensor: Any, *args: Any) -> fx.Node:
    node = graph.call_method(method, args)
    if tensor is not None:
        node.meta["example_value"] = getattr(tensor, method)(*args[1:])
    return node
