"""Bands whose bounds are numbers that the graph computes: `window = x.shape[1] // 2`, or an int that changes from call to call.

The operator takes such a number as it takes any. It has to be there as a node: one that differs by a constant will do.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_value
from sage_inductor.graph.sizes import Size, known, size_hint
from sage_inductor.rewriting.masks.formula import plain
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.masks.ranges import Ranges


def computed_band(
    low: Size | None, high: Size | None, offset: Size, call: AttentionCall, ranges: Ranges
) -> Mask | None:
    """Keys i + low .. i + high, of which one bound is symbolic, as a window around the diagonal of either corner; `offset` is that of
    the bottom-right one. None where a bound is not to be had, or may be negative and would be no bound then."""
    if isinstance(call.query, fx.Node) and "val" in call.query.meta:
        return None  # an exported program
    for at in (offset, 0) if high == offset else (0, offset):
        left, right = (
            _Window.of(None if bound is None else plain(sign * (bound - at)), call)
            for bound, sign in ((low, -1), (high, 1))
        )
        if left is None or right is None or right.may_be_negative(ranges):
            continue
        is_causal = right.size == 0 and right.computed is None
        if left.computed is None and left.may_be_negative(ranges):
            continue
        if not is_causal and left.may_be_negative(ranges):
            continue
        kind = "band" if not is_causal else "causal" if low is None else "sliding_window"
        return Mask(
            kind, None, is_causal, at != 0, left.size, -1 if is_causal else right.size,
            left_bound=left.computed, right_bound=right.computed,
        )  # fmt: skip
    return None


class _Window:
    """`size`: what it was while tracing, -1 for no bound. `computed`: where the graph has it, None where it is a constant."""

    def __init__(self, size: int, computed: Value | None = None, symbolic: Size = 0) -> None:
        self.size, self.computed, self.symbolic = size, computed, symbolic

    @classmethod
    def of(cls, distance: Size | None, call: AttentionCall) -> _Window | None:
        if distance is None:
            return cls(-1)
        if isinstance(distance, int):
            return cls(distance, symbolic=distance) if distance >= 0 else None
        return _found(distance, call)

    def may_be_negative(self, ranges: Ranges) -> bool:
        if self.computed is None:
            return False
        least = ranges.of_size(self.symbolic)[0]
        return least is None or least < 0


def _found(distance: Size, call: AttentionCall) -> _Window | None:
    """`distance`, made of a number that the graph computes before `call`."""
    node: fx.Node
    for node in call.node.graph.nodes:
        if node is call.node:
            return None
        value: Any = example_value(node)
        if not isinstance(value, torch.SymInt):
            continue
        for sign in (1, -1):
            rest = plain(distance - sign * known(value))
            hint = size_hint(value)
            if isinstance(rest, int) and hint is not None:
                size = max(sign * hint + rest, 0)  # a kernel is chosen for a window
                return _Window(size, _number(node, value, sign, rest), distance)
    return None


def _number(node: fx.Node, value: Any, sign: int, rest: int) -> Value:
    if sign < 0:
        return Expr(operator.sub, (rest, node), value=rest - value)
    return node if rest == 0 else Expr(operator.add, (node, rest), value=value + rest)
