"""Masks that are known while compiling, worked out a block of rows at a time: of each row its first key, its last and how many.

A band, or causality within chunks, shows in these three numbers. No more than a block of the mask is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.constants import constant_value, evaluation_device, scores_limit
from sage_inductor.rewriting.masks.formula import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    AllOf,
    AnyOf,
    AtLeastZero,
    Condition,
    Conditional,
    Data,
    Extreme,
    Holds,
    IsZero,
    Linear,
    Quotient,
    Real,
    Scalar,
    data_of,
    names_of,
)
from sage_inductor.torch_internals.dispatch import outside_fake_tensors

SCORES_AT_ONCE = 2**20  # a few intermediates of 8 bytes for each: some tens of MB


@dataclass(frozen=True)
class RowEnds:
    """Of each query: the first and the last key that it sees (-1 and -1 where it sees none), and how many it sees."""

    first: Tensor
    last: Tensor
    count: Tensor

    def band(self, kv_len: int) -> tuple[int | None, int | None] | None:
        """(low, high): every query i sees the keys i + low .. i + high, and no others; None for the bound that cuts nothing off.
        None where the mask is no band, or no query sees a key."""
        positions = torch.arange(len(self.first), device=self.first.device)
        seeing = self.count > 0
        if not bool(seeing.any()):
            return None
        low = int((self.first - positions)[seeing].min())
        high = int((self.last - positions)[seeing].max())
        first = (positions + low).clamp(min=0)
        last = (positions + high).clamp(max=kv_len - 1)
        count = (last - first + 1).clamp(min=0)
        fits = torch.where(count > 0, (first == self.first) & (last == self.last), ~seeing)
        if not bool((fits & (count == self.count)).all()):
            return None
        return (low if low > 1 - len(positions) else None), (high if high < kv_len - 1 else None)

    def chunk(self, kv_len: int) -> int | None:
        """The size of the chunks within which the mask is causal, as in Llama 4's local layers. None where it is another."""
        if len(self.first) != kv_len or bool((self.count == 0).any()):
            return None
        size = int((self.first > 0).int().argmax())
        if size == 0:  # the first chunk has a query, and the last one ends
            return None
        positions = torch.arange(kv_len, device=self.first.device)
        first = positions // size * size
        causal = (self.first == first) & (self.last == positions) & (self.count == positions - first + 1)
        return size if bool(causal.all()) else None


def ends_of(rows: Callable[[int, int], Tensor], q_len: int, kv_len: int) -> RowEnds:
    """The ends of the rows of a mask. `rows(start, stop)` is bool `[stop - start, kv_len]`."""
    step = max(1, SCORES_AT_ONCE // max(1, kv_len))
    found = []
    for start in range(0, q_len, step):
        block = rows(start, min(start + step, q_len)).expand(-1, kv_len)
        count = block.sum(-1)
        first = block.int().argmax(-1)
        last = kv_len - 1 - block.flip(-1).int().argmax(-1)
        nothing = count == 0
        found.append((first.masked_fill(nothing, -1), last.masked_fill(nothing, -1), count))
    first, last, count = (torch.cat(parts) for parts in zip(*found, strict=True))
    return RowEnds(first, last, count)


def worked_out(
    condition: Condition, q_len: int, kv_len: int, device: torch.device, writes: Writes
) -> RowEnds | None:
    """The ends of the rows of the mask that `condition` is. None where it depends on more than constants, differs between
    batches or heads, or would take long."""
    if names_of(condition) & {BATCH, HEAD} or q_len * kv_len > scores_limit(device) or 0 in (q_len, kv_len):
        return None
    on = evaluation_device(device)
    values: dict[Data, Tensor] = {}
    for read in data_of(condition):
        value = constant_value(read.node, writes)
        if value is None:
            return None
        values[read] = value
    with outside_fake_tensors(), torch.no_grad():
        keys = torch.arange(kv_len, device=on)[None]

        def rows(start: int, stop: int) -> Tensor:
            queries = torch.arange(start, stop, device=on)[:, None]
            block = _Block({QUERY: queries, KEY: keys}, values).condition(condition)
            return torch.as_tensor(block, device=on).expand(stop - start, kv_len)

        try:
            return ends_of(rows, q_len, kv_len)
        except RuntimeError:  # memory ends
            return None


@dataclass(frozen=True)
class _Block:
    """The values of the indices in a block, and of what is read."""

    indices: dict[str, Tensor]
    values: dict[Data, Tensor]

    def condition(self, condition: Condition) -> Tensor | bool:
        if isinstance(condition, AtLeastZero):
            return self.number(condition.number) >= 0
        if isinstance(condition, IsZero):
            value = self.number(condition.number)
            return value != 0 if condition.negated else value == 0
        if isinstance(condition, Holds):
            held = self._read(condition.data)
            return ~held if condition.negated else held
        assert isinstance(condition, (AllOf, AnyOf))
        wanted = isinstance(condition, AllOf)
        result: Tensor | bool = wanted
        for part in condition.parts:
            found = self.condition(part)
            result = result & found if wanted else result | found
        return result

    def number(self, number: Scalar) -> Tensor:
        if isinstance(number, Linear):
            if not isinstance(number.constant, int):
                raise RuntimeError("a symbolic size")
            total = torch.tensor(number.constant, device=self.indices[KEY].device)
            for term, count in number.terms:
                if isinstance(term, str):
                    value = self.indices[term]
                elif isinstance(term, Quotient):
                    value = self.number(term.number) // term.divisor
                else:
                    value = self._read(term).long()
                total = total + count * value
            return total
        assert not isinstance(number, (Conditional, Extreme, Real)), "a number in a condition is linear"
        raise RuntimeError("not a number")

    def _read(self, data: Data) -> Tensor:
        index = tuple(self.number(at) for at in data.index)
        return self.values[data][index] if index else self.values[data]
