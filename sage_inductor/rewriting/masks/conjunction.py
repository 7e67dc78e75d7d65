"""The parts of a bool mask: the values whose logical and it is."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import AND, BROADCASTS, CASTS, NOT, OR, operation
from sage_inductor.graph.writes import Writes


def conjuncts(mask: Value, writes: Writes) -> list[Value]:
    """The values whose logical and `mask` is, each of which broadcasts to it."""
    tensor = example_tensor(mask)
    if tensor is None or tensor.dtype != torch.bool or not is_function(mask, writes):
        return [mask]
    operands = [arg for arg in mask.args if isinstance(arg, (fx.Node, Expr))]
    name = operation(mask)
    if name in BROADCASTS and operands:
        return conjuncts(operands[0], writes)
    if name in CASTS and operands:
        source = example_tensor(operands[0])
        same = source is not None and (source.dtype, source.device) == (tensor.dtype, tensor.device)
        return conjuncts(operands[0], writes) if same else [mask]
    if name in AND and len(operands) == 2:
        return [part for operand in operands for part in conjuncts(operand, writes)]
    if name in NOT and len(operands) == 1 and is_function(operands[0], writes):
        (negated,) = operands
        inner = [arg for arg in negated.args if isinstance(arg, (fx.Node, Expr))]
        if operation(negated) in NOT and len(inner) == 1:
            return conjuncts(inner[0], writes)
        if operation(negated) in OR and len(inner) == 2:
            return [part for item in inner for part in conjuncts(Expr.of(torch.logical_not, item), writes)]
    return [mask]


def joined(parts: Sequence[Value]) -> Value:
    """The logical and of `parts`, of which there is one at least."""
    return functools.reduce(lambda left, right: Expr.of(torch.logical_and, left, right), parts)


def is_function(item: Value, writes: Writes) -> bool:
    """Whether the value of `item` is what its target gives for its arguments, and stays so."""
    if isinstance(item, Expr):
        return True
    return item.op in ("call_function", "call_method") and not writes.touch(item)
