"""Rows over keys, `[batch, heads, 1, keys]`, written as expressions of the graph's values: what a kernel reads in a mask's
place."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import fx

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, tracing
from sage_inductor.graph.sizes import Size, known, sizes_of
from sage_inductor.rewriting.masks.formula import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    AllOf,
    AnyOf,
    AtLeastZero,
    Condition,
    Data,
    Holds,
    IsZero,
    Linear,
    NotUnderstood,
    Quantity,
    Quotient,
    constant_of,
    plain,
)
from sage_inductor.rewriting.masks.reading import Reader
from sage_inductor.rewriting.masks.views import Index

DIMS = (BATCH, HEAD, QUERY, KEY)


@dataclass
class RowBuilder:
    """Writes conditions that do not depend on the query as bool rows that broadcast to the scores of `call`."""

    call: AttentionCall
    reader: Reader
    asked: bool = False
    """Whether the call's own key was asked for its length."""

    def of(self, condition: Condition) -> Value:
        """Raises NotUnderstood where that takes more than views and comparisons of what is read."""
        origin = self.reader.origins.get(condition)
        if origin is not None:
            try:
                return self._laid_out(*origin)
            except NotUnderstood:
                pass
        if isinstance(condition, Holds):
            row = self._laid_out(condition.data.node, condition.data.index)
            return Expr.of(torch.logical_not, row) if condition.negated else row
        if isinstance(condition, AtLeastZero):
            return Expr.of("ge", self._number(condition.number), 0)
        if isinstance(condition, IsZero):
            return Expr.of("ne" if condition.negated else "eq", self._number(condition.number), 0)
        assert isinstance(condition, (AllOf, AnyOf))
        parts = [self.of(part) for part in sorted(condition.parts, key=repr)]
        if not parts:
            raise NotUnderstood("a constant")
        join = torch.logical_and if isinstance(condition, AllOf) else torch.logical_or
        return functools.reduce(lambda left, right: Expr.of(join, left, right), parts)

    def read(self, data: Data) -> Value:
        """What is read, as a row. Raises NotUnderstood."""
        return self._laid_out(data.node, data.index)

    def _number(self, number: Linear) -> Value:
        if not isinstance(number.constant, int) or not number.terms:
            raise NotUnderstood("a symbolic number")
        total: Value | None = None
        for term, count in number.terms:
            value = self._term(term)
            value = value if count == 1 else Expr.of("mul", value, count)
            total = value if total is None else Expr.of("add", total, value)
        assert total is not None
        return total if number.constant == 0 else Expr.of("add", total, number.constant)

    def _term(self, term: Quantity) -> Value:
        if isinstance(term, Data):
            row = self._laid_out(term.node, term.index)
            tensor = example_tensor(row)
            return (
                row if tensor is not None and tensor.dtype == torch.int64 else Expr.of("to", row, torch.int64)
            )
        if isinstance(term, Quotient):
            return Expr.of(torch.floor_divide, self._number(term.number), term.divisor)
        if term != KEY:
            raise NotUnderstood(f"the {term} in a row")
        return self._positions()

    def _positions(self) -> Expr:
        """The places of the keys, `[keys]`."""
        key = example_tensor(self.call.key)
        assert key is not None
        length = self._kv_len()
        with tracing(key):
            value = torch.arange(key.shape[-2], device=key.device)
        return Expr(torch.arange, (length,), {"device": key.device}, value)

    def _kv_len(self) -> int | Expr:
        key = example_tensor(self.call.key)
        assert key is not None
        self.asked = True
        if isinstance(known(key.shape[-2]), int):
            return int(key.shape[-2])
        if isinstance(self.call.key, fx.Node) and "val" in self.call.key.meta:
            raise NotUnderstood("a symbolic length in an exported program")
        return Expr.of("size", self.call.key, -2)

    def _laid_out(self, node: fx.Node, index: Index) -> Value:
        """`node`, at `index`, with the dims of the scores: those that it lacks are 1."""
        query, tensor = example_tensor(self.call.query), example_tensor(node)
        assert query is not None and tensor is not None
        dims = DIMS[-query.dim() :] if query.dim() <= 4 else DIMS
        names = [self._dim(at, length) for at, length in zip(index, sizes_of(tensor), strict=True)]
        kept = [name for name in names if isinstance(name, str)]
        if len(set(kept)) != len(kept) or not set(kept) <= set(dims) or QUERY in kept:
            raise NotUnderstood("the dims of a row")
        wanted = dims if not kept else dims[min(map(dims.index, kept)) :]
        if _lies_so(names, sizes_of(tensor), wanted) and self.reader.ranges.sizes[KEY] in (
            sizes_of(tensor)[-1],
            1,
        ):
            return node
        found: Value = node
        lengths = sizes_of(tensor)
        at = names.index(KEY) if KEY in names else None
        if at is not None and lengths[at] != self.reader.ranges.sizes[KEY]:
            # There may be more than there are keys. Where there may be fewer, as in front of what was padded, the rest is none.
            more = self.reader.ranges.of_size(plain(lengths[at] - self.reader.ranges.sizes[KEY]))[0]
            if more is None or more < 0:
                raise NotUnderstood("a row of fewer keys")
            found = Expr.of("narrow", found, at, 0, self._kv_len())
        if len(kept) != len(names):
            chosen = tuple(slice(None) if isinstance(name, str) else name for name in names)
            found = Expr.of(operator.getitem, found, chosen)
        order = sorted(range(len(kept)), key=lambda place: dims.index(kept[place]))
        if order != list(range(len(kept))):
            found = Expr.of("permute", found, *order)
        return Expr.of(
            operator.getitem, found, tuple(slice(None) if name in kept else None for name in wanted)
        )

    def _dim(self, at: object, length: Size) -> str | int:
        """Which index a dim of what is read goes by, or the place in it that is read."""
        constant = constant_of(at)  # type: ignore[arg-type]
        if isinstance(constant, int) and constant >= 0:
            return constant
        if isinstance(at, Linear) and len(at.terms) == 1 and at.constant == 0:
            (name, count) = at.terms[0]
            same = name == KEY or (isinstance(name, str) and self.reader.ranges.sizes.get(name) == length)
            if isinstance(name, str) and count == 1 and same:
                return name
        raise NotUnderstood("the place that a row is read from")


def _lies_so(names: list[str | int], sizes: tuple[Size, ...], wanted: tuple[str, ...]) -> bool:
    """Whether dims that go by `names` stand where `wanted` has them, with dims of 1 for those that are missing."""
    if len(names) < len(wanted) or len(names) > len(DIMS):
        return False
    expected = DIMS[-len(names) :]
    return all(
        name == place or (name == 0 and length == 1)
        for name, length, place in zip(names, sizes, expected, strict=True)
    )
