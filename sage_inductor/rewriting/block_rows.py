"""Which blocks of keys queries see something of, and everything, counted without a mask; and whether lists of blocks say the same.

A band, one segment and both together are an interval of keys for each query; a row over keys leaves out some of it. So how many
keys a query sees in a block of them is a difference of two numbers: for 32k queries and keys and blocks of 128 that is 8 million
numbers, where a mask has a billion. Of a band alone the corners of a block say it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BandBounds = tuple["int | None", "int | None"]


@dataclass(frozen=True)
class Blocks:
    """bool `[1 or batch, 1 or heads, blocks of queries, blocks of keys]`, without the first dims where they are 1."""

    needed: Tensor
    """Some query of the block sees some key of it."""
    whole: Tensor
    """All queries of the block see all keys of it."""
    there: Tensor
    """The block has queries and keys."""

    def fit(
        self,
        counts: Tensor,
        indices: Tensor,
        full_counts: Tensor | None = None,
        full_indices: Tensor | None = None,
    ) -> Tensor:
        """Whether lists name every block that is needed, once, and take whole only those that are: a bool without dims. `counts`
        and `indices`: blocks in which the mask is asked for, int32 `[batch, heads, blocks]` and
        `[batch, heads, blocks, blocks]`; `full_counts` and `full_indices`: those that are taken whole."""
        asked, fits = _listed(counts, indices)
        if full_counts is None or full_indices is None:
            found: Tensor = fits & (asked | ~self.needed).all()
            return found
        taken, fits_too = _listed(full_counts, full_indices)
        named = (asked | taken | ~self.needed) & ~(asked & taken) & (self.whole | ~taken | ~self.there)
        found = fits & fits_too & named.all()
        return found


@dataclass(frozen=True)
class Grid:
    """`q_len` queries and `kv_len` keys in so many `blocks` of `sizes`, those of queries first."""

    q_len: int
    kv_len: int
    blocks: tuple[int, int]
    sizes: tuple[int, int]
    device: torch.device

    @property
    def starts(self) -> tuple[Tensor, Tensor]:
        """The first query, and the first key, of each block: int32 `[blocks]`."""
        queries, keys = (
            torch.arange(count, dtype=torch.int32, device=self.device) * size
            for count, size in zip(self.blocks, self.sizes, strict=True)
        )
        return queries, keys

    def of_band(self, bounds: BandBounds) -> Blocks:
        """Query i sees the keys i + low .. i + high of `bounds`."""
        (low, high), (rows, columns) = bounds, self.starts
        last_row = (rows + (self.sizes[0] - 1)).clamp(max=self.q_len - 1)
        last_column = (columns + (self.sizes[1] - 1)).clamp(max=self.kv_len - 1)
        there = (rows < self.q_len)[:, None] & (columns < self.kv_len)
        nearest, furthest = columns - last_row[:, None], last_column - rows[:, None]
        needed, whole = there, there
        if low is not None:
            needed, whole = needed & (furthest >= low), whole & (nearest >= low)
        if high is not None:
            needed, whole = needed & (nearest <= high), whole & (furthest <= high)
        return Blocks(needed, whole, there)

    def of_band_and(
        self, bounds: BandBounds, row: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None
    ) -> tuple[Blocks, Tensor]:
        """Those of the band that a bool `row` `[..., 1, kv_len]` allows and whose id, of `key_ids` `[batch, kv_len]`, is the
        query's, of `query_ids` `[batch, q_len]`. And a bool without dims: whether the keys of each id lie side by side. If not,
        the blocks are wrong."""
        (low, high), (rows, columns) = bounds, self.starts
        queries = torch.arange(self.blocks[0] * self.sizes[0], dtype=torch.int32, device=self.device)
        queries = queries.clamp(max=self.q_len - 1)  # the last one again does not matter
        first = torch.zeros_like(queries) if low is None else (queries + low).clamp(min=0)
        last = torch.full_like(queries, self.kv_len - 1)
        last = last if high is None else torch.minimum(last, queries + high)
        in_one_piece = torch.ones((), dtype=torch.bool, device=self.device)
        if query_ids is not None and key_ids is not None:
            start, end, in_one_piece = _pieces(_rows_once(query_ids), _rows_once(key_ids))
            first, last = torch.maximum(first, start[:, queries]), torch.minimum(last, end[:, queries])
        first, last = (item.reshape(-1, 1, queries.shape[0], 1) for item in (first, last))
        stop = (columns + (self.sizes[1] - 1)).clamp(max=self.kv_len - 1)
        first, last = torch.maximum(first, columns), torch.minimum(last, stop)
        seen = (last - first + 1).clamp(min=0) if row is None else _allowed(row, first, last, self.kv_len)
        seen = seen.unflatten(-2, (self.blocks[0], self.sizes[0]))
        there = (rows < self.q_len)[:, None] & (columns < self.kv_len)
        needed, whole = (seen > 0).any(-2), (seen == stop - columns + 1).all(-2)
        return Blocks(needed & there, whole, there), in_one_piece


def _allowed(row: Tensor, first: Tensor, last: Tensor, kv_len: int) -> Tensor:
    """How many keys of a bool `row` `[..., 1, kv_len]` from `first` to `last` are allowed."""
    for _ in range(4 - row.dim()):
        row = row[None]
    row = row[:, :, 0].expand(-1, -1, kv_len)
    before = torch.nn.functional.pad(row.cumsum(-1, dtype=torch.int32), (1, 0))
    batch = first.shape[0] if row.shape[0] == 1 else row.shape[0]
    before = before.expand(batch, -1, -1)
    ends = []
    for at in (last + 1, first):
        at = at.clamp(0, kv_len).long().expand(batch, row.shape[1], -1, -1)
        ends.append(before.gather(-1, at.flatten(-2)).view(at.shape))
    return torch.where(last >= first, ends[0] - ends[1], 0)


def _rows_once(ids: Tensor) -> Tensor:
    """Ids as `[batch, length]`, of one row where all rows are the same memory."""
    ids = ids if ids.dim() == 2 else ids[None]
    return ids[:1] if ids.stride(0) == 0 else ids


def _pieces(query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last key of each query's id, int32 `[batch, q_len]`, and whether the keys of each id lie side by side.
    Where no key has the id the last is -1."""
    batch, kv_len = (query_ids if key_ids.shape[0] == 1 else key_ids).shape[0], key_ids.shape[-1]
    query_ids = query_ids.expand(batch, -1).contiguous()
    ordered, order = torch.sort(key_ids.expand(batch, -1), stable=True, dim=-1)
    ordered = ordered.contiguous()
    low = torch.searchsorted(ordered, query_ids)
    high = torch.searchsorted(ordered, query_ids, right=True)
    start = order.gather(-1, low.clamp(max=kv_len - 1))
    end = order.gather(-1, (high - 1).clamp(min=0))
    is_there = high > low
    in_one_piece = (~is_there | (end - start == high - 1 - low)).all()
    return start.int(), torch.where(is_there, end, -1).int(), in_one_piece


def _listed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(which blocks are named, bool `[batch, heads, blocks, blocks]`; whether none is named twice)."""
    blocks = indices.shape[-1]
    is_named = torch.arange(blocks, device=counts.device) < counts[..., None]
    # Names beyond the count fall into a column of their own.
    places = torch.where(is_named, indices, blocks).long()
    found = torch.zeros_like(places[..., :1], dtype=torch.int32).expand(*places.shape[:-1], blocks + 1)
    times = found.scatter_add(-1, places, torch.ones_like(places, dtype=torch.int32))[..., :blocks]
    return times > 0, (times <= 1).all()
