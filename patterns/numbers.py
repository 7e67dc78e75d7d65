"""What numbers nodes stand for: constants, and tensors filled with one."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import fx

from sage_inductor.graph.call import example_tensor, example_value
from sage_inductor.graph.facts import fill, operation
from sage_inductor.patterns.nodes import DIV, MUL, casts_floats, operands
from sage_inductor.torch_internals.dispatch import outside_tracing
from sage_inductor.torch_internals.sizes import number_of


def number(item: Any) -> float | None:
    """A constant: a number, or a traced one-element tensor made from a number."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, fx.Node):
        tensor = example_tensor(item)
        if tensor is None and isinstance(found := number_of(example_value(item)), (int, float)):
            return float(found)
        if tensor is not None and tensor.dim() == 0:
            return _constant_scalar(item)
    return None


def is_symbol(item: Any) -> TypeGuard[fx.Node]:
    """Whether `item` is a number that is not known while compiling."""
    return isinstance(item, fx.Node) and isinstance(
        number_of(example_value(item)), (torch.SymFloat, torch.SymInt)
    )


def _constant_scalar(node: fx.Node) -> float | None:
    """The value of `torch.tensor(8.0)`, `torch.full([], 8.0)`, their square roots, products and casts."""
    name = operation(node)
    first = node.args[0] if node.args else None
    if name == "full" and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return _as_held(node.args[1], node)
    if name in ("tensor", "scalar_tensor", "as_tensor", "_as_tensor_fullprec") and isinstance(
        first, (int, float)
    ):
        return _as_held(first, node)
    if name == "sqrt" and isinstance(first, fx.Node):
        inner = number(first)
        return None if inner is None or inner < 0 else math.sqrt(inner)
    if (node in MUL or node in DIV) and node.kwargs.get("rounding_mode") is None:
        left, right = map(number, operands(node))
        if left is None or right is None or (node in DIV and right == 0):
            return None
        return left * right if node in MUL else left / right
    return number(first) if casts_floats(node) and isinstance(first, fx.Node) else None


def _as_held(value: float, node: fx.Node) -> float:
    tensor = example_tensor(node)
    return float(value) if tensor is None else held(value, tensor.dtype)


def held(value: float, dtype: torch.dtype) -> float:
    """`value` as a tensor of `dtype` holds it: 2.7 is 2 among integers, and -65504 is -65536 in bfloat16."""
    if not math.isfinite(value) or dtype.itemsize > 2 and dtype.is_floating_point:
        return float(value)
    if not dtype.is_floating_point:
        return float(bool(value) if dtype == torch.bool else int(value))
    with outside_tracing():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def filled_with(item: Any) -> float | None:
    """The number that `item` is, or that fills it: `torch.full_like(x, -1e9)`, `-1e9 * torch.ones_like(x)`."""
    if not isinstance(item, fx.Node) or number(item) is not None:
        return number(item)
    if (filling := fill(item)) is not None:
        found = number(filling)
        return None if found is None else _as_held(found, item)
    if item in MUL:
        left, right = map(filled_with, operands(item))
        return None if left is None or right is None else left * right
    return None
