"""flex_attention as it runs where it stays: compiled, and over the blocks that its mask leaves. A kernel has to be faster than that, not
than SDPA with the mask as a tensor, which reads every score."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sage_inductor.graph.call import Standing
from sage_inductor.kernels import AttentionParams
from sage_inductor.rewriting.block_rows import Grid
from sage_inductor.rewriting.masks.mask import Mask

NAME = "flex_attention"
BLOCK_SIZE = 128  # create_block_mask's


def standing_flex(mask: Mask, scale: object) -> Standing | None:
    """What stands for a flex_attention with `mask`, a band: it, compiled. None where the mask is more than that."""
    is_computed = mask.left_bound is not None or mask.right_bound is not None
    if is_computed or mask.attn_mask is not None or mask.query_segments is not None:
        return None
    band = AttentionParams(mask.is_causal, mask.bottom_right, mask.window_left, mask.window_right)
    number = float(scale) if isinstance(scale, (int, float)) else None
    compiled: list[Callable[..., Any]] = []
    masks: dict[tuple[int, int], Any] = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        lengths = query.shape[-2], key.shape[-2]
        if lengths not in masks:
            masks[lengths] = block_mask(band, *lengths, query.device)
        if not compiled:
            # Of a code object of its own: Dynamo limits how often one is compiled, and a model may compile flex_attention itself.
            copy = types.FunctionType(_attend.__code__.replace(), _attend.__globals__)
            # And whole: run eagerly, flex_attention writes all scores.
            compiled.append(torch.compile(copy, dynamic=False, fullgraph=True))
        return compiled[0](query, key, value, masks[lengths], number)

    return Standing(NAME, run)


def _attend(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float | None) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)


def block_mask(band: AttentionParams, q_len: int, kv_len: int, device: torch.device) -> Any:
    """torch's BlockMask of `band`, made without the mask: `create_block_mask` writes one of q_len times kv_len numbers of 64 bits
    first."""
    from torch.nn.attention.flex_attention import BlockMask

    low, high = bounds = band.bounds(q_len, kv_len)
    counts_of_blocks = -(-q_len // BLOCK_SIZE), -(-kv_len // BLOCK_SIZE)
    grid = Grid(q_len, kv_len, counts_of_blocks, (BLOCK_SIZE, BLOCK_SIZE), device)
    blocks = grid.of_band(bounds)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= 0
        if low is not None:
            seen = seen & (key >= query + low)
        if high is not None:
            seen = seen & (key <= query + high)
        return seen

    shape = 1, 1, *grid.blocks
    counts, indices = _lists((blocks.needed & ~blocks.whole).expand(shape))
    full_counts, full_indices = _lists((blocks.needed & blocks.whole).expand(shape))
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )


def _lists(found: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are named, and all blocks, those first: int32."""
    order = torch.argsort(found.int(), dim=-1, descending=True, stable=True)
    return found.sum(-1, dtype=torch.int32), order.int()
