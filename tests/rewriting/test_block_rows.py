"""Blocks that are needed, and whole ones, counted without a mask: against the mask itself, on random problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_inductor.rewriting.block_rows import Grid


def tiled(mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(some of it, all of it) for each block of `mask` `[batch, heads, q_len, kv_len]`."""
    size_q, size_k = grid.sizes
    rows = range(0, grid.blocks[0] * size_q, size_q)
    columns = range(0, grid.blocks[1] * size_k, size_k)
    blocks = [[mask[..., i : i + size_q, j : j + size_k] for j in columns] for i in rows]
    some = [torch.stack([block.any(-1).any(-1) for block in row], -1) for row in blocks]
    whole = [torch.stack([block.all(-1).all(-1) for block in row], -1) for row in blocks]
    return torch.stack(some, -2), torch.stack(whole, -2)


def pieces(length: int, count: int) -> Tensor:
    """Ids of pieces that lie side by side, in any order of the numbers."""
    bounds = torch.randperm(length - 1)[: count - 1].sort().values + 1
    return torch.randperm(count).int()[torch.bucketize(torch.arange(length), bounds, right=True)]


@pytest.mark.parametrize("seed", range(40))
def test_against_the_mask(seed: int) -> None:
    torch.manual_seed(seed)
    q_len, kv_len = (int(torch.randint(5, 60, ())) for _ in range(2))
    size = int(torch.randint(3, 17, ()))
    grid = Grid(
        q_len, kv_len, (-(-q_len // size) + seed % 2, -(-kv_len // size)), (size, size), torch.device("cpu")
    )
    at = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    low = int(torch.randint(-30, 10, ())) if seed % 3 else None
    high = int(torch.randint(-5, 30, ())) if seed % 5 else None
    high = max(high, low) if high is not None and low is not None else high  # a band has keys
    band = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    band &= (at >= low) if low is not None else True
    band &= (at <= high) if high is not None else True
    alone = grid.of_band((low, high))
    some, whole = tiled(band, grid)
    assert torch.equal(alone.needed.expand_as(some[0, 0]), some[0, 0])
    assert torch.equal((alone.whole & alone.there), whole[0, 0] & alone.there)

    batch = 2
    row = torch.rand(batch, 1 if seed % 2 else 3, 1, kv_len) > 0.2 if seed % 4 else None
    key_ids = torch.stack([pieces(kv_len, 3) for _ in range(batch)])
    query_ids = torch.stack([torch.randint(-1, 3, (q_len,)).int() for _ in range(batch)])
    if seed % 7 == 0:
        key_ids, query_ids = (item[:1].expand(batch, -1) for item in (key_ids, query_ids))
    mask = band & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
    mask = mask if row is None else mask & row
    blocks, in_one_piece = grid.of_band_and((low, high), row, query_ids, key_ids)
    some, whole = tiled(mask, grid)
    assert in_one_piece
    assert torch.equal(blocks.needed.expand_as(some), some)
    assert torch.equal((blocks.whole & blocks.there).expand_as(whole), whole & blocks.there)


def test_ids_that_come_back() -> None:
    grid = Grid(8, 8, (2, 2), (4, 4), torch.device("cpu"))
    ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2]], dtype=torch.int32)
    assert not grid.of_band_and((None, 0), None, ids, ids)[1]
    # Those that no query has do not matter.
    assert grid.of_band_and((None, 0), None, ids.clamp(min=1), ids)[1]


def test_lists() -> None:
    ids = torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32)
    blocks, _ = Grid(8, 8, (2, 2), (4, 4), torch.device("cpu")).of_band_and((None, None), None, ids, ids)
    none, one = (torch.full((1, 1, 2), count, dtype=torch.int32) for count in (0, 1))
    diagonal = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    turned = diagonal.flip(-1)
    assert blocks.fit(none, diagonal, one, diagonal) and blocks.fit(one, diagonal, none, diagonal)
    assert blocks.fit(one, diagonal) and blocks.fit(one + 1, diagonal)
    assert not blocks.fit(none, diagonal, none, diagonal)  # left out
    assert not blocks.fit(one, diagonal, one, diagonal)  # named twice
    assert not blocks.fit(one, diagonal, one, turned)  # taken whole, and is not
