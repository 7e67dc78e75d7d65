"""Attention written out by hand that no pattern recognises: found for a report, with what stands in the way.

The search goes backwards from a product: `softmax(tanh(q @ k.mT)) @ v` is one whose left operand comes from a softmax, which
in turn comes from another product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from sage_inductor.graph.call import example_tensor, node_name
from sage_inductor.graph.origin import source_code, source_line
from sage_inductor.graph.places import Places
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.surroundings import Surroundings, enter
from sage_inductor.graph.writes import Writes, submodule_of
from sage_inductor.patterns import ALL
from sage_inductor.patterns.logits import is_known_step, logits_of
from sage_inductor.patterns.nodes import ADD, SUB, only_reader
from sage_inductor.patterns.products import WeightedSum, is_product, weighted_sums
from sage_inductor.patterns.softmax import Softmax, softmax
from sage_inductor.patterns.softmax_matmul import weights_of
from sage_inductor.report.site import Unread

# Nodes looked at from a product back to a softmax, and from there to another product.
_NEAR = 32


def unread(graph: fx.Graph) -> tuple[Unread, ...]:
    """What looks like attention in `graph`, and in the graphs of its submodules, and is in no form that is known.

    It is a product whose left operand comes from a softmax, which in turn comes from another product:
    `softmax(q @ k.mT) @ v` with something unknown in between, such as a tanh on the scores. Every value on the way has as
    many elements as the scores. `graph` has been rewritten before, so that what is known is gone. Nothing is looked for
    inside functorch transforms.
    """
    return tuple(_by_logits(graph, Places(), Surroundings.ambient()).values())


def _by_logits(graph: fx.Graph, places: Places, around: Surroundings) -> dict[fx.Node, Unread]:
    """The same by the input of the softmax, because a subgraph may be referred to twice."""
    found: dict[fx.Node, Unread] = {}
    writes = Writes(graph)
    for node in graph.nodes:
        around = enter(node, around)
        submodule = submodule_of(node)
        if submodule is not None:
            found |= _by_logits(submodule.graph, places, around)
        elif not around.transforms and (seen := _seen(node, writes)) is not None:
            # Of products one behind the other, as where heads are mixed, the last is that with the values.
            behind, obstacle = seen
            found[behind.logits] = Unread(
                places.of(node)[0].path, source_line(node), obstacle, source_code(node)
            )
    return found


def _seen(node: fx.Node, writes: Writes) -> tuple[Softmax, str] | None:
    """The softmax that the weights of `node` come from, and what stands in the way; None where `node` is no product of
    weights and values, or is recognised."""
    for outer in weighted_sums(node):
        found = _behind(outer.weights, softmax)
        if found is None or _behind(found.logits, _product) is None:
            continue
        call = next(filter(None, (pattern.match(node) for pattern in ALL)), None)
        if call is None:
            return found, _what_stands_between(node, outer, found)
        # A site, unless its operands are not what they were any more.
        return (found, "operands=written to in place meanwhile") if writes.overwrite(call) else None
    return None


def _product(node: fx.Node) -> fx.Node | None:
    return node if is_product(node, broadcast=True) else None


def _behind(start: fx.Node, wanted: Callable[[fx.Node], Any]) -> Any:
    """The first answer that `wanted` gives, other than None, for `start` and the nodes it comes from, nearest first. Only
    values of the size of `start` are followed."""
    size, seen, queue = _size(start), {start}, [start]
    while queue and size is not None and len(seen) <= _NEAR:
        current = queue.pop(0)
        found = wanted(current)
        if found is not None:
            return found
        before = [item for item in current.all_input_nodes if item not in seen and _size(item) == size]
        seen.update(before)
        queue += before
    return None


def _size(node: fx.Node) -> Any:
    """The number of elements of floating-point values, an expression where sizes are symbolic; None of anything else."""
    tensor = example_tensor(node)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return math.prod(sizes_of(tensor))


def _what_stands_between(node: fx.Node, outer: WeightedSum, behind: Softmax) -> str:
    trail: list[fx.Node] = []
    weights = weights_of(outer, node, trail)
    if weights is None:
        last = trail[-1]
        if (others := _other_readers(last, trail, node)) is not None:
            return f"weights={others}"
        if softmax(last) is not None:
            return "softmax=over another dim than the keys"
        return f"weights={node_name(last)} between softmax and product (known: dropout, zeros, casts, views)"
    trail = []
    if logits_of(weights.softmax, weights.order, weights.zeroed, weights.sink_at, trail) is None:
        last = trail[-1] if trail else weights.softmax.logits  # a sink that is not understood comes first
        if (others := _other_readers(last, trail, *weights.softmax.readers)) is not None:
            return f"scores={others}"
        if weights.zeroed is not None and logits_of(weights.softmax, weights.order, None, weights.sink_at):
            return "weights=zeros at a mask that does not hide the scores alone (known: one mask for both)"
        if _product(last) is not None:
            return f"scores={node_name(last)} in front of the softmax (known: queries times keys)"
        name = node_name(_unknown_term(last))
        return f"scores={name} between product and softmax (known: factors, terms, masks, casts, views)"
    return "shapes=not those of query, key and value"


def _unknown_term(node: fx.Node) -> fx.Node:
    """Where `node` is a sum: the one node in it that hides the product of queries and keys. Else `node` itself."""
    if node not in ADD and node not in SUB:
        return node

    def opaque(item: fx.Node) -> fx.Node | None:
        return None if item is node or is_known_step(item) else item

    found = _behind(node, opaque)
    return node if found is None or _product(found) is not None else found


def _other_readers(last: fx.Node, trail: list[fx.Node], *first: fx.Node) -> str | None:
    """`read by mean, too` where nodes beside the known ones read the last node of `trail`; None where none do. The known
    readers are the nodes of `trail`, and `first` for a trail of one node."""
    readers = first if len(trail) == 1 else tuple(user for user in last.users if user in trail)
    if only_reader(last, *readers):
        return None
    names = sorted({node_name(user) for user in last.users if user not in readers})
    return f"read by {', '.join(names)}, too"
