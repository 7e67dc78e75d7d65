"""Host side of the Hopper kernel: the Triton kernels' quantisation, then attention.cu on the same workspace."""

from __future__ import annotations

import ctypes
import dataclasses
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..base import AttentionParams, Segments
from ..cache_folder import default_folder
from ..device import multiprocessors
from ..skipping import SAMPLED_TILE, SkipTile, log2_threshold
from ..triton.block_list import HEADER, block_list_kernel, segment_list_kernel
from ..triton.configs import LaunchConfig
from ..triton.launch import MaskOperand, Sizes, TritonAttention
from ..triton.launcher import Launch
from ..triton.prequantized import KeyValueQuantization, PrequantizedAttention
from ..triton.workspace import KEY_BLOCK, USED_KEYS
from . import driver
from .compile import COMBINE_ROWS, COMBINE_THREADS, TILE, HopperVariant, choose_variant, cubin
from .share import part_starts, share

# Constants of the kernels that make lists of masks and of segments, for tiles of two and of three warpgroups, in ascending order or not.
# Launches know them by identity.
_LISTING, _SEGMENT_LISTING = (
    {
        (consumers, ascending): {
            "STRIPES": consumers, "BLOCK_M": TILE, "BLOCK_N": KEY_BLOCK, "ASCENDING": ascending, "num_warps": warps,
        }
        for consumers in (2, 3)
        for ascending in (False, True)
    }
    for warps in (1, 2)
)  # fmt: skip
_BITS_WORDS = TILE * KEY_BLOCK // 32  # of the bits of a warpgroup's queries and a block

_OUT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class _Params(ctypes.Structure):
    """`Params` of attention.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "q_scale", "q_shift", "k_scale", "v_scale", "v_channel", "used_keys", "ticket", "parts", "part_lse",
                "key_mask", "out", "lse",
            )
        ]
        + [
            (name, ctypes.c_longlong)
            for name in ("out_b", "out_h", "out_m", "lse_b", "lse_h", "mask_b", "mask_n")
        ]
        + [
            (name, ctypes.c_int)
            for name in (
                "batch", "heads", "group", "q_len", "kv_len", "q_blocks", "kv_blocks", "low", "high", "v_dim",
                "tiles_per_head", "together", "whole", "grid", "units", "wide", "zero", "kv_pitch",
            )
        ]
        + [("skip_bound", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("block_list", "mask_bits")]
        + [(name, ctypes.c_longlong) for name in ("list_b", "list_h", "bits_b", "bits_h")]
        + [(name, ctypes.c_void_p) for name in ("q_ids", "k_ids", "q_bounds")]
    )  # fmt: skip


class _Arguments(ctypes.Structure):
    """The addresses of the kernel's arguments."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("q_map", "k_map", "v_map", "numbers")]


class _Rows(NamedTuple):
    """The layout of an output's rows. Both flags hold for an address that is a multiple of the size, too."""

    strides: tuple[int, ...]  # in elements: batch, head, row
    in_pairs: bool  # two neighbouring elements can be written at once
    in_pieces: bool  # 16 bytes can be written at once

    @classmethod
    def of(cls, out: Tensor) -> _Rows:
        *strides, last = out.stride()
        return cls(
            tuple(strides),
            last == 1 and all(stride % 2 == 0 for stride in strides),
            all(stride * out.element_size() % 16 == 0 for stride in strides),
        )


