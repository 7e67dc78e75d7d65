"""The lists of a `block_mask`: whether they say what its mask_mod says, which is what a kernel is told.

flex_attention looks at the blocks of keys that the lists name, and in those asks the mask_mod. `create_block_mask` lists all
that the mask_mod allows anything in. A list made by hand may leave out more: that is how sparse attention is written. So the
lists are looked at while compiling, and, since other tensors may come with a later call, in the graph: there a list that
does not fit its mask_mod ends the call with an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import AttentionCall, example_tensor, trace
from sage_inductor.graph.sizes import size_hint, sizes_of
from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.base import reason
from sage_inductor.patterns.flex_attention import FlexCall
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.substitution import insert_expansion
from sage_inductor.torch_internals.dispatch import outside_fake_tensors
from sage_inductor.torch_internals.operators import assert_async

MISFIT = (
    "sage_inductor: the lists of a block_mask leave out keys that its mask_mod allows, or take whole blocks that it does not. "
    "Leave the site out by sage.exclude, or give the lists from the first call on"
)


@dataclass(frozen=True)
class BlockLists:
    """The lists of the call at `node`, as they fit to `mask`."""

    flex: FlexCall
    mask: Mask

    def reasons(self, call: AttentionCall, values: Mapping[fx.Node, Any]) -> list[str]:
        """Why the attention has to stay for them. `values`: the inputs of the graph, as far as they are known."""
        read = example_tensor(self.mask.attn_mask)
        if read is not None and (read.dim() < 2 or sizes_of(read)[-2] != 1):
            kind = str(self.mask).removesuffix("bool") or "neither a band nor a row"
            return [reason("mask_mod", kind, "bands, and rows over keys")]
        if not self.flex.has_lists:
            return []
        if read is not None or self.mask.query_segments is not None:
            return [reason("block_mask", f"lists beside {self.mask}", "lists of a band alone")]
        if not all(isinstance(size, int) for size in self.flex.block_sizes):
            return [reason("BLOCK_SIZE", self.flex.block_sizes, "numbers")]
        lists: list[Any] = [
            values.get(item) if isinstance(item, fx.Node) else None for item in self.flex.lists
        ]
        query, key = example_tensor(call.query), example_tensor(call.key)
        if (
            query is None
            or key is None
            or not isinstance(lists[0], Tensor)
            or not isinstance(lists[1], Tensor)
        ):
            return [reason("block_mask", "lists that are not known while compiling", "inputs of the graph")]
        with outside_fake_tensors(), torch.no_grad():
            q_len, kv_len = size_hint(query.shape[-2]), size_hint(key.shape[-2])
            fits = q_len is not None and kv_len is not None and bool(self._fit(q_len, kv_len, *lists))
        return (
            []
            if fits
            else [reason("block_mask", "lists that differ from the mask_mod", "those of create_block_mask")]
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same for calls that need one check together."""
        band = self.mask.is_causal, self.mask.bottom_right, self.mask.window_left, self.mask.window_right
        lengths = [
            sizes_of(tensor)[-2]
            for tensor in map(example_tensor, (self.flex.query, self.flex.key))
            if tensor is not None
        ]
        return (*self.flex.lists, *self.flex.block_sizes, *band, *lengths)

    def insert_check(self) -> None:
        """Write the check in front of the call."""
        lists = tuple(item for item in self.flex.lists if isinstance(item, fx.Node))

        def fit(query: Tensor, key: Tensor, *lists: Tensor) -> Tensor:
            return self._fit(query.shape[-2], key.shape[-2], *lists)

        expansion = trace(fit, (self.flex.query, self.flex.key, *lists))
        assert expansion is not None
        checked = insert_expansion(self.flex.node, expansion).output
        with self.flex.node.graph.inserting_before(self.flex.node):
            self.flex.node.graph.call_function(assert_async, (checked, MISFIT))

    def _fit(
        self,
        q_len: int,
        kv_len: int,
        counts: Tensor,
        indices: Tensor,
        full_counts: Tensor | None = None,
        full_indices: Tensor | None = None,
    ) -> Tensor:
        """Whether the lists name every block that the mask allows anything in, once, and whole blocks only where it allows
        everything. A bool without dims."""
        rows, columns = (
            torch.arange(number, device=counts.device) * size
            for number, size in zip(indices.shape[-2:], self.flex.block_sizes, strict=True)
        )
        last_row = (rows + (self.flex.block_sizes[0] - 1)).clamp(max=q_len - 1)
        last_column = (columns + (self.flex.block_sizes[1] - 1)).clamp(max=kv_len - 1)
        there = (rows < q_len)[:, None] & (columns < kv_len)
        band = AttentionParams(
            self.mask.is_causal, self.mask.bottom_right, self.mask.window_left, self.mask.window_right
        )
        low, high = band.bounds(q_len, kv_len)
        nearest, furthest = columns - last_row[:, None], last_column - rows[:, None]
        needed, whole = there, there
        if low is not None:
            needed, whole = needed & (furthest >= low), whole & (nearest >= low)
        if high is not None:
            needed, whole = needed & (nearest <= high), whole & (furthest <= high)
        asked, fits = _listed(counts, indices)
        if full_counts is None or full_indices is None:
            found: Tensor = fits & (asked | ~needed).all()
            return found
        taken, fits_too = _listed(full_counts, full_indices)
        named = (asked | taken | ~needed) & ~(asked & taken) & (whole | ~taken | ~there)
        found = fits & fits_too & named.all()
        return found


def _listed(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(which blocks are named, bool `[batch, heads, blocks, blocks]`; whether none is named twice)."""
    blocks = indices.shape[-1]
    is_named = torch.arange(blocks, device=counts.device) < counts[..., None]
    # Names beyond the count fall into a column of their own.
    places = torch.where(is_named, indices, blocks).long()
    found = torch.zeros_like(places[..., :1], dtype=torch.int32).expand(*places.shape[:-1], blocks + 1)
    times = found.scatter_add(-1, places, torch.ones_like(places, dtype=torch.int32))[..., :blocks]
    return times > 0, (times <= 1).all()
