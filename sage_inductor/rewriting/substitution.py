"""The substitution of an eligible call by a node of our operator, with the call's metadata and output strides."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import (
    SDPA,
    SDPA_TARGETS,
    AttentionCall,
    Expansion,
    Expr,
    Value,
    example_tensor,
    example_value,
    traced,
    tracing,
)
from sage_inductor.graph.facts import ARITHMETIC_IN_PLACE, is_fresh, is_pure, operation
from sage_inductor.graph.sizes import (
    UNKNOWN,
    all_in_memory_order,
    is_dense,
    memory_order,
    order_is_known,
    sizes_of,
)
from sage_inductor.operators import inference, training
from sage_inductor.patterns.axes import permutation
from sage_inductor.patterns.nodes import reads_nothing
from sage_inductor.report.site import Site
from sage_inductor.rewriting.eligibility import output_order
from sage_inductor.rewriting.masks.additive import with_uniform_rows
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.masks.segments import insert_once
from sage_inductor.torch_internals.distributed import is_dtensor
from sage_inductor.torch_internals.sizes import hinted, is_backed
from sage_inductor.torch_internals.traced import is_erased, tensors_of
from sage_inductor.tuning import Choice

NHD = [0, 2, 1, 3]
DEFAULTS: dict[str, Any] = {
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
    "bottom_right": False,
    "window_left": -1,
    "window_right": -1,
    "smoothing": "auto",
    "wires": "inputs",
    "memory_order": None,
    "min_q_len": 0,
    "min_kv_len": 0,
    "or_exact": False,
    "skip_threshold": 0.0,
    "skip_by": "scores",
}


@dataclass(frozen=True)
class Substitute:
    """`new`, a node that is in the graph already, is to replace the call at `old`."""

    old: fx.Node
    new: fx.Node
    gives_nhd: bool
    """Whether `new` lies in memory as `[batch, seq, heads, head_dim]`, whatever strides `old` had."""
    lse: fx.Node | None = None
    """The LSE, where `old` is a tuple of the output, the LSE and more."""
    is_tuple: bool = False

    def replace(self) -> None:
        """Give the users of the call the new value, and erase nodes that nothing reads any more."""
        if self.is_tuple:
            for user in list(self.old.users):  # getitem(old, i)
                item = self.new if user.args[1] == 0 else self.lse
                if not reads_nothing(user):
                    assert item is not None, user
                    user.replace_all_uses_with(item)
                _erase_with_readers(user)
        self.old.replace_all_uses_with(self.new)
        if self.gives_nhd:
            for user in self.new.users:
                if _is_transposed(user):
                    value = self.new.meta["example_value"].transpose(1, 2)
                    user.meta = {**user.meta, "example_value": value}
        former_inputs = self.old.all_input_nodes
        self.old.graph.erase_node(self.old)
        _erase_unused(former_inputs)


def insert_substitute(
    call: AttentionCall,
    mask: Mask,
    site: Site,
    choice: Choice,
    moves_to: tuple[int, ...] | None = None,
    wires: str = "inputs",
) -> Substitute:
    """Insert our operator before `call`, with the site's kernel from the lengths of `choice` on. Options at their defaults are
    not written out. `moves_to` are the dims by which a DTensor is to be sharded that the operator shards otherwise, `wires` how
    one travels in a ring."""
    graph, old = call.node.graph, call.node
    query, output = example_tensor(call.query), call.output()
    assert query is not None and output is not None
    order = output_order(output)
    # With a sink, a row whose keys are all masked gives its weight to the sink, and does not attend to all keys alike.
    seeing = mask.seeing if call.sink is None else None
    if seeing is None and _is_transposed_and_copied(call):
        order = NHD
        output = _in_nhd(output)
    options: dict[str, Any] = {
        "is_causal": mask.is_causal,
        "scale": call.scale,
        "enable_gqa": call.enable_gqa,
        "bottom_right": mask.bottom_right,
        "window_left": mask.window_left,
        "window_right": mask.window_right,
        # Users of the node rely on SDPA's strides: they are named where our default would differ.
        "memory_order": None if order == memory_order(query) and order_is_known(query) else order,
        "min_q_len": choice.min_q_len,
        "min_kv_len": choice.min_kv_len,
        # What is known of the first call's sizes may not hold for those of others.
        "or_exact": not all(map(_has_known_sizes, (call.query, call.key, call.value))),
        "smoothing": site.smoothing,
        "wires": wires if is_dtensor(query) else "inputs",
        "skip_threshold": site.skip_threshold,
        "skip_by": site.skip_by,
    }
    kwargs = {name: value for name, value in options.items() if value != DEFAULTS[name]}
    kwargs |= {"kernel_name": site.kernel, "precision": site.precision}
    gives_lse = call.lse is not None and call.lse.is_read
    target = training.attention_training if output.requires_grad else inference.attention
    if gives_lse:
        target = inference.attention_lse
    if output.requires_grad and call.node.target in SDPA_TARGETS:
        kwargs["gradient_order"] = _gradient_order(call)
    inputs = (call.query, call.key, call.value) + ((mask.attn_mask,) if mask.attn_mask is not None else ())
    with graph.inserting_before(old):
        args = tuple(item.insert(graph) if isinstance(item, Expr) else item for item in inputs)
        for name, bound in (("window_left", mask.left_bound), ("window_right", mask.right_bound)):
            if bound is not None:
                kwargs[name] = bound.insert(graph) if isinstance(bound, Expr) else bound
        if mask.left_bound is not None and mask.is_causal:
            kwargs["left_is_bound"] = True
        if call.sink is not None:
            kwargs["sink"] = call.sink.insert(graph) if isinstance(call.sink, Expr) else call.sink
        for name, ids in (("query_segments", mask.query_segments), ("key_segments", mask.key_segments)):
            if ids is not None:
                kwargs[name] = insert_once(ids, graph)
        new = graph.call_function(target, args, kwargs)
        new.meta = {**old.meta, "example_value": output, "sage_site": site.name}
        lse = None
        if gives_lse:
            new, lse = _output_and_lse(new, output, call)
        if moves_to is not None:
            # The nodes behind were traced with these placements.
            from sage_inductor.operators.distributed.handler import placed

            new = graph.call_function(placed, (new, moves_to))
            new.meta = {**old.meta, "example_value": output}
        if seeing is not None:
            new = with_uniform_rows(new, seeing, call).insert(graph)
            new.meta = {**old.meta, "example_value": output}
        for method, arguments in call.restore:
            value = traced(new.meta["example_value"], ((method, arguments),))
            new = graph.call_method(method, (new, *arguments))
            new.meta = {**old.meta, "example_value": value}
    return Substitute(old, new, order == NHD and not call.restore, lse, call.lse is not None)


def _output_and_lse(both: fx.Node, output: Tensor, call: AttentionCall) -> tuple[fx.Node, fx.Node]:
    """The items of `both`, a call of the operator that gives output and LSE: the LSE in the form that `call` gives it in."""
    graph, form = both.graph, call.lse
    assert form is not None
    with tracing(output):
        value = torch.empty(output.shape[:-1], dtype=torch.float32, device=output.device)
    site, inherited = both.meta["sage_site"], {**both.meta}
    del inherited["sage_site"]
    both.meta = {**inherited, "example_value": (output, value), "sage_site": site}
    first, last = (graph.call_function(operator.getitem, (both, item)) for item in (0, 1))
    first.meta, last.meta = {**inherited, "example_value": output}, {**inherited, "example_value": value}
    for step, arguments in form.steps:
        if isinstance(step, str):
            last = graph.call_method(step, (last, *arguments))
        else:
            last = graph.call_function(step, (last, *arguments))
        last.meta = {**inherited, "example_value": form.value}
    return first, last


def _in_nhd(output: Tensor) -> Tensor:
    """What tracing would record for `output` in the order NHD."""
    if is_dtensor(output):
        return traced(output, (("transpose", (1, 2)), ("contiguous", ()), ("transpose", (1, 2))))
    wants_gradients = output.requires_grad
    with tracing(output):
        return torch.empty_permuted(
            output.shape, NHD, dtype=output.dtype, device=output.device, requires_grad=wants_gradients
        )


def _has_known_sizes(item: Value) -> bool:
    tensor = example_tensor(item)
    return tensor is not None and all(isinstance(size, int) for size in sizes_of(tensor))


def _gradient_order(call: AttentionCall) -> list[int]:
    """The memory orders in which SDPA's backward gives the gradients of query, key and value, one behind the other. Of
    symbolic sizes, those they had when they were traced."""
    output = call.output()
    assert output is not None

    def alike(item: Value) -> Tensor:
        tensor = example_tensor(item)
        assert tensor is not None
        shape, strides = (
            [size if isinstance(size, int) else hinted(size, UNKNOWN) for size in sizes]
            for sizes in (tensor.shape, tensor.stride())
        )
        dtype = output.dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(shape, strides, dtype=dtype, device=tensor.device)

    # Anomaly detection would look for NaN in gradients that hold no numbers.
    with tracing(output), torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
        mask = None if call.attn_mask is None else alike(call.attn_mask)
        q, k, v = (alike(item).requires_grad_() for item in (call.query, call.key, call.value))
        out = SDPA(q, k, v, mask, is_causal=call.is_causal is True, enable_gqa=call.enable_gqa)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    return [dim for grad in grads for dim in all_in_memory_order(grad)]


def _is_transposed_and_copied(call: AttentionCall) -> bool:
    """Whether the output is read by `transpose(1, 2)` only, and that by a single node, which copies it.

    An output that has that order in memory from the beginning saves the copy, and nobody sees the other strides. With two
    readers each gets a copy that it may write to; two views would share their memory. A reshape that is a view of the
    output as it lies shows the output's strides: it counts as a copy only if they are those of a copy.
    """
    if call.restore or (tensor := example_tensor(call.node)) is None or tensor.dim() != 4:
        return False
    users = list(call.node.users)
    readers = [reader for user in users for reader in user.users]
    if len(readers) != 1 or not all(map(_is_transposed, users)) or not _takes_any_strides(readers[0]):
        return False
    value, output = example_tensor(readers[0]), example_tensor(call.node)
    if value is None or output is None or not is_dense(value):
        return False
    # Of sizes that only the data tell, one may turn out to be 1, and what looked like a copy to be a view.
    sizes = sizes_of(output)
    return all(map(is_backed, output.shape)) or sizes_of(value)[:2] == (sizes[0], sizes[2])


def _is_transposed(node: fx.Node) -> bool:
    """Whether `node` is `x.transpose(1, 2)` of a 4-D x."""
    found = permutation(node)
    return found is not None and found[1] == tuple(NHD)


def _takes_any_strides(node: fx.Node) -> bool:
    if operation(node) == "contiguous":
        return len(node.args) == 1 and not node.kwargs
    return operation(node) in ("reshape", "flatten")


@dataclass(frozen=True)
class Inlined:
    """The nodes of an expansion in the graph, until it is decided whether they replace the opaque node."""

    nodes: list[fx.Node]
    output: Any  # nodes in the structure of the opaque node's value

    def replace(self, node: fx.Node) -> None:
        """Give the users of the opaque `node` our values, and erase it."""
        if isinstance(self.output, fx.Node):
            node.replace_all_uses_with(self.output)
        else:
            for user in list(node.users):  # getitem(node, i); nothing reads an item that is None
                item = self.output[user.args[1]]
                if item is not None:
                    user.replace_all_uses_with(item)
                assert reads_nothing(user), user
                _erase_with_readers(user)
        node.graph.erase_node(node)

    def remove(self) -> None:
        for node in reversed(self.nodes):
            node.graph.erase_node(node)


def insert_expansion(node: fx.Node, expansion: Expansion) -> Inlined:
    """Insert the nodes of `expansion` before the opaque `node`. They get its place in the model and its line of code."""
    graph = node.graph
    placeholders = [inner for inner in expansion.graph.nodes if inner.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(placeholders, expansion.inputs, strict=True))
    wants_gradients = any(tensor.requires_grad for tensor in tensors_of(example_value(node)))
    inherited = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    copied = []
    output: Any = None
    with graph.inserting_before(node):
        for inner in expansion.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                output = fx.node.map_arg(inner.args[0], lambda argument: mapping[argument])
                continue
            assert inner.op == "call_function", f"an expansion holds {inner.op} {inner.target}"
            mapping[inner] = graph.node_copy(inner, lambda argument: mapping[argument])
            value = (
                _with_gradients(inner.meta["val"], mapping[inner]) if wants_gradients else inner.meta["val"]
            )
            mapping[inner].meta = {**inherited, "example_value": value}
            copied.append(mapping[inner])
    return Inlined(copied, output)


def _with_gradients(value: Any, node: fx.Node) -> Any:
    """`value`, with `requires_grad` set if an input of its `node` has it: the expansion was traced without gradients."""
    inputs = map(example_tensor, node.all_input_nodes)
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return value
    with tracing(value), torch.enable_grad():
        return fx.node.map_aggregate(value, _wanting_gradients)


def _wanting_gradients(item: Any) -> Any:
    is_float = isinstance(item, torch.Tensor) and item.is_floating_point()
    return item.detach().requires_grad_() if is_float else item


def _erase_unused(nodes: list[fx.Node]) -> None:
    """Remove nodes that the call read before (repeated heads, scores, weights), as far as nothing else reads them."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if is_erased(node):
            continue
        if not all(map(reads_nothing, node.users)) or node.op not in ("call_method", "call_function"):
            continue
        if is_pure(node) or (operation(node) in ARITHMETIC_IN_PLACE and _writes_to_nothing_else(node)):
            inputs = node.all_input_nodes
            _erase_with_readers(node)
            pending.extend(inputs)


def _erase_with_readers(node: fx.Node) -> None:
    while node.users:
        _erase_with_readers(next(iter(node.users)))
    node.graph.erase_node(node)


def _writes_to_nothing_else(node: fx.Node) -> bool:
    """Whether `node` overwrites a fresh tensor that nothing else reads."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or set(target.users) != {node}:
        return False
    if target.op not in ("call_method", "call_function"):
        return False
    return is_fresh(target) or (operation(target) in ARITHMETIC_IN_PLACE and _writes_to_nothing_else(target))
