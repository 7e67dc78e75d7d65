"""The records that flow through the stages of the pass: what a pattern finds, and what a pattern is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx

from sage_inductor.graph.sizes import all_in_memory_order, is_static
from sage_inductor.torch_internals.dispatch import dispatches_itself
from sage_inductor.torch_internals.operators import operator_name
from sage_inductor.torch_internals.sdpa import builtin_sdpa
from sage_inductor.torch_internals.sizes import without_guards
from sage_inductor.torch_internals.traced import fake_mode_of, first_fake


@dataclass(frozen=True)
class Expr:
    """A value that the graph does not hold yet: a call whose arguments are nodes, other expressions and constants.

    Patterns describe transposed keys or combined masks in this form. The nodes are made only if the call is rewritten.
    `value` is what tracing would record for it.
    """

    target: str | Callable[..., Any]  # the name of a method, or a function
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    value: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Expr:
        """The expression. Its value is computed from the traced values of its arguments."""
        values = [example_value(arg) if isinstance(arg, (fx.Node, Expr)) else arg for arg in args]
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with tracing(*values):
            return cls(target, args, kwargs, function(*values, **kwargs))

    def insert(self, graph: fx.Graph) -> fx.Node:
        """Write the expression as nodes at the insertion point of `graph`, and return the last one."""
        args = tuple(arg.insert(graph) if isinstance(arg, Expr) else arg for arg in self.args)
        if isinstance(self.target, str):
            node = graph.call_method(self.target, args, self.kwargs)
        else:
            node = graph.call_function(self.target, args, self.kwargs)
        node.meta["example_value"] = self.value
        return node


def node_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else value_name(node)


def value_name(item: Value) -> str:
    """What `item` calls: the name of a method, function or aten operator."""
    operator = operator_name(item.target)
    return (
        str(getattr(item.target, "__name__", item.target))
        if operator is None
        else operator.partition("::")[2]
    )


def traced(value: Tensor, steps: Iterable[tuple[str, tuple[Any, ...]]]) -> Tensor:
    """What tracing would record for `value` after these methods, each with its arguments."""
    with tracing(value):
        for method, args in steps:
            value = getattr(value, method)(*args)
    return value


def laid_out_as(tensor: Tensor) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Methods, with their arguments, that copy another tensor of this shape into the same order of dims in memory."""
    memory = tuple(all_in_memory_order(tensor))
    back = tuple(memory.index(dim) for dim in range(tensor.dim()))
    return ("permute", memory), ("contiguous", ()), ("permute", back)


def tracing(*values: Any) -> AbstractContextManager[Any]:
    """The fake mode of traced `values`, in which they can be computed with; a null context where they have none.

    Questions about symbolic sizes inside it add no guard. Whoever traces the graph later asks for himself.
    """
    mode = next((mode for mode in map(fake_mode_of, values) if mode is not None), None)
    if mode is None:
        return nullcontext()
    are_known = all(is_static(value) for value in values if isinstance(value, Tensor))
    return mode if are_known else without_guards(mode)


