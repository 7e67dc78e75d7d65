"""Writing in place, which a graph before functionalisation still holds: what a node's value is, and until when."""

from __future__ import annotations

import keyword

import torch
from torch import fx

from sage_inductor.call import AttentionCall, Value, leaves

_IN_PLACE_OPERATORS = (
    "setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand",
    "ior", "ixor", "ilshift", "irshift",
)  # fmt: skip
# Their value may share memory with their first argument.
_VIEWS = (
    "view", "reshape", "expand", "expand_as", "transpose", "permute", "getitem", "unsqueeze", "squeeze", "flatten",
    "unflatten", "contiguous", "to", "float", "detach", "t", "mT", "select", "narrow", "chunk", "split", "unbind",
    "view_as", "swapaxes", "movedim", "slice", "alias", "type", "type_as", "getattr", "diagonal",
)  # fmt: skip
# In-place methods that attention written out uses on its logits and weights.
_ARITHMETIC = ("add_", "sub_", "mul_", "div_", "masked_fill_", "clamp_")


def node_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else value_name(node)


def value_name(item: Value) -> str:
    """What `item` calls: the name of a method, function or aten operator."""
    target = item.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


def writes_in_place(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node_name(node)
    if node.kwargs.get("out") is not None or name.strip("_") in _IN_PLACE_OPERATORS:
        return True
    # `operator.and_` ends like an in-place method, but only because `and` is a keyword.
    return name.endswith("_") and not name.endswith("__") and not keyword.iskeyword(name[:-1])


def follow_in_place(graph: fx.Graph) -> None:
    """After `scores.masked_fill_(...)`, readers of scores read what the method returns, which is the same tensor:
    then the graph shows the order in which its values came about."""
    writers = [node for node in graph.nodes if node.op == "call_method" and node.target in _ARITHMETIC]
    if not writers:
        return
    position = {node: index for index, node in enumerate(graph.nodes)}
    for writer in writers:
        source = writer.args[0] if writer.args else None
        if isinstance(source, fx.Node) and source.op in ("call_function", "call_method"):
            for user in list(source.users):
                if position[user] > position[writer]:
                    user.replace_input_with(source, writer)


def is_overwritten(call: AttentionCall, writers: list[fx.Node]) -> bool:
    """Whether an operand of `call`, read by nodes that the call takes the place of, has been written to by the time
    that the call's own node is reached. `writers` are the nodes of the graph that write in place."""
    if not writers:
        return False
    position = {node: index for index, node in enumerate(call.node.graph.nodes)}
    inputs = {leaf for item in (call.query, call.key, call.value, call.attn_mask) for leaf in leaves(item)}
    replaced = _between(call.node, inputs)
    for leaf in inputs:
        root = _root(leaf)
        reads = [position[user] for user in leaf.users if user in replaced and not writes_in_place(user)]
        first = min(reads, default=position[leaf])
        for writer in (writer for writer in writers if writer in position):
            if first < position[writer] < position[call.node] and _root(writer) is root:
                return True
    return False


def _between(node: fx.Node, inputs: set[fx.Node]) -> set[fx.Node]:
    """`node` and what it depends on, as far as `inputs`."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found and current not in inputs:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found


def _root(node: fx.Node) -> fx.Node:
    """The tensor whose memory `node` may be a view of."""
    while node.op in ("call_function", "call_method") and (
        node_name(node) in _VIEWS or writes_in_place(node)
    ):
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node
