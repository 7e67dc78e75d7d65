"""What nodes of a graph are, whatever spelling was used: matrix products, softmax, scalings, masks, views."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sage_inductor.call import Value, example_tensor, example_value

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """Nodes that compute the same: methods by name, functions by identity."""

    methods: tuple[str, ...] = ()
    functions: tuple[Any, ...] = ()

    def __contains__(self, node: Any) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_method":
            return node.target in self.methods
        return node.op == "call_function" and node.target in self.functions


MATMUL = Kind(
    ("matmul", "bmm", "mm", "__matmul__"),
    (
        torch.matmul, torch.bmm, torch.mm, operator.matmul, aten.matmul.default, aten.bmm.default, aten.mm.default,
    ),
)  # fmt: skip
BADDBMM = Kind(("baddbmm",), (torch.baddbmm, aten.baddbmm.default))
EINSUM = Kind((), (torch.einsum, torch.functional.einsum, aten.einsum.default))
SOFTMAX = Kind(
    ("softmax",),
    (
        F.softmax,
        torch.softmax,
        torch.special.softmax,
        aten.softmax.int,
        aten._softmax.default,
        aten._safe_softmax.default,
    ),
)
CAST = Kind(
    ("float", "half", "bfloat16", "to", "type", "type_as"),
    (aten.to.dtype, aten._to_copy.default, aten.type_as.default),
)
SAME = Kind(("contiguous", "clone"), (torch.clone, aten.clone.default, aten.contiguous.default))
# All of them leave the order of the elements as it is.
RESHAPE = Kind(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    (
        torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, aten.view.default,
        aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    ),
)  # fmt: skip
ADD = Kind(
    ("add", "add_", "__add__"), (operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor)
)
SUB = Kind(
    ("sub", "sub_", "subtract", "__sub__"),
    (operator.sub, operator.isub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub_.Tensor),
)
MUL = Kind(
    ("mul", "mul_", "multiply", "__mul__"),
    (
        operator.mul,
        operator.imul,
        torch.mul,
        torch.multiply,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.mul_.Tensor,
    ),
)
DIV = Kind(
    ("div", "div_", "divide", "true_divide"),
    (
        operator.truediv,
        operator.itruediv,
        torch.div,
        torch.divide,
        torch.true_divide,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.div_.Tensor,
    ),
)
MAXIMUM = Kind(("maximum", "max"), (torch.maximum, torch.max, aten.maximum.default))
AMAX = Kind(("amax",), (torch.amax, aten.amax.default, aten.max.dim))
DETACH = Kind(("detach",), (torch.detach, aten.detach.default))
CLAMP = Kind(
    ("clamp", "clamp_", "clamp_min"),
    (torch.clamp, aten.clamp.default, aten.clamp_.default, aten.clamp_min.default),
)
MASKED_FILL = Kind(
    ("masked_fill", "masked_fill_"), (torch.masked_fill, aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
)
WHERE = Kind((), (torch.where, aten.where.self, aten.where.ScalarOther))
TRANSPOSE = Kind(("transpose", "swapaxes"), (torch.transpose, torch.swapaxes, aten.transpose.int))
PERMUTE = Kind(("permute",), (torch.permute, aten.permute.default))
EXPAND = Kind(("expand", "expand_as"), (aten.expand.default,))
# What they read of the second operand is its shape or dtype.
TAKES_AFTER = Kind(
    ("expand_as", "view_as", "reshape_as", "type_as"),
    (aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default),
)
DROPOUT = Kind((), (F.dropout, torch.dropout, aten.dropout.default))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    return argument(node, 0, "input"), argument(node, 1, "other")


def shape_of(item: Value | None) -> tuple[Any, ...]:
    tensor = example_tensor(item)
    return () if tensor is None else tuple(tensor.shape)


def unexpanded(item: Any) -> Any:
    """`item` before it was expanded: it broadcasts by itself, and a kernel reads less of it."""
    while item in EXPAND and isinstance(item.args[0], fx.Node):
        item = item.args[0]
    return item


def casts_floats(node: fx.Node) -> bool:
    """A cast to a floating dtype; one to integers changes what is computed."""
    tensor = example_tensor(node)
    return node in CAST and tensor is not None and tensor.is_floating_point()


def only_reader(node: fx.Node, *readers: fx.Node) -> bool:
    """Whether `readers` alone read the values of `node`; others may ask for its shape or dtype."""
    return {user for user in node.users if not _reads_shape_only(user, node)} == set(readers)


def row_maximum(node: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, the nodes in between, `node` last) where `node` is the largest of each row of x, kept as a dim of 1;
    None when it is something else."""
    between: list[fx.Node] = []
    while isinstance(node, fx.Node) and (node in DETACH or (node.target in (operator.getitem, getattr))):
        if node not in DETACH and node.args[1] not in (0, "values"):
            return None
        between.append(node)
        node = node.args[0]
    if node not in AMAX and node not in MAXIMUM:
        return None
    source, tensor = argument(node, 0, "input"), example_tensor(between[-1] if between else node)
    dim, keepdim = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rank = len(shape_of(source)) if isinstance(source, fx.Node) else 0
    if not isinstance(dim, int) or dim not in (-1, rank - 1) or keepdim is not True or tensor is None:
        return None
    return source, (node, *reversed(between))


def reads_nothing(node: fx.Node) -> bool:
    """Whether `node` can go with what it reads: what torch.export puts beside each cast, a check of the dtype that went
    into it, or beside `x.max(-1)[0]`, the positions that nobody reads."""
    unread = node.target is operator.getitem and not node.users
    return unread or node.target is aten._assert_tensor_metadata.default


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    if reads_nothing(user):
        return True
    if user in TAKES_AFTER:
        return len(user.args) == 2 and user.args[1] is node and user.args[0] is not node
    if user.op != "call_method":
        return user.target is getattr and user.args[1] in ("shape", "dtype", "device")
    return user.target in ("size", "dim")


def number(item: Any) -> float | None:
    """A constant: a number, or a traced one-element tensor made from a number."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, fx.Node):
        tensor = example_tensor(item)
        if tensor is None and isinstance(example_value(item), (int, float)):
            return float(example_value(item))
        if tensor is not None and tensor.dim() == 0:
            return _constant_scalar(item)
    return None


def _constant_scalar(node: fx.Node) -> float | None:
    """The value of `torch.tensor(8.0)`, `torch.full([], 8.0)`, their square roots, products and casts."""
    name = str(getattr(node.target, "__name__", node.target))
    first = node.args[0] if node.args else None
    if name == "full" and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if name in ("tensor", "scalar_tensor", "as_tensor", "_as_tensor_fullprec") and isinstance(
        first, (int, float)
    ):
        return float(first)
    if name == "sqrt" and isinstance(first, fx.Node):
        inner = number(first)
        return None if inner is None or inner < 0 else math.sqrt(inner)
    if (node in MUL or node in DIV) and node.kwargs.get("rounding_mode") is None:
        left, right = map(number, operands(node))
        if left is None or right is None or (node in DIV and right == 0):
            return None
        return left * right if node in MUL else left / right
    return number(first) if casts_floats(node) and isinstance(first, fx.Node) else None
