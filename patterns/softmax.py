"""The softmax, as one node or written out: `exp(x - max) / sum`, `exp(x - logsumexp(x))`, `log_softmax(x).exp()`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import fx

from sage_inductor.patterns.nodes import (
    ADD,
    AMAX,
    DIV,
    EXP,
    LOG_SOFTMAX,
    LOGSUMEXP,
    MAXIMUM,
    SOFTMAX,
    SUB,
    SUM,
    Reduction,
    argument,
    only_reader,
    operands,
    reduction,
    shape_of,
    uncast,
)
from sage_inductor.patterns.numbers import number

# The most that may be added to the sum of the exponentials against a division by 0. The sum is at least 1 where the maximum
# was subtracted; 8 bits change the weights by far more.
EPSILON = 1e-5


@dataclass(frozen=True)
class Softmax:
    """The softmax of `logits` along `dim` (0 and above); `readers` are its nodes that read the logits."""

    logits: fx.Node
    dim: int
    readers: tuple[fx.Node, ...]


def softmax(node: Any) -> Softmax | None:
    """`node` as a softmax. None where it is none, or where something else reads a value inside it."""
    if node in SOFTMAX:
        return _one_node(node)
    if node in EXP:
        return _of_logarithms(node)
    exponential, divisor = quotient(node)
    return divided(node, exponential, divisor, node)


def _one_node(node: fx.Node) -> Softmax | None:
    source, dim = argument(node, 0, "input"), argument(node, 1, "dim")
    rank = len(shape_of(source)) if isinstance(source, fx.Node) else 0
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or not -rank <= dim < rank:
        return None
    return Softmax(source, dim % rank, (node,))


def _of_logarithms(node: fx.Node) -> Softmax | None:
    """`log_softmax(x).exp()`, `exp(x - logsumexp(x))`."""
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or not only_reader(source, node):
        return None
    if source in LOG_SOFTMAX:
        return _one_node(source)
    found = _subtracted(source, LOGSUMEXP)
    return None if found is None else Softmax(found.source, found.dim, (source, found.chain[0]))


def quotient(node: Any) -> tuple[Any, Any]:
    """(dividend, divisor) of `node`; (None, None) where it is no division."""
    return operands(node) if node in DIV and node.kwargs.get("rounding_mode") is None else (None, None)


def divided(node: fx.Node, exponential: Any, divisor: Any, user: fx.Node) -> Softmax | None:
    """`e / e.sum(dim, keepdim=True)` as the softmax of x, where e is `exp(x)`, or a cast of it. `node` divides by the sum;
    `user` is the only other reader of e."""
    power = uncast(exponential)
    source = argument(power, 0, "input") if power in EXP else None
    if not isinstance(source, fx.Node):
        return None
    reader, epsilon = node, None
    if divisor in ADD:
        epsilon = number(operands(divisor)[1])
        if epsilon is None or not 0 <= epsilon <= EPSILON or not only_reader(divisor, node):
            return None
        reader, divisor = divisor, operands(divisor)[0]
    total = reduction(divisor, SUM)
    if total is None or total.source is not exponential or not _read_by_one(total, reader):
        return None
    if epsilon is not None and own_maximum(source, total.dim) is None:
        return None  # the sum may be as small
    if not only_reader(exponential, user, total.chain[0]):
        return None
    return Softmax(source, total.dim, (power,))


def own_maximum(node: fx.Node, dim: int) -> fx.Node | None:
    """The first node of `x.amax(dim, keepdim=True)` where `node` is x minus it, and nothing else reads it. The softmax does
    not see what is the same for all keys. None where `node` is anything else."""
    found = _subtracted(node, AMAX, MAXIMUM)
    return found.chain[0] if found is not None and found.dim == dim else None


def _subtracted(node: fx.Node, *kinds: Any) -> Reduction | None:
    """The reduction of x where `node` is x minus it. It is one of `kinds`, and nothing else reads it."""
    first, second = operands(node) if node in SUB and node.kwargs.get("alpha", 1) == 1 else (None, None)
    found = reduction(second, *kinds)
    return found if found is not None and found.source is first and _read_by_one(found, node) else None


def _read_by_one(found: Reduction, reader: fx.Node) -> bool:
    return all(only_reader(item, user) for item, user in itertools.pairwise((*found.chain, reader)))
