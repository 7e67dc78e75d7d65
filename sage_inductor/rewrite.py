"""The substitution: an eligible call becomes a node of our operator, with its metadata and its output
strides."""

from __future__ import annotations

from typing import Any

from torch import fx

from sage_inductor import ops, training
from sage_inductor.call import AttentionCall, Expr, example_tensor
from sage_inductor.eligibility import output_order
from sage_inductor.masks import Mask

DEFAULTS: dict[str, Any] = {
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "bottom_right": False,
    "window_left": -1,
    "window_right": -1,
    "memory_order": None,
}


def rewrite(call: AttentionCall, mask: Mask, kernel: str, precision: str) -> fx.Node:
    """Replace `call` in its graph; returns the new node. Options at their defaults are not written out."""
    graph, old = call.node.graph, call.node
    query, output = example_tensor(call.query), call.output()
    assert query is not None and output is not None
    order = output_order(output)
    options: dict[str, Any] = {
        "is_causal": mask.is_causal,
        "scale": call.scale,
        "enable_gqa": call.enable_gqa,
        "bottom_right": mask.bottom_right,
        "window_left": mask.window_left,
        "window_right": mask.window_right,
        # Users of the node rely on the strides SDPA would have given: name them where ours would be others.
        "memory_order": None if order == ops.memory_order(query) else order,
    }
    kwargs = {name: value for name, value in options.items() if value != DEFAULTS[name]}
    kwargs |= {"kernel_name": kernel, "precision": precision}
    target = training.attention_training if output.requires_grad else ops.attention
    inputs = (call.query, call.key, call.value) + ((mask.attn_mask,) if mask.attn_mask is not None else ())
    with graph.inserting_before(old):
        args = tuple(item.insert(graph) if isinstance(item, Expr) else item for item in inputs)
        new = graph.call_function(target, args, kwargs)
        new.meta = {**old.meta, "example_value": output} if call.restore else dict(old.meta)
        for method, arguments in call.restore:
            value = getattr(new.meta["example_value"], method)(*arguments)
            new = graph.call_method(method, (new, *arguments))
            new.meta = {**old.meta, "example_value": value}
    old.replace_all_uses_with(new)
    former_inputs = old.all_input_nodes
    graph.erase_node(old)
    _erase_unused(former_inputs)
    return new


# What a pattern looks through: nodes without side effects, of no use once nothing reads them.
_PURE = (
    "reshape", "view", "expand", "contiguous", "clone", "unsqueeze", "getitem", "repeat_interleave", "transpose",
    "permute", "matmul", "bmm", "baddbmm", "einsum", "softmax", "mul", "truediv", "div", "add", "masked_fill",
    "where", "float", "to", "type", "type_as", "dropout",
)  # fmt: skip


def _erase_unused(nodes: list[fx.Node]) -> None:
    """Remove what the call no longer reads (repeated heads, scores, weights) where nothing else reads it."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        name = str(name).partition(".")[0]
        if (
            node.op in ("call_method", "call_function")
            and name in _PURE
            and not node.users
            and not node._erased
        ):
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            pending.extend(inputs)
