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
    ("matmul", "bmm", "__matmul__"),
    (torch.matmul, torch.bmm, operator.matmul, aten.matmul.default, aten.bmm.default),
)
BADDBMM = Kind(("baddbmm",), (torch.baddbmm, aten.baddbmm.default))
EINSUM = Kind((), (torch.einsum, torch.functional.einsum))
SOFTMAX = Kind(
    ("softmax",),
    (F.softmax, torch.softmax, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default),
)
CAST = Kind(("float", "half", "bfloat16", "to", "type", "type_as"), (aten.to.dtype, aten._to_copy.default))
SAME = Kind(("contiguous", "clone"), (torch.clone, aten.clone.default, aten.contiguous.default))
# All of them leave the order of the elements as it is.
RESHAPE = Kind(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    (
        torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, aten.view.default,
        aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    ),
)  # fmt: skip
ADD = Kind(("add", "add_", "__add__"), (operator.add, operator.iadd, torch.add, aten.add.Tensor))
SUB = Kind(("sub", "sub_", "__sub__"), (operator.sub, operator.isub, torch.sub, aten.sub.Tensor))
MUL = Kind(
    ("mul", "mul_", "multiply", "__mul__"),
    (operator.mul, operator.imul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar),
)
DIV = Kind(
    ("div", "div_", "true_divide"),
    (operator.truediv, operator.itruediv, torch.div, torch.true_divide, aten.div.Tensor, aten.div.Scalar),
)
MAXIMUM = Kind(("maximum", "max"), (torch.maximum, torch.max, aten.maximum.default))
CLAMP = Kind(("clamp", "clamp_", "clamp_min"), (torch.clamp, aten.clamp.default, aten.clamp_min.default))
MASKED_FILL = Kind(("masked_fill", "masked_fill_"), (torch.masked_fill, aten.masked_fill.Scalar))
WHERE = Kind((), (torch.where, aten.where.self, aten.where.ScalarOther))
TRANSPOSE = Kind(("transpose", "swapaxes"), (torch.transpose, torch.swapaxes, aten.transpose.int))
PERMUTE = Kind(("permute",), (torch.permute, aten.permute.default))
EXPAND = Kind(("expand", "expand_as"), (aten.expand.default,))
DROPOUT = Kind((), (F.dropout, torch.dropout, aten.dropout.default))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    return argument(node, 0, "input"), argument(node, 1, "other")


def shape_of(item: Value | None) -> tuple[Any, ...]:
    tensor = example_tensor(item)
    return () if tensor is None else tuple(tensor.shape)


def casts_floats(node: fx.Node) -> bool:
    """A cast to a floating dtype; one to integers changes what is computed."""
    tensor = example_tensor(node)
    return node in CAST and tensor is not None and tensor.is_floating_point()


def only_reader(node: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` alone reads the values of `node`; others may ask for its shape or dtype."""
    return {user for user in node.users if not _reads_shape_only(user, node)} == {reader}


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    if user.op != "call_method":
        return user.target is getattr and user.args[1] in ("shape", "dtype", "device")
    if user.target in ("expand_as", "view_as", "reshape_as", "type_as"):
        return len(user.args) == 2 and user.args[1] is node and user.args[0] is not node
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
