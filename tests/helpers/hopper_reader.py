"""attention.cu as it reads lists of blocks, bits of masks and ids of segments: index by index, in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sage_inductor.kernels.hopper.launch import HopperAttention
from sage_inductor.kernels.triton.block_list import HEADER


@dataclasses.dataclass(frozen=True)
class Item:
    """As attention.cu has it."""

    tile: int
    first: int
    count: int


def items_of(call: HopperAttention) -> Iterator[Item]:
    """`Schedule` of all programs, in any order."""
    n = call.numbers
    for tile in range(n.whole):
        yield Item(tile, 0, 0)
    blocks = -(-n.kv_len // 128)
    for program in range(n.grid if n.units else 0):
        unit, last = (n.units * number // n.grid for number in (program, program + 1))
        while unit < last:
            tile, first = divmod(unit, blocks)
            count = min(blocks - first, last - unit)
            yield Item(n.whole + tile, first, count)
            unit += count


class Reader:
    """`Tile`, the loop over its blocks and `hide` of attention.cu, for all rows of a warpgroup at once."""

    def __init__(self, call: HopperAttention, workspace: Tensor) -> None:
        assert call.block_list is not None
        self.call, self.numbers, self.variant = call, call.numbers, call.variant
        self.list = call.block_list.of(workspace).cpu()
        self.bits = None if call.mask_bits is None else call.mask_bits.of(workspace).cpu()
        self.ids = None if call.segments is None else call.segments.of(workspace).cpu()
        self.bounds = None if call.segments is None else call.row_bounds.of(workspace).cpu().view(-1, 2)
        self.compares = 0
        self.steps = 0

    def tile(self, item: Item) -> dict[str, int]:
        n, block_m, pieces = self.numbers, self.variant.block_m, self.variant.pieces
        dealt = item.tile // (n.together * n.tiles_per_head) * n.together
        count = min(n.together, n.batch * n.heads * pieces - dealt)
        number = item.tile - dealt * n.tiles_per_head
        rank = number // count
        bhp = dealt + number - rank * count
        b, h = divmod(bhp // pieces, n.heads)
        m0 = (n.tiles_per_head - 1 - rank) * block_m
        blocks = -(-n.kv_len // 128)
        entries = b * n.list_b + h * n.list_h + m0 // block_m * (HEADER + blocks)
        listed, whole = map(int, self.list[entries : entries + 2])
        begin = item.first * listed // blocks if item.count else 0
        end = (item.first + item.count) * listed // blocks if item.count else listed
        first, last = 0, n.kv_len
        full_first, full_last = 0, n.kv_len
        last_row = min(m0 + block_m, n.q_len) - 1
        if self.variant.has_high:
            last = min(last, max(last_row + n.high + 1, 0))
            full_last = min(full_last, max(m0 + n.high + 1, 0))
        if self.variant.has_low:
            first = max(first, m0 + n.low)
            full_first = max(full_first, last_row + n.low)
        first_block = min(first, n.kv_len - 1) // 128
        end_block = max(-(-last // 128), first_block + 1)
        full_begin = min(max(-(-full_first // 128), first_block), end_block)
        full_end = min(max(full_last // 128, full_begin), end_block)
        if begin == end:
            full_begin = full_end = 0
        return {"b": b, "h": h, "piece": bhp % pieces, "m0": m0, "entries": entries + HEADER, "begin": begin, "end": end} | {
            "full_begin": full_begin, "full_end": full_end, "whole": whole,
        }  # fmt: skip

    def read(self, item: Item, seen: Tensor) -> None:
        """Adds 1 to `seen`, [batch, heads, rows of whole tiles, keys of whole blocks], for each pair that a warpgroup lets pass."""
        t = self.tile(item)
        if t["piece"]:
            return
        blocks = set()
        for position in range(t["begin"], max(t["end"], t["begin"] + 1)):
            self.steps += 1
            entry = int(self.list[t["entries"] + position])
            block = entry >> 1
            assert 0 <= block < -(-self.numbers.kv_len // 128) and block not in blocks
            blocks.add(block)
            masked = position >= t["whole"] or position == t["end"] - 1
            assert masked or (t["full_begin"] <= block < t["full_end"] and not entry & 1 and block)
            for consumer in range(self.variant.consumers):
                row = t["m0"] + consumer * 64
                allowed = self.block(t, consumer, block, bool(entry & 1))
                seen[t["b"], t["h"], row : row + 64, block * 128 : block * 128 + 128] += allowed.int()

    def block(self, t: dict[str, int], consumer: int, block: int, partly: bool) -> Tensor:
        """bool [64, 128]: the scores of a warpgroup that are not hidden."""
        n = self.numbers
        allowed = torch.ones(64, 128, dtype=torch.bool)
        rows, columns = t["m0"] + consumer * 64 + torch.arange(64)[:, None], block * 128 + torch.arange(128)
        bounds = self.of_rows(t, consumer) if partly and self.bounds is not None else None
        said = (
            bounds is not None and t["begin"] < t["end"]
        )  # the bits have causality and the window in them, too
        if not said and not t["full_begin"] <= block < t["full_end"]:
            keys = 0 if t["begin"] == t["end"] else n.kv_len
            allowed &= columns < keys
            if self.variant.has_low:
                allowed &= columns >= rows + n.low
            if self.variant.has_high:
                allowed &= columns < (rows + n.high + 1).clamp(max=keys)
        if partly:
            thread, j = torch.arange(128)[:, None], torch.arange(64)
            lane, is_second = thread % 32, (j & 2) != 0
            if self.ids is None:
                words = self.words(t, consumer, block)
            elif bounds is None:
                words = self.compared(t, consumer, block)
            else:
                words = self.between(bounds, block)
            bit = (words[thread, is_second.long()] >> (j // 4 * 2 + j % 2)) & 1
            # Register j of a thread is this element of the product.
            row = thread // 32 * 16 + lane // 4 + torch.where(is_second, 8, 0)
            column = 8 * (j // 4) + 2 * (lane % 4) + j % 2
            allowed[row, column] &= bit != 0
        return allowed

    def words(self, t: dict[str, int], consumer: int, block: int) -> Tensor:
        """[128 threads, 2]: the bits of a mask that each thread of a warpgroup loads for its two rows."""
        assert self.bits is not None
        n, thread = self.numbers, torch.arange(128)
        stripe = min(t["m0"] // 64 + consumer, (n.q_len - 1) // 64)
        first = t["b"] * n.bits_b + t["h"] * n.bits_h + stripe * -(-n.kv_len // 128) * 256
        word = first + block * 256 + thread // 32 * 64 + thread % 32
        return torch.stack([self.bits[word], self.bits[word + 32]], 1)

    def of_rows(self, t: dict[str, int], consumer: int) -> Tensor | None:
        """[128 threads, 2 rows, 2]: the keys that each may see; None where some warp has rows whose keys do not lie together, as they
        then are here in all. `find_bits`, but for the bits."""
        assert self.bounds is not None
        n, thread = self.numbers, torch.arange(128)
        row = (t["m0"] + consumer * 64 + thread // 32 * 16 + thread % 32 // 4)[:, None] + torch.tensor([0, 8])
        seen = self.bounds[t["b"] * -(-n.q_len // 64) * 64 + row.clamp(max=n.q_len - 1)]
        if (seen < 0).any():
            return None
        if self.variant.has_low:
            seen = torch.stack([torch.maximum(seen[..., 0], row + n.low), seen[..., 1]], -1)
        if self.variant.has_high:
            seen = torch.stack([seen[..., 0], torch.minimum(seen[..., 1], row + n.high + 1)], -1)
        return seen

    def between(self, bounds: Tensor, block: int) -> Tensor:
        """The bits of a block that `find_bits` makes of them: [128, 2]."""
        quad = (torch.arange(128) % 4)[:, None, None]
        own = (bounds - block * 128 - 2 * quad).clamp(min=0)
        count = (own // 8 * 2 + (own % 8).clamp(max=2)).clamp(max=32)
        before = (1 << count) - 1
        return before[..., 1] & ~before[..., 0]

    def compared(self, t: dict[str, int], consumer: int, block: int) -> Tensor:
        """The same of segments: `compare_ids`."""
        assert self.ids is not None
        self.compares += 1
        n, thread = self.numbers, torch.arange(128)
        queries, keys = -(-n.q_len // 64) * 64, -(-n.kv_len // 128) * 128
        q_ids, k_ids = self.ids[t["b"] * queries :], self.ids[n.batch * queries + t["b"] * keys :]
        row = t["m0"] + consumer * 64 + thread // 32 * 16 + thread % 32 // 4
        own = torch.stack([q_ids[(row + below).clamp(max=n.q_len - 1)] for below in (0, 8)], 1)
        bits = torch.zeros(128, 2, dtype=torch.int64)
        for columns in (96, 64, 32, 0):
            bits <<= 8
            for j in range(4):
                for e in (0, 1):
                    ids = k_ids[block * 128 + columns + 8 * j + 2 * (thread % 4) + e]
                    bits |= (ids[:, None] == own).long() << (2 * j + e)
        return bits


def seen_by(reader: Reader) -> Tensor:
    """What all programs let pass: int [batch, heads, q_len, kv_len], how many times each pair."""
    n = reader.numbers
    rows = n.tiles_per_head * reader.variant.block_m
    seen = torch.zeros(n.batch, n.heads, rows, -(-n.kv_len // 128) * 128, dtype=torch.int32)
    for item in items_of(reader.call):
        reader.read(item, seen)
    assert int(seen[..., n.kv_len :].sum()) == 0
    return seen[:, :, : n.q_len, : n.kv_len]
