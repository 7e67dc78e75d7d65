"""Host side of the Triton kernels.

A `TritonAttention` holds what attention calls of one kind have in common, worked out once. Each call then makes three launches
(statistics, quantisation, attention), one before them for some masks and for segments, and between them one where Q and K are evened
and one where a sample of the queries decides which blocks are left out.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..base import AttentionParams, Prepared, Segments, is_key_mask, without_keys
from ..device import capability, multiprocessors
from ..skipping import (
    GROUP_ROWS,
    PROBE_STEP,
    SAMPLED_TILE,
    SkipTile,
    log2_sample_threshold,
    log2_threshold,
    probes,
)
from ..smoothing import SMOOTHINGS, resolved_smoothing
from .attention import attention_kernel
from .block_list import HEADER
from .configs import LaunchConfig
from .evened import evened_kernel
from .internals import current_stream
from .launcher import Launch, Part, Tile
from .mask_blocks import mask_blocks_kernel
from .quantize import quantize_kernel
from .sampled import SAMPLED_PER_PROCESSOR, SAMPLES, sampled_list_kernel
from .segments import segment_spans_kernel, segments_kernel, segments_size
from .smoothing import ROTATION_ROWS
from .statistics import statistics_kernel
from .variant import INTERPRETED, SAMPLE_GROUP, VALUE_SAMPLE_GROUP, make_variant
from .workspace import KEY_BLOCK, scales_size

INTERPRETED_ARCH = (9, 0)  # what the interpreter stands for
TOGETHER_BYTES = 16 << 20  # of K and V of heads whose tiles are dealt out together: it stays in the L2 cache
# A mask over queries and keys is looked at before the attention kernel runs, from MASK_BLOCKS_KEYS keys on. Blocks that it rules
# out are passed over then, and a bool mask is packed into bits. An additive mask stays as it is and is read again for each head:
# the look pays where at least MASK_SHARED_BY heads of all sequences share one.
MASK_BLOCKS_KEYS = 256
MASK_SHARED_BY = 4
PART_BYTES = 512  # parts of the workspace begin at multiples of it, as tensors of torch's allocator do

EVENED_RUN = 32  # blocks that one program evens at most, with a matrix that is made once
EVENED_START = 2  # blocks that it would even in the time that it takes to make the matrix (H200)

Strides = tuple[int, int, int, int]


class Sizes(NamedTuple):
    """The sizes of a call, in the words of the kernels."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int  # the longest of a varlen call, as is kv_len
    kv_len: int
    q_blocks: int  # of KEY_BLOCK rows, of all sequences together
    kv_blocks: int
    q_size: int  # elements of the scales that belong to Q

    @classmethod
    def of(cls, query: Tensor, key: Tensor, return_lse: bool, varlen: tuple[int, int, int] | None) -> Sizes:
        heads, kv_heads = query.shape[1], key.shape[1]
        if varlen is None:
            batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
            q_blocks, kv_blocks = batch * -(-q_len // KEY_BLOCK), batch * -(-kv_len // KEY_BLOCK)
        else:
            batch, q_len, kv_len = varlen
            q_blocks, kv_blocks = query.shape[0] // KEY_BLOCK + batch, key.shape[0] // KEY_BLOCK + batch
        q_size = heads * q_blocks * KEY_BLOCK * (2 if return_lse else 1)
        return cls(batch, heads, kv_heads, q_len, kv_len, q_blocks, kv_blocks, q_size)


class MaskOperand(NamedTuple):
    """How the kernels read attn_mask."""

    dtype: torch.dtype | None = None
    kind: int = 0  # 1: bool, 2: additive
    strides: tuple[int, ...] = (0, 0, 0, 0)
    align: int = 1
    units: Strides = (0, 0, 0, 0)  # the strides in units of `align`
    over_keys: bool = False  # the same for every query
    skip_blocks: bool = False  # the same for every head, too
    batch: int = 1  # how many sequences have a mask of their own; 1: all share one
    heads: int = 1  # the same of heads
    by_blocks: bool = False  # a kernel finds out first what it leaves of each block
    packed: bool = False  # and writes it down in bits

    def read_in_bits(self, is_so: bool) -> MaskOperand:
        """The same mask, read block by block in bits, or at once."""
        return MaskOperand(*self[:-2], by_blocks=is_so, packed=is_so)

    @classmethod
    def of(cls, attn_mask: Tensor | None, sizes: Sizes, segments: Segments | None = None) -> MaskOperand:
        if attn_mask is None:
            return _NO_MASK
        attn_mask = attn_mask.expand(sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len)
        strides = attn_mask.stride()
        over_keys = strides[2] == 0 or sizes.q_len == 1
        batch, heads = (
            1 if stride == 0 else size for stride, size in zip(strides, attn_mask.shape[:2], strict=False)
        )
        shared_by = sizes.batch * sizes.heads // max(batch * heads, 1)
        is_bool = attn_mask.dtype == torch.bool
        # With segments, the ranges of their ids say which blocks are read.
        by_blocks = (
            segments is None
            and not over_keys
            and sizes.kv_len >= MASK_BLOCKS_KEYS
            and (is_bool or shared_by >= MASK_SHARED_BY)
        )
        return cls(
            attn_mask.dtype,
            1 if is_bool else 2,
            strides,
            *_in_units(strides, sizes.kv_len),
            over_keys,
            is_key_mask(attn_mask),
            batch,
            heads,
            by_blocks,
            by_blocks and is_bool,
        )

    @property
    def read_at_once(self) -> int:
        """How many elements of a row the attention kernel can read at once; 0 if it reads none for a query and a key."""
        return 0 if self.kind == 0 or self.over_keys or self.packed else self.align


_NO_MASK = MaskOperand()


class TritonAttention:
    """Attention calls of one kind, dense or varlen. A kind is the shapes, strides, dtypes and device of the tensors that it is made
    from, and whether there is an LSE; the tensors themselves are not kept. `quantize` and `attend` are the two halves of a call.

    varlen: (batch, longest query, longest key). The tensors are `[total, heads, head_dim]` then.
    """

    V_TRANSPOSED: ClassVar[bool] = False  # whether 16-bit V is too
    CONFIG: ClassVar[LaunchConfig | None] = (
        None  # of a family with an attention kernel of its own: how that takes masks
    )
    # What `quantize` rounds: both, but in prequantized.py.
    QUANTIZES_QUERY: ClassVar[bool] = True
    QUANTIZES_KEYS: ClassVar[bool] = True

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor | None,
        *,
        config: LaunchConfig | None = None,
        varlen: tuple[int, int, int] | None = None,
        segments: Segments | None = None,
    ) -> None:
        self.device, self.index = query.device, query.device.index
        self.is_varlen = varlen is not None
        self.sizes = sizes = self._sizes(query, key, lse is not None, varlen)
        self.mask = mask = self._mask_operand(attn_mask, sizes, segments)
        self.has_segments = segments is not None
        arch = INTERPRETED_ARCH if INTERPRETED else capability(self.index)
        dims = query.shape[-1], value.shape[-1]
        params = replace(params, smoothing=resolved_smoothing(params.smoothing, SMOOTHINGS))
        self.plan = make_variant(
            arch,
            params.precision,
            query.dtype,
            *dims,
            mask.kind != 0 and not mask.over_keys,
            mask.read_at_once,
            self.V_TRANSPOSED,
            config or self.CONFIG,
            self.has_segments,
            params.smoothing,
        )
        self._make_parts()
        strides = [packed_strides(t) if varlen else t.stride() for t in (query, key, value, out)]
        strides += [ids.stride() for ids in segments or ()]
        self.direct = not INTERPRETED and max(map(max, (*strides, mask.strides, (sizes.q_size,)))) < 2**31
        self._prepare_quantization((query, key, value), strides[:3], params, lse is not None)
        self._prepare_list(params)
        self._prepare_attention(params, out, lse)
        self._prepare_mask()
        self._prepare_segments(segments, params)

    def _sizes(
        self, query: Tensor, key: Tensor, return_lse: bool, varlen: tuple[int, int, int] | None
    ) -> Sizes:
        return Sizes.of(query, key, return_lse, varlen)

    def _mask_operand(self, attn_mask: Tensor | None, sizes: Sizes, segments: Segments | None) -> MaskOperand:
        return MaskOperand.of(attn_mask, sizes, segments)

    def together(self, params: AttentionParams) -> int:
        """How many heads have their tiles dealt out together, the longest first. It is 1 where all tiles are of one length.

        Causality, say, makes tiles of different lengths. Dealt out head after head, long tiles of the last heads would be left for
        the end, when other multiprocessors have nothing to do."""
        is_cut = self.mask.by_blocks or self.has_segments
        if params.bounds(self.sizes.q_len, self.sizes.kv_len) == (None, None) and not is_cut:
            return 1
        batch, heads, kv_heads, _, kv_len, *_ = self.sizes
        kv_bytes = kv_len * (self.plan.d + self.plan.dv * self.plan.v_dtype.itemsize)
        return min(heads // kv_heads * max(TOGETHER_BYTES // max(kv_bytes, 1), 1), max(batch * heads, 1))

    @property
    def skip_tile(self) -> SkipTile:
        """The tiles that are left out, where there is a skip_threshold."""
        if self.is_sampled:
            return SAMPLED_TILE
        return SkipTile(self.plan.config.block_m, self.plan.config.block_n)

    def _make_parts(self) -> None:
        plan, sizes = self.plan, self.sizes
        rows = sizes.kv_heads * sizes.kv_blocks * KEY_BLOCK
        scales = scales_size(sizes.q_size, sizes.batch, sizes.kv_heads, sizes.kv_blocks, plan.d, plan.dv)
        self.workspace_bytes = 0
        self.q8 = self._part(sizes.heads * sizes.q_blocks * KEY_BLOCK * plan.d, torch.int8)
        self.k8 = self._part(rows * plan.d, torch.int8)
        self.v8 = self._part(rows * plan.dv, plan.v_dtype)
        self.scales = self._part(scales, torch.float32)
        self.channel_sizes: Part | None = None
        self.rotation: Part | None = None
        if plan.evened["EQUALISE"]:
            self.channel_sizes = self._part(sizes.batch * sizes.kv_heads * 2 * plan.d, torch.float32)
        if plan.rotation_rows:
            self.rotation = self._part(plan.rotation_rows * plan.rotation_width, torch.bfloat16)
        self.mask_states: Part | None = None
        self.mask_bits: Part | None = None
        if self.mask.by_blocks:
            m, n = plan.config.block_m, plan.config.block_n
            blocks = self.mask.batch * self.mask.heads * -(-sizes.q_len // m) * -(-sizes.kv_len // n)
            self.mask_states = self._part(blocks, torch.int8)
            if self.mask.packed:
                self.mask_bits = self._part(4 * blocks * m, {64: torch.int16, 128: torch.int32}[n])

        self.segments: Part | None = None
        if self.has_segments:
            lengths = sizes.batch, sizes.q_len, sizes.kv_len
            size = segments_size(*lengths, plan.config.block_m, plan.config.block_n)
            self.segments = self._part(size, torch.int32)

    def _part(self, elements: int, dtype: torch.dtype) -> Part:
        """The next part of the workspace."""
        part = Part(self.workspace_bytes, elements, dtype)
        self.workspace_bytes += -(-elements * dtype.itemsize // PART_BYTES) * PART_BYTES
        return part

    def _prepare_quantization(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        strides: list[tuple[int, ...]],
        params: AttentionParams,
        return_lse: bool,
    ) -> None:
        plan, mask, varlen = self.plan, self.mask, self.is_varlen
        batch, heads, kv_heads, q_len, kv_len, q_blocks, kv_blocks, q_size = self.sizes
        (q_align, q_strides), (k_align, k_strides), (v_align, v_strides) = map(_in_units, strides)
        dtypes = tuple([tensor.dtype for tensor in inputs])
        cu_dtype = torch.int32 if varlen else None
        scale = inputs[0].shape[-1] ** -0.5 if params.scale is None else float(params.scale)
        # K and Q have a kernel of their own where they are evened. Q waits for the statistics there, and where they say how far
        # its scores are shifted.
        evens = params.smoothing != "mean"
        both = self.QUANTIZES_QUERY and self.QUANTIZES_KEYS
        q_last = (return_lse or not both) and not evens
        if not self.QUANTIZES_KEYS:
            kv_len = 0  # no program is of a block of K or V then
        # Each kernel takes some of these.
        counts = scale, q_size, batch, heads, kv_heads, q_len, kv_len, q_blocks, kv_blocks
        mask_dtype, mask_kind, mask_strides = None, 0, (0, 0)
        if mask.skip_blocks:
            mask_dtype, mask_kind, mask_strides = mask.dtype, mask.kind, (mask.strides[0], mask.strides[3])
        common: dict[str, Any] = {
            "dtypes": (*dtypes, cu_dtype, cu_dtype, mask_dtype),
            "numbers": (*counts, *q_strides, *k_strides, *v_strides, *mask_strides),
            "specialized": (q_strides[3], k_strides[3], v_strides[3], mask_strides[1]),
            "index": self.index,
            "direct": self.direct,
        }
        variant = q_align, k_align, v_align, varlen, return_lse
        groups = plan.d // SAMPLE_GROUP * (2 if plan.statistics["EQUALISE"] else 1)
        groups += plan.dv // VALUE_SAMPLE_GROUP if plan.statistics["V_STATISTICS"] else 0
        statistics = batch * kv_heads * groups + (batch if mask_kind else 0)
        statistics += plan.rotation_rows // ROTATION_ROWS.value
        q_of_head = -(-q_len // KEY_BLOCK) if self.QUANTIZES_QUERY else 0
        kv_of_head = -(-kv_len // KEY_BLOCK)
        q_programs, kv_programs = batch * heads * q_of_head, batch * kv_heads * kv_of_head
        beside = kv_programs if plan.statistics["COPIES_V"] else 0
        if not q_last and not evens:
            beside = q_programs * (KEY_BLOCK // plan.statistics["Q_ROWS"])
        self.statistics = Launch(
            statistics_kernel,
            statistics + beside,
            own=(self.q8, self.v8, self.scales, self.channel_sizes, self.rotation),
            variant=(*variant, q_last or evens, mask_kind),
            constants=plan.statistics,
            **common,
        )
        self.evening: Launch | None = None
        if evens:
            run_q = run_k = 1
            if plan.evened["AHEAD"]:
                slots = plan.evened_programs * (1 if INTERPRETED else multiprocessors(self.index))
                run_q, run_k = evened_runs((batch * heads, q_of_head), (batch * kv_heads, kv_of_head), slots)
            self.evening = Launch(
                evened_kernel,
                batch * kv_heads * -(-kv_of_head // run_k) + batch * heads * -(-q_of_head // run_q),
                dtypes=(*dtypes[:2], cu_dtype, cu_dtype, mask_dtype),
                own=(self.q8, self.k8, self.scales, self.channel_sizes, self.rotation),
                numbers=(*counts, run_q, run_k, *q_strides, *k_strides, *mask_strides),
                specialized=(q_strides[3], k_strides[3], mask_strides[1]),
                variant=(q_align, k_align, varlen, return_lse, mask_kind),
                constants=plan.evened,
                index=self.index,
                direct=self.direct,
            )
        self.quantization: Launch | None = None
        if not plan.statistics["COPIES_V"]:
            self.quantization = Launch(
                quantize_kernel,
                (1 if evens else 2) * kv_programs + (q_programs if q_last else 0),
                own=(self.q8, self.k8, self.v8, self.scales),
                variant=(*variant, q_last, mask_kind),
                constants=plan.quantize,
                **common,
            )

    def _prepare_attention(self, params: AttentionParams, out: Tensor, lse: Tensor | None) -> None:
        plan, mask, varlen = self.plan, self.mask, self.is_varlen
        batch, heads, kv_heads, q_len, kv_len, q_blocks, kv_blocks, q_size = self.sizes
        out_align, out_strides = _in_units(packed_strides(out) if varlen else out.stride())
        lse_strides = (0, 0) if lse is None else (0 if varlen else lse.stride(0), lse.stride(-2))
        has_high = params.is_causal or params.window_right >= 0
        cu_dtype = torch.int32 if varlen else None
        self.attention = Launch(
            attention_kernel,
            -(-q_len // plan.config.block_m) * batch * heads,
            dtypes=(mask.dtype, out.dtype, None if lse is None else lse.dtype, cu_dtype, cu_dtype),
            own=(
                *self._tiles(), self.scales, self.mask_states, self.mask_bits, self.segments, self.block_list,
            ),
            numbers=(
                q_size, batch, heads, heads // kv_heads, q_len, kv_len, q_blocks, kv_blocks,
                self.together(params), params.window_left, 0 if params.is_causal else params.window_right,
                *out_strides, *lse_strides, *mask.units, mask.batch, mask.heads,
                log2_threshold(params.skip_threshold),
            ),
            specialized=(out_strides[3], mask.units[3]),
            variant=(
                out_align, mask.align, params.window_left >= 0, has_high, params.bottom_right, mask.kind,
                mask.over_keys, mask.skip_blocks, mask.by_blocks, self.has_segments, varlen, lse is not None,
                params.skip_threshold > 0 and not self.is_sampled,
                KEY_BLOCK // plan.config.block_n if self.is_sampled else 0, not self.QUANTIZES_KEYS,
            ),
            constants=plan.attention,
            index=self.index,
            direct=self.direct,
        )  # fmt: skip

    def _prepare_list(self, params: AttentionParams) -> None:
        """The lists of blocks that a sample of the queries finds to count, where there is a threshold for it."""
        plan, mask = self.plan, self.mask
        batch, heads, kv_heads, q_len, kv_len, q_blocks, kv_blocks, q_size = self.sizes
        self.is_sampled = params.skip_threshold > 0 and params.skip_by == "sample"
        self.block_list: Part | None = None
        self.sampling: list[Launch] = []
        if not self.is_sampled:
            return
        blocks, groups, probed = -(-kv_len // KEY_BLOCK), -(-q_len // GROUP_ROWS), probes(q_len)
        # Of each head: the groups that every launch looks at, and how it chooses them.
        rounds = [(probed, 1), (groups - probed, 2)] if probed else [(groups, 0)]
        slots = SAMPLED_PER_PROCESSOR * (1 if INTERPRETED else multiprocessors(self.index))
        programs = [min(slots, batch * heads * of_head) for of_head, _ in rounds]
        slabs = self._part(max(programs) * blocks * SAMPLES, torch.float32)
        found = self._part(2 * batch * heads * probed, torch.int32)
        tiles = -(-q_len // SAMPLED_TILE.rows)
        # `hopper` reads one element behind the lists, which it does not use.
        self.block_list = self._part(batch * heads * tiles * (HEADER + blocks) + 1, torch.int32)
        low, high = params.bounds(q_len, kv_len)
        self.sampling = [
            Launch(
                sampled_list_kernel,
                programs_of_round,
                dtypes=(mask.dtype,),
                own=(self.q8, self.k8, self.scales, slabs, found, self.block_list),
                numbers=(
                    q_size, batch, heads, heads // kv_heads, q_len, kv_len, q_blocks, kv_blocks, groups, probed, PROBE_STEP,
                    low or 0, high or 0, log2_sample_threshold(params.skip_threshold), mask.strides[0], mask.strides[3],
                ),
                specialized=(mask.strides[3],),
                variant=(low is not None, high is not None, mask.kind, choice),
                constants=plan.sampling,
                index=self.index,
                direct=self.direct,
            )
            for programs_of_round, (_, choice) in zip(programs, rounds, strict=True)
        ]  # fmt: skip

    def list_blocks(self, workspace: Tensor, attn_mask: Tensor | None) -> None:
        """Write the lists that `attend` reads, where a sample of the queries makes them. `quantize` has done it."""
        for launch in self.sampling:
            launch(self.stream(), (attn_mask,), workspace)

    def _prepare_mask(self) -> None:
        mask, sizes, config = self.mask, self.sizes, self.plan.config
        self.mask_blocks: Launch | None = None
        if self.mask_states is not None:
            runs = -(-sizes.kv_len // (config.block_n * self.plan.mask_blocks["BLOCKS"]))
            self.mask_blocks = Launch(
                mask_blocks_kernel,
                mask.batch * mask.heads * -(-sizes.q_len // config.block_m) * runs,
                dtypes=(mask.dtype,),
                own=(self.mask_states, None if self.mask_bits is None else self.mask_bits.as_bytes()),
                numbers=(mask.heads, sizes.q_len, sizes.kv_len, *mask.units),
                specialized=(mask.units[3],),
                variant=(mask.align, mask.kind),
                constants=self.plan.mask_blocks,
                index=self.index,
                direct=self.direct,
            )

    def _prepare_segments(self, segments: Segments | None, params: AttentionParams) -> None:
        sizes, config = self.sizes, self.plan.config
        self.segment_ranges: Launch | None = None
        self.segment_spans: Launch | None = None
        if segments is not None:
            (stride_qb, stride_qn), (stride_kb, stride_kn) = (ids.stride() for ids in segments)
            self.segment_ranges = Launch(
                segments_kernel,
                sizes.batch * (-(-sizes.q_len // config.block_m) + -(-sizes.kv_len // config.block_n)),
                dtypes=tuple(ids.dtype for ids in segments),
                own=(self.segments,),
                numbers=(sizes.batch, sizes.q_len, sizes.kv_len, stride_qb, stride_kb, stride_qn, stride_kn),
                specialized=(stride_qn, stride_kn),
                variant=(),
                constants=self.plan.segments,
                index=self.index,
                direct=self.direct,
            )
            if self.CONFIG is None:  # other families make lists
                low, high = params.bounds(sizes.q_len, sizes.kv_len)
                self.segment_spans = Launch(
                    segment_spans_kernel,
                    sizes.batch * -(-sizes.q_len // config.block_m),
                    dtypes=(),
                    own=(self.segments,),
                    numbers=(sizes.batch, sizes.q_len, sizes.kv_len, low or 0, high or 0),
                    specialized=(),
                    variant=(low is not None, high is not None),
                    constants=self.plan.spans,
                    index=self.index,
                    direct=self.direct,
                )

    def _tiles(self) -> tuple[Tile | Part | None, ...]:
        """First and second tile of Q, of K and of V; the second is None where a head dim is a single tile."""
        plan, sizes = self.plan, self.sizes
        keys = sizes.kv_blocks * KEY_BLOCK
        q = sizes.heads * sizes.q_blocks * KEY_BLOCK, plan.d
        k = sizes.kv_heads * keys, plan.d
        v = (sizes.kv_heads * plan.dv, keys) if plan.v_transposed else (sizes.kv_heads * keys, plan.dv)
        tiles: list[Tile | Part | None] = []
        for part, templates, matrix in (
            (self.q8, plan.q_tiles, q), (self.k8, plan.k_tiles, k), (self.v8, plan.v_tiles, v),
        ):  # fmt: skip
            found = [Tile(part, template, *matrix) if plan.tma else part for template in templates]
            tiles += found if len(found) == 2 else [*found, None]
        return tuple(tiles)

    def quantize(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """The workspace for `attend`: uint8, its parts as workspace.py describes them."""
        stream = self.stream()
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        if self.mask_blocks is not None:
            self._look_at_mask(stream, attn_mask, workspace)
        if self.segment_ranges is not None and segments is not None:
            self._look_at_segments(stream, segments, workspace)
        key_mask = attn_mask if self.mask.skip_blocks else None
        inputs = query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask
        self.statistics(stream, inputs, workspace)
        if self.evening is not None:
            self.evening(stream, (query, key, cu_seqlens_q, cu_seqlens_k, key_mask), workspace)
        if self.quantization is not None:
            self.quantization(stream, inputs, workspace)
        self.list_blocks(workspace, attn_mask)
        return workspace

    def _look_at_mask(self, stream: int, attn_mask: Tensor | None, workspace: Tensor) -> None:
        """What the attention kernel reads of a mask that is taken by blocks."""
        assert self.mask_blocks is not None
        self.mask_blocks(stream, (attn_mask,), workspace)

    def _look_at_segments(self, stream: int, segments: Segments, workspace: Tensor) -> None:
        """What the attention kernel reads of ids."""
        assert self.segment_ranges is not None
        self.segment_ranges(stream, segments, workspace)
        if self.segment_spans is not None:
            self.segment_spans(stream, (), workspace)

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
        self.attention(self.stream(), (attn_mask, out, lse, cu_seqlens_q, cu_seqlens_k), workspace, packed)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        segments: Segments | None = None,
    ) -> None:
        """Both halves, on the current stream of the inputs' device. Triton launches on the current device, which is changed for
        the call where it is another."""
        if INTERPRETED or self.index == torch.cuda.current_device():
            workspace = self.quantize(query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k, segments)
            self.attend(workspace, attn_mask, out, lse, cu_seqlens_q, cu_seqlens_k)
        else:
            with torch.cuda.device(self.index):
                self(query, key, value, attn_mask, out, lse, cu_seqlens_q, cu_seqlens_k, segments)

    def stream(self) -> int:
        """The current stream of the device."""
        return 0 if INTERPRETED else current_stream(self.index)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    params: AttentionParams,
    out: Tensor,
    lse: Tensor | None,
    call: type[TritonAttention] = TritonAttention,
    segments: Segments | None = None,
) -> Prepared:
    """`TritonKernel.prepare`; a family that derives from it gives its own `call`."""
    if out.numel() == 0 or key.shape[2] == 0:
        return without_keys
    return call(query, key, value, attn_mask, params, out, lse, segments=segments)


def evened_runs(q: tuple[int, int], k: tuple[int, int], slots: int) -> tuple[int, int]:
    """How many blocks of Q and of K one program evens, where `slots` run at once. `q` and `k`: heads of all sequences, and the
    blocks of one. What is written does not depend on it."""

    def seconds(most: int) -> int:
        runs = [_evenly(blocks, most) for _, blocks in (q, k)]
        programs = sum(heads * -(-blocks // run) for (heads, blocks), run in zip((q, k), runs, strict=True))
        return -(-programs // slots) * (max(runs) + EVENED_START)

    most = min(range(1, EVENED_RUN + 1), key=seconds)
    return _evenly(q[1], most), _evenly(k[1], most)


def _evenly(blocks: int, most: int) -> int:
    """The least number of blocks for each program with which a head takes no more programs than with `most`."""
    programs = max(-(-blocks // most), 1)
    return max(-(-blocks // programs), 1)


def packed_strides(tensor: Tensor) -> Strides:
    """Strides of `[total, heads, head_dim]`, seen as `[1, heads, total, head_dim]`."""
    return 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)


def _in_units(strides: tuple[int, ...], length: int = 0) -> tuple[int, Strides]:
    """(unit, strides in units). The unit is the largest power of two, at most 16 elements, that divides the batch, head and row
    strides and `length`; the stride of channels stays in elements.

    These strides change with the sequence length, so the kernels are not specialised on them. To make wide loads they have to know
    what divides them: strides (4096, 64, 192, 1) are (256, 4, 12, 1) in units of 16.
    """
    b, h, n, d = strides
    unit = b | h | n | length | 16
    unit &= -unit
    return unit, (b // unit, h // unit, n // unit, d)
