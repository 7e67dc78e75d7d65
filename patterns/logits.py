"""What stands between the first product and the softmax: factors, terms, masks, in any order and any view."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sage_inductor.call import Expr, Value, example_tensor
from sage_inductor.patterns.nodes import (
    ADD,
    CAST,
    CLAMP,
    DIV,
    MASKED_FILL,
    MAXIMUM,
    MUL,
    RESHAPE,
    SAME,
    SUB,
    WHERE,
    argument,
    casts_floats,
    number,
    only_reader,
    operands,
    row_maximum,
    shape_of,
    unexpanded,
)
from sage_inductor.patterns.products import Product, of_one_head, product

# A value written into logits hides a key when nothing that was in the row can compete with it: the smallest that is in
# use for that (-1e4, from the days of GPT-2 in float16) and all below.
HIDES = -1e4
# What such a value becomes: finite in bfloat16 and float32, and so is the sum of two, where eager overwrites one by the
# other (kernels take both for one number); just low enough that masks.py knows it for a key that is masked out.
HIDDEN = torch.finfo(torch.float32).min / 2
# What may be added to all logits of a row without a change of the softmax: rounding leaves the scores what they are.
SHIFT = 1e3
VIEWS = (
    "view",
    "reshape",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "getitem",
    "to",
    "float",
)


@dataclass(frozen=True)
class Term:
    """A tensor that broadcasts to logits, of shape `logits` where it meets them."""

    value: Value
    logits: tuple[Any, ...]


@dataclass(frozen=True)
class Logits:
    """`scale * factor * left @ right`, plus terms, with keys hidden; `factor` is a tensor of one number a row."""

    product: Product | None = None
    scale: float = 1.0
    factor: Value | None = None
    bias: tuple[Term, ...] = ()
    allowed: tuple[Term, ...] = ()
    views: tuple[tuple[Any, ...], ...] = ()  # the shapes that the logits take on the way
    floored: bool = False  # what is -inf becomes a finite minimum later on
    # Where the weights are set to zero, until it is seen to be where keys are hidden.
    zeroed: fx.Node | None = None
    zeroed_alone: bool = False  # finite numbers hid those keys, and must not compete with others

    def plus(self, term: Value, node: fx.Node) -> Logits:
        """With `term`, which `node` adds before everything that is known so far is done."""
        if self.scale != 1.0:
            term = Expr.of("mul", term, self.scale)
        if self.factor is not None:
            term = Expr.of("mul", term, self.factor)
        if self.floored:
            term = Expr.of("clamp", term, min=HIDDEN)
        return replace(self, bias=(*self.bias, Term(term, shape_of(node))))

    def hiding(self, hidden: Value, value: float, node: fx.Node) -> Logits | None:
        """With the logits at `hidden` overwritten by `value`, which `node` does."""
        final = value * self.scale  # what later factors make of it
        if final > HIDES or self.factor is not None:
            return None
        if hidden is self.zeroed:  # no weight is left there, even where all keys are hidden
            alone = final != -math.inf or self.floored
            term = Term(negated(hidden), shape_of(node))
            return replace(self, allowed=(*self.allowed, term), zeroed=None, zeroed_alone=alone)
        if final == -math.inf and not self.floored:
            term = Term(negated(hidden), shape_of(node))
            return replace(self, allowed=(*self.allowed, term))
        # A row whose keys are all hidden by a finite number attends to all of them alike: only an additive mask, of a
        # number beside which rounding loses the scores, keeps that.
        zeros = Expr.of(torch.zeros_like, hidden, dtype=torch.float32)
        term = Term(Expr.of("masked_fill", zeros, hidden, HIDDEN), shape_of(node))
        return replace(self, bias=(*self.bias, term))


def negated(mask: Value) -> Value:
    if isinstance(mask, Expr) and mask.target is torch.logical_not:
        inner: Value = mask.args[0]
        return inner
    return Expr.of(torch.logical_not, mask)


def logits_of(softmax: fx.Node, zeroed: fx.Node | None = None) -> Logits | None:
    """Walk from `softmax` back to the first product, gathering what lies between; None at anything unknown. Where
    `zeroed` is true the weights are set to zero afterwards."""
    readers: tuple[fx.Node, ...] = (softmax,)
    node = argument(softmax, 0, "input")
    logits = Logits(views=(shape_of(node),), zeroed=zeroed) if isinstance(node, fx.Node) else None
    while logits is not None:
        if not isinstance(node, fx.Node) or not only_reader(node, *readers):
            return None
        found = product(node) or of_one_head(node, scores=True)
        if found is not None:
            return _complete(logits, node, found)
        step = _step(node)
        if step is None:
            return None
        source, update = step
        readers, node, logits = step_readers(node, source), source, update(logits)
    return None


def step_readers(node: fx.Node, source: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes by which `node` reads `source`: itself, the multiplication it was looked through, or itself and the row
    maximum that it subtracts."""
    if source not in node.all_input_nodes:
        return (next(arg for arg in node.all_input_nodes if source in arg.all_input_nodes),)
    subtracted = _own_maximum(node)
    return (node,) if subtracted is None else (node, subtracted)


