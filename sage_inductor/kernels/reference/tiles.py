"""Which tiles the oracle leaves out (kernels/skipping.py), and its product with V without them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels.skipping import (
    FULLY_MASKED,
    GROUP_ROWS,
    LEAST_STEP,
    PROBE_SHARE,
    PROBE_STEP,
    SAMPLE_LIFT,
    SAMPLE_STEP,
    SkipTile,
    log2_threshold,
    probes,
)


def margins(x: Tensor, tile: SkipTile, start: int, high: int | None) -> Tensor:
    """How far each tile's largest score comes up to the running maximum, the most of its rows; inf where it is kept whatever the
    threshold, -inf where no row sees a key of it.

    x: float32 `[batch, heads, queries, blocks, 128]`, the scores (log2) of queries from `start` on, which begin a tile. Query i
    sees keys up to i + high. The result is `[batch, heads, tiles of queries, steps of keys]`.
    """
    largest = x.flatten(3).unflatten(3, (-1, tile.keys)).amax(-1)
    so_far = _so_far(largest.clamp(min=FULLY_MASKED), tile, start)
    found = torch.nan_to_num(largest - so_far, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    found = F.pad(found, (0, 0, 0, -x.shape[2] % tile.rows), value=-math.inf)
    found = found.unflatten(2, (-1, tile.rows)).amax(3)
    if high is not None:
        first = start + torch.arange(found.shape[2], device=x.device)[:, None] * tile.rows
        kept_from = (first + high + 1).clamp(min=0) // tile.keys
        kept = torch.arange(found.shape[3], device=x.device) >= kept_from
        found = torch.where(kept & (found > -math.inf), math.inf, found)
    return found


def sampled_margins(
    x: Tensor,
    tile: SkipTile,
    start: int,
    bounds: tuple[int | None, int | None],
    kv_len: int,
    step: int = SAMPLE_STEP,
) -> Tensor:
    """`margins` by a sample of the queries (`skip_by="sample"`): how far each tile's largest score comes up to the largest of all
    keys, the most of the sampled rows, lifted by SAMPLE_LIFT. inf where the tile is kept whatever the threshold, -inf where no row, sampled or not, sees a
    key of it. Query i sees the keys i + low .. i + high of kv_len. One query in `step` is sampled; where it is 1, nothing
    is lifted, and a tile below a threshold has no weight above it."""
    count, blocks = x.shape[2], x.shape[3]
    tiles = -(-count // tile.rows)
    # A tile that ends before its sample does gives its last query instead.
    sampled = torch.arange(step // 2, tiles * tile.rows, step, device=x.device).clamp(max=count - 1)
    largest = x[:, :, sampled].amax(-1)
    of_all = torch.nan_to_num(largest, nan=FULLY_MASKED).clamp(min=FULLY_MASKED).amax(-1, keepdim=True)
    found = largest - of_all + (math.log2(SAMPLE_LIFT) if step > 1 else 0.0)
    found = torch.nan_to_num(found, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    found = found.unflatten(2, (tiles, -1)).amax(3)

    _, kept = _by_bounds(tile, start, count, blocks, bounds, kv_len, x.device)
    seen = F.pad(x.amax(-1) != -math.inf, (0, 0, 0, -count % tile.rows)).unflatten(2, (tiles, -1)).any(3)
    return torch.where(seen, torch.where(kept, math.inf, found), -math.inf)


def _by_bounds(
    tile: SkipTile,
    start: int,
    count: int,
    blocks: int,
    bounds: tuple[int | None, int | None],
    kv_len: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Which blocks some query of each tile may see by its bounds, and which of those are kept: bool `[tiles, blocks]`."""
    low, high = bounds
    first = start + torch.arange(-(-count // tile.rows), device=device)[:, None] * tile.rows
    last = (first + tile.rows).clamp(max=start + count) - 1
    block = torch.arange(blocks, device=device)
    begin, end = torch.zeros_like(first), torch.full_like(first, -(-kv_len // tile.keys))
    full_begin, full_end = begin, torch.full_like(first, kv_len // tile.keys)
    if low is not None:
        begin = (first + low).clamp(min=0) // tile.keys
        full_begin = -(-(last + low).clamp(min=0) // tile.keys)
    if high is not None:
        end = torch.minimum(end, -(-(last + high + 1).clamp(min=0) // tile.keys))
        full_end = torch.minimum(full_end, (first + high + 1).clamp(min=0) // tile.keys)
    seen = (block >= begin) & (block < end)
    return seen, seen & ((block < full_begin) | (block >= full_end) | (block == begin))


def probed_margins(
    found: Tensor, tile: SkipTile, q_len: int, bounds: tuple[int | None, int | None], kv_len: int
) -> Tensor:
    """The margins `found` of all of a call's tiles by a sample, with what its probes decide for the tiles that are none: they keep all blocks, unless at least
    1 in PROBE_SHARE of the probes' blocks lies below the threshold. So none of their margins is below the one that would be the last of those."""
    tiles_of_group = GROUP_ROWS // tile.rows
    groups = [(n + 1) * PROBE_STEP - 1 for n in range(probes(q_len))]
    if not groups:
        return found
    tiles = torch.arange(found.shape[2], device=found.device)
    is_probe = torch.isin(tiles // tiles_of_group, torch.tensor(groups, device=found.device))
    seen, kept = _by_bounds(tile, 0, q_len, found.shape[3], bounds, kv_len, found.device)
    of_probes = torch.where(kept, math.inf, found)[:, :, seen & is_probe[:, None]]
    last = -(-of_probes.shape[2] // PROBE_SHARE)
    if not last:
        return found
    least = of_probes.kthvalue(last).values[..., None, None]
    raised = torch.where(found > -math.inf, torch.maximum(found, least), found)
    return torch.where(is_probe[:, None], found, raised)


def _so_far(largest: Tensor, tile: SkipTile, start: int) -> Tensor:
    """The running maximum in front of each step, of each step's maximum `[batch, heads, queries, steps]`."""
    if tile.starts is None:
        return F.pad(largest.cummax(-1).values[..., :-1], (1, 0), value=FULLY_MASKED)
    starts = tile.starts[:, :, start // tile.rows :].repeat_interleave(tile.rows, 2)[:, :, : largest.shape[2]]
    running, found = largest.new_full(largest.shape[:-1], FULLY_MASKED), torch.empty_like(largest)
    for step in range(largest.shape[-1]):
        running = running.masked_fill(starts[..., step], FULLY_MASKED)
        found[..., step] = running
        running = torch.maximum(running, largest[..., step])
    return found


def skipped_share(margins: Tensor, skip_threshold: float) -> float:
    """The share of tiles that a threshold leaves out, of those with a key that some row sees."""
    seen = margins > -math.inf
    left_out = seen & (margins < log2_threshold(skip_threshold))
    return int(left_out.sum()) / max(int(seen.sum()), 1)


def by_element(tiles: Tensor, tile: SkipTile, x: Tensor) -> Tensor:
    """What holds for tiles `[batch, heads, tiles of queries, steps of keys]`, for each of the scores `x` (as in `margins`)."""
    rows = tiles.repeat_interleave(tile.rows, 2)[:, :, : x.shape[2]]
    return rows.repeat_interleave(tile.keys, 3).view(x.shape)


def product_of_kept(weighted: Tensor, left_out: Tensor, v: Tensor) -> Tensor:
    """The weights `[batch, heads, rows, blocks, 128]` times V `[batch, kv_heads, blocks * 128, dim]`, as
    `[batch, kv_heads, rows of all heads of a group, dim]`. What is not finite in V shows only in rows that do not leave it out."""
    batch, kv_heads, padded_len, dim = v.shape
    steps = batch, kv_heads, -1, padded_len // LEAST_STEP, LEAST_STEP
    parts, kept = weighted.masked_fill(left_out, 0.0).reshape(steps), ~left_out.reshape(steps)[..., :1]
    out = weighted.new_zeros(*parts.shape[:3], dim)
    for step in range(padded_len // LEAST_STEP):
        product = parts[..., step, :] @ v[:, :, step * LEAST_STEP : (step + 1) * LEAST_STEP]
        out += torch.where(kept[..., step, :], product, 0.0)
    return out
