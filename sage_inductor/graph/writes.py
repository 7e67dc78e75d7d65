"""Writes in place, which a graph before functionalisation still holds: after one, a node's value is another."""

from __future__ import annotations

import inspect
import keyword
import operator
from functools import cache
from typing import Any, TypeAlias

from torch import fx

from sage_inductor.graph.call import AttentionCall, example_value, leaves, node_name, value_name
from sage_inductor.graph.facts import ARITHMETIC_IN_PLACE, FACTS, NOTHING, WRITES, is_view
from sage_inductor.torch_internals.operators import is_higher_order, written_arguments
from sage_inductor.torch_internals.traced import storage_id, tensors_of

# Memory is told apart by the storages that tracing saw, and by the nodes that values are views of, judging by the names of
# operations: storages of tensor subclasses say nothing.
Memory: TypeAlias = "frozenset[int | fx.Node]"


def writes_in_place(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if is_higher_order(node.target):
        return bool(_written_operands(node))
    written = written_arguments(node.target)
    if written is not None:
        return bool(written)
    name = node_name(node)
    by_name = FACTS.get(name, NOTHING) | FACTS.get(name.strip("_"), NOTHING)
    if node.kwargs.get("out") is not None or WRITES in by_name or _is_inplace(node):
        return True
    # `operator.and_` ends like an in-place method, but only because `and` is a keyword.
    return name.endswith("_") and not name.endswith("__") and not keyword.iskeyword(name[:-1])


def _is_inplace(node: fx.Node) -> bool:
    """Whether `node` is called with `inplace=True`, as `F.relu` and `F.dropout` can be."""
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(argument is True for argument in node.args):
        return False
    position = _position_of_inplace(node.target)
    return position is not None and len(node.args) > position and node.args[position] is True


@cache
def _position_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins of torch, which have no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


def _written(writer: fx.Node) -> list[fx.Node]:
    """The nodes that `writer` overwrites."""
    if is_higher_order(writer.target):
        return _written_operands(writer)
    written = written_arguments(writer.target)
    if written is None:
        return _nodes_in([writer.args[:1] or list(writer.kwargs.values())[:1], writer.kwargs.get("out")])
    return _nodes_in(
        [
            writer.args[position] if len(writer.args) > position else writer.kwargs.get(name)
            for position, name in written
        ]
    )


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _written_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that a higher-order operator overwrites: all of its operands, if its kernel or its body writes to any."""
    operands = node.all_input_nodes
    bodies = [body for body in map(submodule_of, operands) if body is not None]
    writes = "mutation" in value_name(node) or any(map(_overwrites_an_operand, bodies))
    return [operand for operand in operands if submodule_of(operand) is None] if writes else []


def _overwrites_an_operand(body: fx.GraphModule) -> bool:
    writes = Writes(body.graph)
    return any(writes.touch(node) for node in body.graph.nodes if node.op == "placeholder")


def submodule_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph that `node` refers to; None where it refers to none."""
    if node.op not in ("get_attr", "call_module"):
        return None
    owner = node.graph.owning_module
    try:
        target = None if owner is None else operator.attrgetter(str(node.target))(owner)
    except AttributeError:
        return None
    return target if isinstance(target, fx.GraphModule) else None


class Writes:
    """The writes in one graph, as the graph is when this is made."""

    def __init__(self, graph: fx.Graph) -> None:
        writers = [node for node in graph.nodes if writes_in_place(node)]
        # The nodes written to are held, so that no other value can get their storage meanwhile.
        self.writers = [(writer, (targets := _written(writer)), _memory_of(targets)) for writer in writers]
        self.written: Memory = frozenset().union(*(written for _, _, written in self.writers))

    def touch(self, node: fx.Node) -> bool:
        """Whether something writes, at any time, to memory in which the value of `node` may lie."""
        return bool(self.written) and not _memory_of([node]).isdisjoint(self.written)

    def overwrite(self, call: AttentionCall) -> bool:
        """Whether a value that `call` replaces, or an operand after its first read, is written to before the call's own node.

        In `s = q @ k.mT; k.zero_(); softmax(s) @ v` the key is: a kernel in the place of the last product would read zeros.
        """
        if not self.writers:
            return False
        position = {node: index for index, node in enumerate(call.node.graph.nodes)}
        inputs = {
            leaf
            for item in (call.query, call.key, call.value, call.attn_mask, call.sink)
            for leaf in leaves(item)
        }
        replaced = _between(call.node, inputs)
        for value in inputs | (replaced - {call.node}):
            memory = _memory_of([value])
            if memory.isdisjoint(self.written):
                continue
            if value in inputs:
                reads = [
                    position[user] for user in value.users if user in replaced and not writes_in_place(user)
                ]
                first = min(reads, default=position[value])
            else:
                first = position[value]
            for writer, _, written in self.writers:
                if writer not in position or (writer in replaced and value not in inputs):
                    continue  # rewritten by now, or understood by the pattern
                if first < position[writer] < position[call.node] and not memory.isdisjoint(written):
                    return True
        return False


def _memory_of(nodes: list[fx.Node]) -> Memory:
    storages = (storage_id(tensor) for node in nodes for tensor in tensors_of(example_value(node)))
    return frozenset({*map(_root, nodes), *(storage for storage in storages if storage is not None)})


def follow_in_place(graph: fx.Graph) -> None:
    """Let readers of `scores` after `scores.masked_fill_(...)` read what the method returns. It is the same tensor, and the
    graph then shows the order in which values come about."""
    writers = [
        node for node in graph.nodes if node.op == "call_method" and node.target in ARITHMETIC_IN_PLACE
    ]
    if not writers:
        return
    position = {node: index for index, node in enumerate(graph.nodes)}
    for writer in writers:
        source = writer.args[0] if writer.args else None
        if isinstance(source, fx.Node) and source.op in ("call_function", "call_method"):
            for user in list(source.users):
                if position[user] > position[writer]:
                    user.replace_input_with(source, writer)


def _between(node: fx.Node, inputs: set[fx.Node]) -> set[fx.Node]:
    """`node` and all nodes that it depends on, up to but without `inputs`."""
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
    while node.op in ("call_function", "call_method") and (is_view(node) or writes_in_place(node)):
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node