def _own_maximum(node: fx.Node) -> fx.Node | None:
    """The first node of the row maximum of x, where `node` is `x - maximum` and nothing else reads the maximum: the
    same for all keys, the softmax does not see it."""
    first, second = operands(node)
    found = row_maximum(second) if node in SUB and node.kwargs.get("alpha", 1) == 1 else None
    if found is None or found[0] is not first:
        return None
    chain = (*found[1], node)
    alone = all(only_reader(item, reader) for item, reader in itertools.pairwise(chain))
    return chain[0] if alone else None


def _complete(logits: Logits, node: fx.Node, found: Product) -> Logits | None:
    if found.restore or shape_of(node)[-2:] != logits.views[0][-2:]:
        return None
    if found.bias is not None:
        logits = logits.plus(found.bias, node)
    if logits.zeroed is not None or (logits.zeroed_alone and (logits.bias or len(logits.allowed) > 1)):
        return None
    views = (*logits.views, shape_of(node))
    return replace(logits, product=found, scale=logits.scale * found.scale, views=views)


_Update = Callable[[Logits], "Logits | None"]
_Step = tuple[fx.Node, _Update]


def _step(node: fx.Node) -> _Step | None:
    """(the logits that `node` works on, what `node` adds to the description); None for anything unknown."""
    source = argument(node, 0, "input")
    if (casts_floats(node) or node in SAME) and isinstance(source, fx.Node):
        return source, lambda logits: logits
    if node in RESHAPE and isinstance(source, fx.Node):
        return _reshaping(node, source)
    if node in MUL or node in DIV:
        return _scaling(node)
    if node in ADD or node in SUB:
        return _multiplied_mask(node) or _addition(node)
    if node in MAXIMUM or node in CLAMP:
        return _flooring(node)
    if node in MASKED_FILL:
        mask, value = argument(node, 1, "mask"), number(argument(node, 2, "value"))
        return _hiding(node, source, mask, value, hidden_where=True)
    if node in WHERE and len(node.args) == 3:
        condition, kept, other = node.args
        if number(other) is not None:
            return _hiding(node, kept, condition, number(other), hidden_where=False)
        return _hiding(node, other, condition, number(kept), hidden_where=True)
    return None