SDPA = builtin_sdpa
"""torch's own `F.scaled_dot_product_attention`, also where something else was put in its place."""
SDPA_TARGETS: tuple[Any, ...] = (
    SDPA,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
"""The targets of nodes that call SDPA: the function in Dynamo's graphs, the overload in exported programs."""

Value: TypeAlias = "fx.Node | Expr"


@dataclass(frozen=True)
class LseForm:
    """The LSE that a call gives behind its output, as item 1 of its node's tuple, of which nothing else is read."""

    is_read: bool
    steps: tuple[tuple[str | Callable[..., Any], tuple[Any, ...]], ...] = ()
    """Methods or functions, with their further arguments, that make it of a contiguous float32 `[batch, heads, q_len]`."""
    value: Tensor | None = None
    """What tracing recorded for it."""


@dataclass(frozen=True)
class Band:
    """The keys that query i may attend to: `-left <= j - (i + kv_len - q_len) <= right`. A negative number is no bound."""

    left: int = -1
    right: int = -1


@dataclass(frozen=True)
class Standing:
    """An operator of another library that stands where SDPA would. A kernel has to be faster than it, not than SDPA."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Any] = field(compare=False)
    """It, of other query, key and value as `AttentionCall` has them."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention found in a graph. `node` is the node whose value is the attention output, or, with `lse`, a tuple that
    begins with it.

    query `[batch, heads, q_len, head_dim]`, key and value `[batch, kv_heads, kv_len, ...]`; batch, or batch and heads, may
    be missing. attn_mask is as for `F.scaled_dot_product_attention`. An option that the graph computes at run time is
    held as its node.
    """

    node: fx.Node
    pattern: str
    query: Value
    key: Value
    value: Value
    attn_mask: Value | None = None
    dropout_p: float | fx.Node = 0.0
    is_causal: bool | fx.Node = False
    scale: float | fx.Node | None = None
    enable_gqa: bool = False
    sink: Value | None = None
    """A logit beside those of the keys. It takes weight and has no value. Broadcasts to `[batch, heads, q_len]`."""
    restore: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Methods, with their arguments, that turn the attention output into the value of `node`."""
    undo: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Methods, with their arguments, that turn the traced value of `node` back into that of the attention output."""
    lse: LseForm | None = None
    band: Band | None = None
    """Beside neither a mask nor `is_causal`."""
    standing: Standing | None = None
    output_value: Tensor | None = None
    """The attention output where it is another than tracing recorded for `node`: this rank's part of a DTensor."""

    def output(self) -> Tensor | None:
        """What tracing recorded for the attention output, before `restore`."""
        if self.output_value is not None:
            return self.output_value
        value = example_tensor(self.node) if self.lse is None else example_value(self.node)[0]
        return traced(value, self.undo) if value is not None and self.undo else value


class Pattern(ABC):
    """One way in which attention is written."""

    name: ClassVar[str]
    under_transforms: ClassVar[bool] = False
    """Whether `match` may be called inside vmap or grad, where it must not compute with traced values."""

    @abstractmethod
    def match(self, node: fx.Node) -> AttentionCall | None:
        """The call whose output is `node`, or None when `node` is not this idiom. Must not change the graph."""

    @abstractmethod
    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        """(function, inputs) pairs that hold the idiom, for the tests and the documentation."""


class OpaquePattern(ABC):
    """A node that holds attention without showing it."""

    name: ClassVar[str]

    @abstractmethod
    def expand(self, node: fx.Node) -> Expansion | None:
        """The mathematics of `node`, traced; None when `node` is not this one. Must not change the graph."""

    def closed_reasons(self, node: fx.Node) -> list[str]:
        """Why `node` cannot be opened although it is this one. Empty where it can, and where it is something else."""
        return []

    @abstractmethod
    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        """(function, inputs) pairs that hold the node."""


@dataclass(frozen=True)
class Expansion:
    """The mathematics of an opaque node. `graph` has a placeholder for each of `inputs`; its output has the structure of the
    node's value, into which users of the node index."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]


def trace(
    function: Callable[..., Any], inputs: tuple[fx.Node, ...], autocast: torch.dtype | None = None
) -> Expansion | None:
    """`function` of the values of `inputs`, traced before dispatch, so that an SDPA call stays one node.

    With `autocast` it is traced as under autocast to that dtype. None for inputs that cannot be traced: those that are neither
    tensors nor symbolic sizes, or are of subclasses with a dispatch of their own.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    values = [example_value(node) for node in inputs]
    fake = first_fake(values)
    if fake is None or any(
        not isinstance(value, (torch.Tensor, torch.SymInt))
        or (isinstance(value, torch.Tensor) and dispatches_itself(value))
        for value in values
    ):
        return None
    casting = torch.autocast(fake.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
    with fake.fake_mode, torch.no_grad(), casting:
        traced = make_fx(function, pre_dispatch=True)(*values)
    return Expansion(traced.graph, inputs)


def leaves(item: Any) -> list[fx.Node]:
    """The nodes in a value: itself, or those in the arguments of an expression."""
    if isinstance(item, fx.Node):
        return [item]
    return [leaf for arg in item.args for leaf in leaves(arg)] if isinstance(item, Expr) else []


def example_value(item: Value) -> Any:
    """The value that tracing recorded: `example_value` in Dynamo's graphs, `val` in exported and AOT graphs."""
    if isinstance(item, Expr):
        return item.value
    return item.meta["example_value"] if "example_value" in item.meta else item.meta.get("val")


def example_tensor(item: Value | None) -> Tensor | None:
    """`example_value` when it is a tensor."""
    value = None if item is None else example_value(item)
    return value if isinstance(value, torch.Tensor) else None
