"""The two halves of a call apart: K and V quantised into a buffer that can be sent, and attention to such a buffer.

Both are what the whole call does, by the same kernels, so that outputs are the same bit for bit. The buffer holds the parts of
the workspace (workspace.py) that belong to K and V. Attention reads the large ones where they lie, and copies the scales behind
those of Q, where its kernels look for them. Q is quantised in each call: what its scores were shifted by depends on the mean of
the keys, and with channels evened, so do its integers.
"""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..base import AttentionParams
from ..copies import padded
from ..key_value import KEY_BLOCK, KeyValueForm, KeyValueLayout, Piece
from ..smoothing import EQUALISING, LARGEST_BLOCK
from .launch import Sizes, TritonAttention
from .launcher import Part
from .smoothing import rotation_tiles
from .variant import INTERPRETED
from .workspace import USED_KEYS, scales_size


def layout(form: KeyValueForm) -> KeyValueLayout:
    """The sections of workspace.py, in its order, then the large parts."""
    d, dv, heads = padded(form.head_dim), padded(form.value_head_dim), (form.batch, form.kv_heads)
    blocks, f32 = (form.kv_heads, form.batch * form.blocks), torch.float32
    scales: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("key_scale", blocks, f32),
        ("value_log2_scale", blocks, f32),
        ("key_mean", (*heads, d), f32),
        (
            "value_channels",
            (*heads, 4, dv),
            f32,
        ),  # scale, what the sample says, what was subtracted, first key
        ("used_keys", (form.batch, USED_KEYS), torch.int32),
        ("ticket", (1,), torch.int32),
    ]
    rotation = rotation_tiles(form.smoothing, form.head_dim)
    width = min(1 << (d - 1).bit_length(), LARGEST_BLOCK)
    return KeyValueLayout.of(
        scales,
        [("channel_sizes", (*heads, 2, d), f32)] if form.smoothing in EQUALISING else [],
        [("rotation", (len(rotation), width, width), torch.bfloat16)] if rotation else [],
        [("key", (*blocks, KEY_BLOCK, d), torch.int8)],
        [("value", (form.kv_heads * dv * blocks[1] * KEY_BLOCK,), form.value_dtype)],
    )


class KeyValueQuantization(TritonAttention):
    """Quantises K and V of one kind."""

    QUANTIZES_QUERY: ClassVar[bool] = False

    def __init__(self, key: Tensor, value: Tensor, query: Tensor | None, form: KeyValueForm) -> None:
        self.form = form
        params = AttentionParams(precision=form.precision, smoothing=form.smoothing)
        super().__init__(key if query is None else query, key, value, None, params, value, None)

    def _sizes(
        self, query: Tensor, key: Tensor, return_lse: bool, varlen: tuple[int, int, int] | None
    ) -> Sizes:
        sizes = super()._sizes(query, key, return_lse, varlen)
        return Sizes(*sizes[:7], 0)  # no scales of Q

    def _make_parts(self) -> None:
        _check_layout(self, self.form)
        where = layout(self.form)
        self.workspace_bytes = where.bytes
        self.q8 = Part(0, 0, torch.int8)
        self.scales = _scales(self.form, of_packed=False)
        self.k8, self.v8, self.channel_sizes, self.rotation = _large(where, of_packed=False)
        self.mask_states = self.mask_bits = self.segments = None

    def _prepare_attention(self, params: AttentionParams, out: Tensor, lse: Tensor | None) -> None:
        """There is none."""

    def run(self, key: Tensor, value: Tensor, query: Tensor | None) -> Tensor:
        """The buffer: uint8, on the device of the inputs."""
        if INTERPRETED or self.index == torch.cuda.current_device():
            return self.quantize(key if query is None else query, key, value, None)
        with torch.cuda.device(self.index):
            return self.run(key, value, query)


class PrequantizedAttention(TritonAttention):
    """Attention of one kind to K and V that were quantised before."""

    QUANTIZES_KEYS: ClassVar[bool] = False

    def __init__(
        self,
        query: Tensor,
        form: KeyValueForm,
        kv_len: int,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        self.form = form
        keys = form.batch, form.kv_heads, kv_len
        key, value = (
            torch.empty(*keys, dim, dtype=form.dtype, device="meta")
            for dim in (form.head_dim, form.value_head_dim)
        )
        super().__init__(query, key, value, None, params, out, lse)

    def _sizes(
        self, query: Tensor, key: Tensor, return_lse: bool, varlen: tuple[int, int, int] | None
    ) -> Sizes:
        sizes = super()._sizes(query, key, return_lse, varlen)
        kv_blocks = self.form.batch * self.form.blocks  # there may be more keys than are attended to
        return Sizes(*sizes[:6], kv_blocks, sizes.q_size)

    def _make_parts(self) -> None:
        _check_layout(self, self.form)
        sizes, where = self.sizes, layout(self.form)
        self.scales_of_keys = _scales(self.form, of_packed=True)
        self.workspace_bytes = 0
        self.q8 = self._part(sizes.heads * sizes.q_blocks * KEY_BLOCK * self.plan.d, torch.int8)
        self.scales = self._part(sizes.q_size + self.scales_of_keys.elements, torch.float32)
        self.k8, self.v8, self.channel_sizes, self.rotation = _large(where, of_packed=True)
        self.mask_states = self.mask_bits = self.segments = None

    def run(self, query: Tensor, packed: Tensor, out: Tensor, lse: Tensor) -> None:
        if not INTERPRETED and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self.run(query, packed, out, lse)
            return
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        scales = self.scales.of(workspace)[self.sizes.q_size :]
        scales.copy_(self.scales_of_keys.of(workspace, packed))
        # Key and value are not read: there is no program of theirs.
        if self.evening is not None:
            self.evening(self.stream(), (query, query, None, None, None), workspace, packed)
        elif self.quantization is not None:
            self.quantization(self.stream(), (query, query, query, None, None, None), workspace, packed)
        self.attend(workspace, None, out, lse, packed=packed)


def _scales(form: KeyValueForm, of_packed: bool) -> Part:
    """The sections of scales, all of them."""
    d, dv = padded(form.head_dim), padded(form.value_head_dim)
    size = scales_size(0, form.batch, form.kv_heads, form.batch * form.blocks, d, dv)
    return Part(0, size, torch.float32, of_packed)


def _large(where: KeyValueLayout, of_packed: bool) -> tuple[Part, Part, Part | None, Part | None]:
    """K, V, the sizes of channels and the rotation; None for what is not there."""

    def part(piece: Piece) -> Part:
        return Part(piece.offset, piece.elements, piece.dtype, of_packed)

    sizes, rotation = (where.pieces.get(name) for name in ("channel_sizes", "rotation"))
    return (
        part(where.pieces["key"]),
        part(where.pieces["value"]),
        None if sizes is None else part(sizes),
        None if rotation is None else part(rotation),
    )


def _check_layout(call: TritonAttention, form: KeyValueForm) -> None:
    """That the layout, which knows nothing of variants, has the sizes that the kernels were made for."""
    plan = call.plan
    found = padded(form.head_dim), padded(form.value_head_dim), form.value_dtype
    assert found == (plan.d, plan.dv, plan.v_dtype), (found, plan)
    rotation = layout(form).pieces.get("rotation")
    assert (rotation.elements if rotation else 0) == plan.rotation_rows * plan.rotation_width, plan