def _reshaping(node: fx.Node, source: fx.Node) -> _Step | None:
    before, after = example_tensor(source), example_tensor(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    known = all(isinstance(size, int) for size in (*before.shape, *after.shape))
    if not known and before.shape[-2:] != after.shape[-2:]:
        return None
    view = tuple(before.shape)
    return (
        source,
        lambda logits: None if logits.factor is not None else replace(logits, views=(*logits.views, view)),
    )


def _scaling(node: fx.Node) -> _Step | None:
    first, second = operands(node)
    if node.kwargs.get("rounding_mode") is not None:
        return None
    constant = number(second)
    if constant is None and node in MUL:
        if number(first) is not None:
            first, second, constant = second, first, number(first)
        elif isinstance(second, fx.Node) and _holds_product(second):
            first, second = second, first
    if not isinstance(first, fx.Node):
        return None
    if constant is None:
        return _row_factor(node, first, second)
    if constant == 0 and node in DIV:
        return None
    factor = 1 / constant if node in DIV else constant
    return first, lambda logits: replace(logits, scale=logits.scale * factor)


def _row_factor(node: fx.Node, first: fx.Node, second: Any) -> _Step | None:
    """Logits times a tensor that is the same for all keys, such as a learned temperature of each head: it can as
    well multiply the queries."""
    tensor = example_tensor(second) if isinstance(second, fx.Node) else None
    if tensor is None or not tensor.is_floating_point() or shape_of(first) != shape_of(node):
        return None
    if tensor.dim() > 0 and not (isinstance(tensor.shape[-1], int) and tensor.shape[-1] == 1):
        return None
    factor: Value = Expr.of("reciprocal", second) if node in DIV else second

    def update(logits: Logits) -> Logits:
        both = factor if logits.factor is None else Expr.of("mul", logits.factor, factor)
        return replace(logits, factor=both)

    return first, update


def _addition(node: fx.Node) -> _Step | None:
    first, second = operands(node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(first, fx.Node) and _own_maximum(node) is not None:
        return first, lambda logits: logits
    if node in ADD and number(first) is not None:
        first, second = second, first
    shift = number(second)
    if isinstance(first, fx.Node) and shift is not None:  # the same for all keys
        return (first, lambda logits: logits) if abs(shift) <= SHIFT else None
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    holds = [_holds_product(item) for item in (first, second)]
    if not any(holds):  # an einsum with relative positions looks like one with a single key head
        holds = [_holds_product(item, one_head=True) for item in (first, second)]
    if holds[0] == holds[1] or (node in SUB and holds[1]):
        return None
    source, term = (first, second) if holds[0] else (second, first)
    if example_tensor(term) is None:
        return None
    added: Value = Expr.of("neg", term) if node in SUB else term
    return source, lambda logits: logits.plus(added, node)


def _holds_product(node: fx.Node, one_head: bool = False) -> bool:
    """Whether `node` is a product, or a chain of one-reader steps from one. Terms that are products themselves, like
    relative positions computed from the queries, make a sum ambiguous, and the call is left alone."""
    current: Any = node
    for _ in range(16):
        if product(current) is not None or (one_head and of_one_head(current, scores=True) is not None):
            return True
        if not isinstance(current, fx.Node):
            return False
        if current in ADD or current in SUB:
            return any(isinstance(arg, fx.Node) and _holds_product(arg, one_head) for arg in current.args)
        if current in WHERE:
            return any(isinstance(arg, fx.Node) and _holds_product(arg, one_head) for arg in current.args[1:])
        kinds = (CAST, SAME, RESHAPE, MUL, DIV, MASKED_FILL, MAXIMUM, CLAMP)
        is_view = current.op == "call_method" and current.target in ("transpose", "permute")
        if not (is_view or any(current in kind for kind in kinds)):
            return False
        current = next((arg for arg in current.args if isinstance(arg, fx.Node)), None)
    return False


def _flooring(node: fx.Node) -> _Step | None:
    """max(logits, the lowest number): -inf becomes finite, nothing else changes."""
    source = argument(node, 0, "input")
    lowest = number(argument(node, 1, "min" if node in CLAMP else "other"))
    has_ceiling = node in CLAMP and argument(node, 2, "max") is not None
    if not isinstance(source, fx.Node) or lowest is None or lowest > HIDES or has_ceiling:
        return None
    return source, lambda logits: replace(logits, floored=True)


def _hiding(node: fx.Node, source: Any, mask: Any, value: float | None, hidden_where: bool) -> _Step | None:
    """Logits overwritten by `value` where `mask` is `hidden_where`."""
    mask = unexpanded(mask)
    tensor = example_tensor(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(source, fx.Node) or tensor is None or tensor.dtype != torch.bool:
        return None
    return _overwriting(node, source, mask if hidden_where else negated(mask), value)


def _overwriting(node: fx.Node, source: fx.Node, hidden: Value, value: float | None) -> _Step | None:
    if value is None or value > HIDES or shape_of(source) != shape_of(node):
        return None
    return source, lambda logits: logits.hiding(hidden, value, node)


def _multiplied_mask(node: fx.Node) -> _Step | None:
    """`logits * mask + lowest * (1 - mask)`, mask made of bools: logits overwritten where it is 0."""
    left, right = operands(node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    for kept, other in ((left, right), (right, left)):
        lowest = _times_inverse(other)
        if kept not in MUL or lowest is None or (node in SUB and kept is right):
            continue
        mask, value = lowest
        source = next((arg for arg in operands(kept) if arg is not mask), None)
        if mask in operands(kept) and isinstance(source, fx.Node) and only_reader(kept, node):
            if not _made_of_bools(mask):
                return None
            hidden = negated(Expr.of("to", mask, torch.bool))
            return _overwriting(node, source, hidden, -value if node in SUB else value)
    return None


def _times_inverse(node: Any) -> tuple[fx.Node, float] | None:
    """(mask, value) where `node` is `value * (1 - mask)`."""
    if node not in MUL:
        return None
    for inverse, value in (operands(node), operands(node)[::-1]):
        if not isinstance(inverse, fx.Node) or number(value) is None:
            continue
        first, second = operands(inverse)
        if inverse.target in ("rsub", torch.rsub, torch.ops.aten.rsub.Scalar):
            first, second = second, first
        elif inverse not in SUB:
            continue
        if first == 1 and isinstance(second, fx.Node) and inverse.kwargs.get("alpha", 1) == 1:
            return second, float(number(value) or 0.0)
    return None


def _made_of_bools(mask: fx.Node) -> bool:
    """Whether `mask` holds but 0 and 1, being a view or cast of a bool tensor."""
    current: Any = mask
    while isinstance(current, fx.Node):
        tensor = example_tensor(current)
        if tensor is not None and tensor.dtype == torch.bool:
            return True
        name = current.target if current.op == "call_method" else getattr(current.target, "__name__", "")
        if str(name).partition(".")[0] not in VIEWS and current not in CAST:
            return False
        current = argument(current, 0, "input")
    return False
