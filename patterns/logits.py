"""What stands between the product of queries and keys and the softmax: factors, terms and masks, in any order and view.

`logits_of` walks from the softmax backwards. `(q @ k.mT / 8 + bias).masked_fill(pad, -inf)` is read as: keys hidden at pad,
then a term, then a scale of 1/8, then the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.patterns.axes import Order, arranged, as_they_stand, ordered, permutation, viewed
from sage_inductor.patterns.hiding import HIDES, hiding, negated
from sage_inductor.patterns.nodes import (
    ADD,
    CAST,
    CLAMP,
    DIV,
    MASKED_FILL,
    MAXIMUM,
    MUL,
    RESHAPE,
    SUB,
    WHERE,
    argument,
    casts_floats,
    is_the_same,
    only_reader,
    operands,
    shape_of,
)
from sage_inductor.patterns.numbers import filled_with, held, is_symbol, number
from sage_inductor.patterns.products import Scores, Symbols, is_product, scores
from sage_inductor.patterns.sinks import without_sink
from sage_inductor.patterns.softmax import Softmax, own_maximum
from sage_inductor.patterns.terms import LOWEST, Term, floor_of, tells_keys_apart
from sage_inductor.patterns.zeros import same_mask

# A number up to this size may be added to all logits of a row: the softmax does not see it, and rounding leaves the scores.
SHIFT = 1e3


@dataclass(frozen=True)
class Logits:
    """`scale * symbols * factor * query @ key^T`, plus terms, with keys hidden; `factor` is a tensor of one number a row."""

    order: Order
    """Which dims of the node at hand are `[*batch, queries, keys]`; all else here is in that order."""
    product: Scores | None = None
    scale: float = 1.0
    factor: Value | None = None
    symbols: Symbols = ()
    """Floats of modules that are compiled for dynamic shapes, and the like."""
    terms: tuple[Term, ...] = ()
    """What is added to logits, and what finite numbers overwrite; what is done last comes first."""
    allowed: tuple[Term, ...] = ()
    views: tuple[tuple[Any, ...], ...] = ()  # the shapes that the logits take on the way
    floor: float | None = None  # what is less, -inf too, becomes that number later on
    # Where the weights are set to zero, until it is seen to be where keys are hidden.
    zeroed: Value | None = None
    zeroed_alone: bool = False  # finite numbers hid those keys, and must not compete with others
    sink: Value | None = None  # what softmax sees beside the keys

    def plus(self, term: Value, node: fx.Node) -> Logits:
        """With `term` added by `node`, which comes before all that is known so far: later factors apply to it, too."""
        added = self._term(arranged(term, self.order), node)
        if self.scale != 1.0:
            added = replace(added, value=Expr.of("mul", added.promoted(), self.scale))
        for method, symbol in self.symbols:
            added = replace(added, value=Expr.of(method, added.promoted(), symbol))
        if self.factor is not None:
            added = replace(added, value=Expr.of("mul", added.promoted(), self.factor))
        if self.floor is not None:
            added = replace(added, value=Expr.of("clamp", added.value, min=floor_of(self.floor)))
        return replace(self, terms=(*self.terms, added))

    def hiding(self, hidden: Value, value: float, node: fx.Node) -> Logits | None:
        """With the logits overwritten by `value` at `hidden`, as `node` does. None where that cannot be told in masks."""
        if value * self.scale > HIDES or self.factor is not None or self.symbols:
            return None
        logits = example_tensor(node)
        assert logits is not None
        final = held(value, logits.dtype) * self.scale  # what later factors make of it
        final = final if final >= LOWEST else -math.inf
        hides_for_good = final == -math.inf and self.floor is None
        covered = [term for term in self.terms if term.number is not None]
        remaining = negated(arranged(hidden, self.order))
        if final == -math.inf:
            for later in covered:  # where no key is left to a query, those make the difference
                if later.logits != ordered(shape_of(node), self.order):
                    return None
                remaining = Expr.of(torch.logical_or, remaining, later.value)
        allowed = self._term(remaining, node)
        if same_mask(hidden, self.zeroed):  # no weight is left there, even where all keys are hidden
            return replace(
                self, allowed=(*self.allowed, allowed), zeroed=None, zeroed_alone=not hides_for_good
            )
        if hides_for_good:
            return replace(self, allowed=(*self.allowed, allowed))
        written = max(final, -math.inf if self.floor is None else self.floor)
        overwritten = replace(self._term(arranged(hidden, self.order), node), number=written)
        if len(covered) < len(self.terms) and tells_keys_apart(written, overwritten.dtype):
            return None
        return replace(self, terms=(*self.terms, overwritten))

    def before(self, source: fx.Node) -> Logits | None:
        """The same at `source`, the input of the node at hand, which has fewer dims where it was broadcast. None where the order
        of its dims is not known then."""
        rank = len(shape_of(source))
        if rank == len(self.order):
            return self
        whole = self.order == as_they_stand(len(self.order))
        return replace(self, order=as_they_stand(rank)) if whole else None

    def _term(self, value: Value, node: fx.Node) -> Term:
        logits = example_tensor(node)
        assert logits is not None
        return Term(value, ordered(tuple(logits.shape), self.order), logits.dtype)


def logits_of(
    found: Softmax,
    order: Order,
    zeroed: Value | None = None,
    sink_at: int | None = None,
    trail: list[fx.Node] | None = None,
) -> Logits | None:
    """What lies between the softmax `found` and the product of queries and keys; None at anything unknown.

    `order`: the dims of the logits as `[*batch, queries, keys]`. `zeroed`: a mask where the weights are set to zero after
    the softmax. `sink_at`: the column of a sink, 0 or -1. The nodes on the way are appended to `trail`; where the result
    is None, its last node is the unknown one.
    """
    readers, node, sink = found.readers, found.logits, None
    if sink_at is not None:
        beside = without_sink(found, order, sink_at)
        if beside is None:
            return None
        node, readers, sink = beside
    views = (ordered(shape_of(node), order),)
    logits: Logits | None = Logits(order, views=views, zeroed=zeroed, sink=sink)
    while logits is not None:
        if trail is not None:
            trail.append(node)
        if not only_reader(node, *readers):
            return None
        if is_product(node, broadcast=True):
            return _complete(logits, node)
        step = _step(node, logits.order)
        if step is None:
            return None
        source, update = step
        readers, logits = step_readers(node, source, logits.order), update(logits)
        node, logits = source, None if logits is None else logits.before(source)
    return None


def step_readers(node: fx.Node, source: fx.Node, order: Order) -> tuple[fx.Node, ...]:
    """The nodes by which `node` reads `source`.

    As a rule `node` itself. For `source - source.amax(-1)` the maximum, too. For `logits * mask + lowest * (1 - mask)`,
    which is one step, the multiplication.
    """
    if source not in node.all_input_nodes:
        return (next(arg for arg in node.all_input_nodes if source in arg.all_input_nodes),)
    subtracted = own_maximum(node, order[-1])
    return (node,) if subtracted is None else (node, subtracted)


def _complete(logits: Logits, node: fx.Node) -> Logits | None:
    found = scores(node, logits.order)
    shape = ordered(shape_of(node), logits.order)
    if found is None or shape[-2:] != logits.views[0][-2:]:
        return None
    if found.bias is not None and not _new_zeros(found.bias, node):
        logits = logits.plus(found.bias, node)
    if logits.zeroed is not None or (logits.zeroed_alone and (logits.terms or len(logits.allowed) > 1)):
        return None
    return replace(
        logits,
        product=found,
        scale=logits.scale * found.scale,
        symbols=(*logits.symbols, *found.symbols),
        views=(*logits.views, shape),
    )


def _new_zeros(bias: Value, node: fx.Node) -> bool:
    """Whether `bias` is zeros made for `node` alone, as `baddbmm` asks for where nothing is to be added. Nothing else can
    have written to it."""
    if not isinstance(bias, fx.Node) or not only_reader(bias, node):
        return False
    return filled_with(bias) == 0


_Update = Callable[[Logits], "Logits | None"]
_Step = tuple[fx.Node, _Update]


def _step(node: fx.Node, order: Order) -> _Step | None:
    """The logits that `node` works on, and what it adds to the description of them; None for anything unknown. `order`:
    the dims of `node`."""
    source = argument(node, 0, "input")
    if (casts_floats(node) or is_the_same(node)) and isinstance(source, fx.Node):
        return source, lambda logits: logits
    if node in RESHAPE and isinstance(source, fx.Node):
        return _reshaping(node, source, order)
    moved = permutation(node)
    if moved is not None:
        return _moving(*moved)
    if node in MUL or node in DIV:
        return _scaling(node, order)
    hidden = hiding(node)
    if hidden is not None:
        value = hidden.value
        return hidden.source, lambda logits: logits.hiding(hidden.hidden, value, node)
    if node in ADD or node in SUB:
        return _addition(node, order)
    return _flooring(node) if node in MAXIMUM or node in CLAMP else None


def _moving(source: fx.Node, moved: Order) -> _Step:
    """Logits whose dims are moved. (A mask by which weights are set to zero is read in the order there.)"""

    def update(logits: Logits) -> Logits | None:
        if logits.zeroed is not None:
            return None
        return replace(logits, order=tuple(moved[dim] for dim in logits.order))

    return source, update


def _reshaping(node: fx.Node, source: fx.Node, order: Order) -> _Step | None:
    before, after = example_tensor(source), example_tensor(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    sizes, sizes_before = sizes_of(after), sizes_of(before)
    known = all(isinstance(size, int) for size in (*sizes_before, *sizes))
    if not known and sizes_before[-2:] != sizes[-2:]:
        return None
    known_as = viewed(order, sizes, sizes_before)
    if known_as is None:
        return None
    view = ordered(sizes_before, known_as)

    def update(logits: Logits) -> Logits | None:
        if logits.factor is not None or (logits.zeroed is not None and order != known_as):
            return None
        return replace(logits, order=known_as, views=(*logits.views, view))

    return source, update


def _scaling(node: fx.Node, order: Order) -> _Step | None:
    first, second = operands(node)
    if node.kwargs.get("rounding_mode") is not None:
        return None
    constant = number(second)
    if constant is None and node in MUL:
        if number(first) is not None:
            first, second, constant = second, first, number(first)
        elif isinstance(second, fx.Node) and _holds_product(second):
            first, second = second, first
    if node in MUL and is_symbol(first):
        first, second = second, first
    if not isinstance(first, fx.Node):
        return None
    if is_symbol(second):
        symbol = ("div" if node in DIV else "mul", second)
        return first, lambda logits: replace(logits, symbols=(*logits.symbols, symbol))
    if constant is None:
        return _row_factor(node, first, second, order)
    if constant == 0 and node in DIV:
        return None
    factor = 1 / constant if node in DIV else constant
    return first, lambda logits: replace(logits, scale=logits.scale * factor)


def _row_factor(node: fx.Node, first: fx.Node, second: Any, order: Order) -> _Step | None:
    """Logits times a tensor that is the same for all keys, such as a learned temperature of each head. The queries are
    multiplied by it instead."""
    tensor = example_tensor(second) if isinstance(second, fx.Node) else None
    if tensor is None or not tensor.is_floating_point() or shape_of(first) != shape_of(node):
        return None
    along_keys = order[-1] - len(order)
    if tensor.dim() >= -along_keys and sizes_of(tensor)[along_keys] != 1:
        return None
    factor = arranged(Expr.of("reciprocal", second) if node in DIV else second, order)

    def update(logits: Logits) -> Logits:
        both = factor if logits.factor is None else Expr.of("mul", logits.factor, factor)
        return replace(logits, factor=both)

    return first, update


def _addition(node: fx.Node, order: Order) -> _Step | None:
    first, second = operands(node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(first, fx.Node) and own_maximum(node, order[-1]) is not None:
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
        holds = [_holds_product(item, broadcast=True) for item in (first, second)]
    # A product that is the same for all heads or the whole batch is a mask: padding of queries times that of keys.
    if all(holds):
        holds = [shape_of(item) == shape_of(node) for item in (first, second)]
    if holds[0] == holds[1] or (node in SUB and holds[1]):
        return None
    source, term = (first, second) if holds[0] else (second, first)
    if example_tensor(term) is None:
        return None
    added: Value = Expr.of("neg", term) if node in SUB else term
    return source, lambda logits: logits.plus(added, node)


def _holds_product(node: fx.Node, broadcast: bool = False) -> bool:
    """Whether `node` is a product, or known steps lead to it from one.

    In `q @ k.mT + q @ positions.mT` both terms do. Which of them are the scores is ambiguous, and the call is left alone.
    """
    current: Any = node
    for _ in range(16):
        if is_product(current, broadcast):
            return True
        if not isinstance(current, fx.Node):
            return False
        if current in ADD or current in SUB:
            return any(isinstance(arg, fx.Node) and _holds_product(arg, broadcast) for arg in current.args)
        if current in WHERE:
            return any(
                isinstance(arg, fx.Node) and _holds_product(arg, broadcast) for arg in current.args[1:]
            )
        if not is_known_step(current):
            return False
        nodes = (arg for arg in current.args if isinstance(arg, fx.Node))
        current = next((arg for arg in nodes if not is_symbol(arg)), None)
    return False


def is_known_step(node: fx.Node) -> bool:
    """Whether `node` is of a kind that may stand between product and softmax."""
    if node.op == "call_method" and node.target in ("transpose", "permute"):
        return True
    kinds = (ADD, SUB, WHERE, CAST, RESHAPE, MUL, DIV, MASKED_FILL, MAXIMUM, CLAMP)
    return any(node in kind for kind in kinds) or is_the_same(node)


def _flooring(node: fx.Node) -> _Step | None:
    """`max(logits, lowest)`: -inf becomes the lowest number, and nothing else changes."""
    source = argument(node, 0, "input")
    lowest = number(argument(node, 1, "min" if node in CLAMP else "other"))
    has_ceiling = node in CLAMP and argument(node, 2, "max") is not None
    if not isinstance(source, fx.Node) or lowest is None or has_ceiling:
        return None
    least = lowest

    def update(logits: Logits) -> Logits | None:
        floor = max(least * logits.scale, LOWEST)
        if floor > HIDES or logits.factor is not None or logits.symbols:
            return None
        return replace(logits, floor=floor if logits.floor is None else max(floor, logits.floor))

    return source, update
