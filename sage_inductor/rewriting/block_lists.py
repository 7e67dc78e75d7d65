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

from sage_inductor.graph.call import AttentionCall, Expr, Value, example_tensor, trace
from sage_inductor.graph.sizes import size_hint, sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.base import reason
from sage_inductor.patterns.flex_attention import FlexCall
from sage_inductor.rewriting.block_rows import Blocks, Grid
from sage_inductor.rewriting.masks.constants import value_with
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.masks.segments import insert_once
from sage_inductor.rewriting.substitution import insert_expansion
from sage_inductor.torch_internals.dispatch import outside_fake_tensors
from sage_inductor.torch_internals.operators import assert_async

MISFIT = (
    "sage_inductor: the lists of a block_mask leave out keys that its mask_mod allows, or take whole blocks that it does not. "
    "Leave the site out by sage.exclude, or give the lists from the first call on"
)


@dataclass(frozen=True)
class BlockLists:
    """The lists of the call at `node`, as they fit to `mask`. `writes` are those of the graph."""

    flex: FlexCall
    mask: Mask
    writes: Writes

    def reasons(self, call: AttentionCall, values: Mapping[fx.Node, Any]) -> list[str]:
        """Why the attention has to stay for them. `values`: the inputs of the graph, as far as they are known."""
        read = example_tensor(self.mask.attn_mask)
        if (
            read is not None
            and (read.dim() < 2 or sizes_of(read)[-2] != 1)
            and not (self.flex.adds_a_tensor and self.flex.hides_nothing)
        ):
            kind = str(self.mask).removesuffix("bool") or "neither a band nor a row"
            return [reason("mask_mod", kind, "bands, segments, and rows over keys")]
        if not self.flex.has_lists:
            return []
        if self.mask.left_bound is not None or self.mask.right_bound is not None:
            return [reason("block_mask", "lists beside a window that is computed", "a number")]
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
        read_now = [None if item is None else value_with(item, values, self.writes) for item in self._beside]
        if any(
            item is not None and value is None for item, value in zip(self._beside, read_now, strict=True)
        ):
            what = f"{self.mask} that are not known while compiling"
            return [reason("block_mask", f"lists beside {what}", "made of inputs of the graph")]
        with outside_fake_tensors(), torch.no_grad():
            q_len, kv_len = size_hint(query.shape[-2]), size_hint(key.shape[-2])
            if q_len is None or kv_len is None:
                return [reason("block_mask", "lists of lengths that only the data tell", "known lengths")]
            blocks, in_one_piece = self._blocks(q_len, kv_len, lists[1], *read_now)
            if not bool(in_one_piece):
                return [reason("block_mask", "lists beside segments in several pieces", "an id a piece")]
            fits = bool(blocks.fit(*lists))
        return (
            []
            if fits
            else [reason("block_mask", "lists that differ from the mask_mod", "those of create_block_mask")]
        )

    @property
    def _beside(self) -> tuple[Value | None, Value | None, Value | None]:
        """What is read beside a band that hides keys: (a bool row over keys, ids of queries, ids of keys)."""
        read = example_tensor(self.mask.attn_mask)
        row = self.mask.attn_mask if read is not None and read.dtype == torch.bool else None
        return row, self.mask.query_segments, self.mask.key_segments

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same for calls that need one check together."""
        band = self.mask.is_causal, self.mask.bottom_right, self.mask.window_left, self.mask.window_right
        lengths = [
            sizes_of(tensor)[-2]
            for tensor in map(example_tensor, (self.flex.query, self.flex.key))
            if tensor is not None
        ]
        beside = tuple(_structure(item) for item in self._beside)
        return (*self.flex.lists, *self.flex.block_sizes, *band, *lengths, beside)

    def insert_check(self) -> None:
        """Write the check in front of the call."""
        graph = self.flex.node.graph
        lists = tuple(item for item in self.flex.lists if isinstance(item, fx.Node))
        beside = [None if item is None else insert_once(item, graph) for item in self._beside]
        there = tuple(item for item in beside if item is not None)

        def fits(query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
            given = iter(others[: len(there)])
            found = others[len(there) :]
            read = [None if item is None else next(given) for item in beside]
            blocks, in_one_piece = self._blocks(query.shape[-2], key.shape[-2], found[1], *read)
            return blocks.fit(*found) & in_one_piece

        expansion = trace(fits, (self.flex.query, self.flex.key, *there, *lists))
        assert expansion is not None
        checked = insert_expansion(self.flex.node, expansion).output
        with graph.inserting_before(self.flex.node):
            graph.call_function(assert_async, (checked, MISFIT))

    def _blocks(
        self, q_len: int, kv_len: int, indices: Tensor, *beside: Tensor | None
    ) -> tuple[Blocks, Tensor]:
        """The blocks that the mask allows something in, as many as `indices` has; and whether the ids, if there are any, lie so
        that this is true."""
        band = AttentionParams(
            self.mask.is_causal, self.mask.bottom_right, self.mask.window_left, self.mask.window_right
        )
        bounds = band.bounds(q_len, kv_len)
        blocks_q, blocks_k = indices.shape[-2:]
        grid = Grid(q_len, kv_len, (blocks_q, blocks_k), self.flex.block_sizes, indices.device)
        if any(item is not None for item in beside):
            return grid.of_band_and(bounds, *beside)
        return grid.of_band(bounds), torch.ones((), dtype=torch.bool, device=indices.device)


def _structure(item: Any) -> Any:
    """What is equal for values that are computed alike: flex_attention is opened once for each layer."""
    if isinstance(item, fx.Node):
        if item.op not in ("call_function", "call_method"):
            return item
        return item.target, _structure(item.args), _structure(tuple(item.kwargs.items()))
    if isinstance(item, Expr):
        return item.target, _structure(item.args), _structure(tuple(item.kwargs.items()))
    if isinstance(item, (tuple, list)):
        return tuple(map(_structure, item))
    return str(item)