class HopperAttention(TritonAttention):
    """Dense attention calls of one kind: `quantize` is that of the Triton kernels, `attend` launches attention.cu."""

    V_TRANSPOSED: ClassVar[bool] = True
    CONFIG: ClassVar[LaunchConfig | None] = LaunchConfig(block_m=TILE, block_n=KEY_BLOCK)

    def _mask_operand(self, attn_mask: Tensor | None, sizes: Sizes, segments: Segments | None) -> MaskOperand:
        """A mask that differs between queries, or heads, comes in bits however few keys there are."""
        mask = super()._mask_operand(attn_mask, sizes, segments)
        return mask.read_in_bits(mask.kind == 1 and not mask.skip_blocks)

    def _prepare_attention(self, params: AttentionParams, out: Tensor, lse: Tensor | None) -> None:
        plan, sizes, mask = self.plan, self.sizes, self.mask
        low, high = params.bounds(sizes.q_len, sizes.kv_len)
        variant = choose_variant(
            params.precision,
            _OUT[out.dtype],
            plan.d,
            plan.dv,
            low is not None,
            high is not None,
            mask.skip_blocks,
            lse is not None,
            params.skip_threshold > 0 and not self.is_sampled,
            q_len=sizes.q_len,
            block_list=mask.by_blocks or self.has_segments or self.is_sampled,
            mask_bits=mask.packed,
            segments=self.has_segments,
            consumers=SAMPLED_TILE.rows // TILE if self.is_sampled else None,
        )
        tiles_per_head = -(-sizes.q_len // variant.block_m)
        tiles = tiles_per_head * sizes.batch * sizes.heads * variant.pieces
        # Tiles of one length can be split so that all programs have as much to do. Tiles of different lengths are not split:
        # they come longest first, so no program waits long at the end.
        one_length = low is None and high is None and not mask.skip_blocks
        # Pieces of a tile that were split in different places would leave out other blocks.
        one_length = one_length and not (variant.skip and variant.pieces > 1)
        processors = multiprocessors(self.index)
        if variant.block_list:
            # How long lists are is not known here. They are split, into equal parts of a list, where multiprocessors would idle;
            # but with a threshold it would depend on the lengths which keys a part begins with, which it keeps.
            one_length = one_length and tiles < processors and not variant.skip
        blocks = -(-sizes.kv_len // KEY_BLOCK)
        self.work = work = share(tiles, blocks if one_length else 0, processors)
        self.grid = work.grid
        self.split_tiles = tiles - work.whole if work.units else 0
        self.variant = dataclasses.replace(variant, split=work.units > 0)
        self.shared_bytes = variant.shared_bytes
        self.functions: tuple[Any, ...] | None = None  # loaded at the first call, when the device is current
        self.rows, self.pair_bytes = _Rows.of(out), 2 * out.element_size()
        # Each program writes up to two parts: the end of one tile and the beginning of another.
        part_rows = 2 * work.grid * variant.block_m if work.units else 0
        self.parts = self._part(part_rows * variant.v_head_dim, torch.float32)
        self.part_lse = self._part(part_rows, torch.float32)
        # Of each head: elements of the list, and words of bits.
        listed, words = tiles_per_head * (HEADER + blocks), -(-sizes.q_len // TILE) * blocks * _BITS_WORDS
        lists_batch, lists_heads = (sizes.batch, 1) if self.has_segments else (mask.batch, mask.heads)
        by_batch, by_head = lists_heads if lists_batch > 1 else 0, int(lists_heads > 1)
        if self.is_sampled:  # the lists are there
            by_batch, by_head = sizes.heads, 1
        elif variant.block_list:
            # One element behind the lists is read, too, and not used.
            self.block_list = self._part(lists_batch * lists_heads * listed + 1, torch.int32)
            lengths = sizes.q_len, sizes.kv_len, low or 0, high or 0
            stripes = sizes.batch * -(-sizes.q_len // TILE) if self.has_segments else 0
            self.row_bounds = self._part(2 * TILE * stripes, torch.int32)
            made_of = (self.segments, self.row_bounds) if self.has_segments else (self.mask_states,)
            self.listing = Launch(
                segment_list_kernel if self.has_segments else block_list_kernel,
                lists_batch * lists_heads * tiles_per_head + stripes,
                dtypes=(),
                own=(*made_of, self.block_list),
                numbers=(sizes.batch, *lengths) if self.has_segments else lengths,
                specialized=(),
                variant=(
                    low is not None,
                    high is not None,
                    *((variant.key_mask,) if self.has_segments else ()),
                ),
                constants=(_SEGMENT_LISTING if self.has_segments else _LISTING)[
                    variant.consumers, variant.skip
                ],
                index=self.index,
                direct=self.direct,
            )
        self.numbers = _Params(
            lse_b=0 if lse is None else lse.stride(0),
            lse_h=0 if lse is None else lse.stride(1),
            mask_b=mask.strides[0],
            mask_n=mask.strides[3],
            batch=sizes.batch,
            heads=sizes.heads,
            group=sizes.heads // sizes.kv_heads,
            q_len=sizes.q_len,
            kv_len=sizes.kv_len,
            q_blocks=sizes.q_blocks,
            kv_blocks=sizes.kv_blocks,
            low=low or 0,
            high=high or 0,
            v_dim=out.shape[3],
            tiles_per_head=tiles_per_head,
            together=self.together(params) * variant.pieces,
            whole=work.whole,
            grid=work.grid,
            units=work.units,
            kv_pitch=sizes.kv_blocks // sizes.batch,
            skip_bound=log2_threshold(params.skip_threshold),
            list_b=listed * by_batch,
            list_h=listed * by_head,
            bits_b=words * by_batch,
            bits_h=words * by_head,
        )

    def _look_at_mask(self, stream: int, attn_mask: Tensor | None, workspace: Tensor) -> None:
        super()._look_at_mask(stream, attn_mask, workspace)
        self.listing(stream, (), workspace)

    def _look_at_segments(self, stream: int, segments: Segments, workspace: Tensor) -> None:
        super()._look_at_segments(stream, segments, workspace)
        self.listing(stream, (), workspace)

    @property
    def skip_tile(self) -> SkipTile:
        """The rows of a warpgroup. A part of a tile's keys knows nothing of those in front of it. Where a sample decides, its rows
        see all keys."""
        if self.is_sampled:
            return SAMPLED_TILE
        sizes, consumers = self.sizes, self.variant.consumers
        blocks, tiles = -(-sizes.kv_len // KEY_BLOCK), self.numbers.tiles_per_head
        places = part_starts(self.work, blocks)
        if not places:
            return SkipTile(TILE, KEY_BLOCK)
        starts = torch.zeros(sizes.batch * sizes.heads, tiles * consumers, blocks, dtype=torch.bool)
        for tile, block in places:
            head, rank = divmod(tile, tiles)  # as in attention.cu, where all tiles are of one length
            first = (tiles - 1 - rank) * consumers
            starts[head, first : first + consumers, block] = True
        starts = starts.view(sizes.batch, sizes.heads, -1, blocks)[:, :, : -(-sizes.q_len // TILE)]
        return SkipTile(TILE, KEY_BLOCK, starts.to(self.device))

    def attend(
        self,
        workspace: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> None:
        placed = _placed(self, workspace.data_ptr(), 0 if packed is None else packed.data_ptr())
        if self.rows.in_pairs and out.data_ptr() % self.pair_bytes == 0:
            self._attend(placed, attn_mask, out, lse, self.rows)
        else:
            dense = torch.empty_like(out, memory_format=torch.contiguous_format)
            self._attend(placed, attn_mask, dense, lse, _Rows.of(dense))
            out.copy_(dense)

    def _attend(
        self, placed: _Placed, attn_mask: Tensor | None, out: Tensor, lse: Tensor | None, rows: _Rows
    ) -> None:
        numbers = _Params.from_buffer_copy(placed.numbers)
        numbers.out = address = out.data_ptr()
        numbers.out_b, numbers.out_h, numbers.out_m = rows.strides
        numbers.wide = rows.in_pieces and address % 16 == 0
        if self.mask.skip_blocks and attn_mask is not None:
            numbers.key_mask = attn_mask.data_ptr()
        if lse is not None:
            numbers.lse = lse.data_ptr()
        arguments = _Arguments(*placed.addresses, ctypes.addressof(numbers))
        if self.functions is None:
            self.functions = loaded(self.index, self.variant)
        stream = self.stream()
        driver.launch(
            self.functions[0],
            (self.grid, 1),
            128 * (self.variant.consumers + 1),
            self.shared_bytes,
            stream,
            ctypes.addressof(arguments),
            self.plan.overlap,
        )
        if self.split_tiles:
            # `combine` takes the last of the arguments only.
            driver.launch(
                self.functions[1],
                (self.split_tiles, self.variant.block_m // COMBINE_ROWS),
                COMBINE_THREADS,
                0,
                stream,
                ctypes.addressof(arguments) + _Arguments.numbers.offset,
            )


class HopperKeyValueQuantization(KeyValueQuantization):
    """As attention.cu reads them: 16-bit V is transposed, too."""

    V_TRANSPOSED: ClassVar[bool] = True


class PrequantizedHopperAttention(PrequantizedAttention, HopperAttention):
    """Q is quantised by the Triton kernels, then attention.cu reads it from the workspace, K and V from their buffer."""


class _Placed(NamedTuple):
    """The arguments that depend on addresses of 8-bit operands."""

    numbers: _Params
    addresses: list[int]  # of the maps
    maps: list[Any]


@lru_cache(maxsize=1024)
def _placed(call: HopperAttention, address: int, packed: int) -> _Placed:
    """The arguments for a workspace at `address`, and K and V that were quantised before at `packed`.

    They are kept because torch's allocator gives the same addresses again and again, and encoding maps takes microseconds.
    They hold nothing but numbers, so they may outlive the memory.
    """
    plan, sizes, variant = call.plan, call.sizes, call.variant
    keys = sizes.kv_blocks * KEY_BLOCK
    span, element = variant.span_bytes, variant.v_element
    q8, k8, v8 = (part.at(address, packed) for part in (call.q8, call.k8, call.v8))
    maps = [
        driver.tensor_map(q8, 1, sizes.heads * sizes.q_blocks * KEY_BLOCK, plan.d, TILE, span, span),
        driver.tensor_map(k8, 1, sizes.kv_heads * keys, plan.d, KEY_BLOCK, span, span),
        driver.tensor_map(
            v8, element, sizes.kv_heads * plan.dv, keys, variant.v_head_dim, 128 // element, 128
        ),
    ]
    numbers = _Params.from_buffer_copy(call.numbers)
    # The sections of workspace.py.
    numbers.q_scale = scales = address + call.scales.offset
    numbers.q_shift = scales + 2 * sizes.q_size  # its second half; read with the LSE only
    numbers.k_scale = k_scale = scales + 4 * sizes.q_size
    numbers.v_scale = v_scale = k_scale + 4 * sizes.kv_heads * sizes.kv_blocks
    v_channel = v_scale + 4 * (sizes.kv_heads * sizes.kv_blocks + sizes.batch * sizes.kv_heads * plan.d)
    numbers.v_channel = v_channel
    numbers.used_keys = used_keys = v_channel + 16 * sizes.batch * sizes.kv_heads * plan.dv
    numbers.ticket = used_keys + 4 * USED_KEYS * sizes.batch
    numbers.parts = address + call.parts.offset
    numbers.part_lse = address + call.part_lse.offset
    if call.block_list is not None:
        numbers.block_list = address + call.block_list.offset
    if call.mask_bits is not None:
        numbers.mask_bits = address + call.mask_bits.offset
    if call.segments is not None:  # as `segment_sections` has them
        numbers.q_ids = address + call.segments.offset
        numbers.k_ids = numbers.q_ids + 4 * sizes.batch * -(-sizes.q_len // TILE) * TILE
        numbers.q_bounds = address + call.row_bounds.offset
    return _Placed(numbers, [each.getPtr() for each in maps], maps)


@cache
def loaded(index: int, variant: HopperVariant) -> tuple[Any, ...]:
    """The kernels `attention` and, where it is needed, `combine` on device `index`, which is current."""
    torch.cuda.current_stream(index)  # torch makes the context that the driver loads into
    names = {"attention": variant.shared_bytes, **({"combine": 0} if variant.split else {})}
    return driver.load(cubin(variant, _folder()), names)


def _folder() -> Path | None:
    try:
        return default_folder() / "kernels"
    except RuntimeError:  # no home
        return None
