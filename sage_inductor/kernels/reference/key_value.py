"""`QuantizedKV` as a buffer of bytes, and back: nothing is lost, integers and e4m3 values are exact in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_inductor.kernels.key_value import KEY_BLOCK, KeyValueForm, KeyValueLayout
from sage_inductor.kernels.reference.algorithm import QuantizedKV
from sage_inductor.kernels.reference.smoothing import Smoother
from sage_inductor.kernels.smoothing import EQUALISING, ROTATING


def layout(form: KeyValueForm) -> KeyValueLayout:
    heads, f32 = (form.batch, form.kv_heads), torch.float32
    keys, channels = form.blocks * KEY_BLOCK, (*heads, 1, form.value_head_dim)
    small: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("key_scale", (*heads, form.blocks), f32),
        ("key_mean", (*heads, 1, form.head_dim), f32),
        ("value_scale", (*heads, form.blocks), f32),
        ("value_channel", channels, f32),
        ("value_mean", channels, f32),
        ("first_value", channels, f32),
    ]
    if form.smoothing in EQUALISING:
        small.append(("half_octaves", (*heads, 1, form.head_dim), f32))
    return KeyValueLayout.of(
        small,
        [("key", (*heads, keys, form.head_dim), torch.int8)],
        [("value", (*heads, keys, form.value_head_dim), form.value_dtype)],
    )


def pack(kv: QuantizedKV, form: KeyValueForm) -> Tensor:
    """The buffer: uint8, on the device of `kv`."""
    where = layout(form)
    packed = torch.zeros(where.bytes, dtype=torch.uint8, device=kv.k.device)
    parts = {
        "key": kv.k,
        "key_scale": kv.k_scale,
        "key_mean": kv.smoothing.mean,
        "value": kv.v,
        "value_scale": kv.v_block,
        "value_channel": kv.v_channel,
        "value_mean": kv.v_mean,
        "first_value": kv.v_first,
        "half_octaves": kv.smoothing.half_octaves,
    }
    for name, piece in where.pieces.items():
        part = parts[name]
        assert part is not None
        piece.of(packed).copy_(part)
    return packed


def unpack(packed: Tensor, form: KeyValueForm, kv_len: int) -> QuantizedKV:
    """The first `kv_len` keys in the buffer, in whole blocks."""
    parts = {name: piece.of(packed) for name, piece in layout(form).pieces.items()}
    smoothing = Smoother(parts["key_mean"], parts.get("half_octaves"), form.smoothing in ROTATING)
    blocks = -(-kv_len // KEY_BLOCK)
    key, value = (parts[name][:, :, : blocks * KEY_BLOCK].float() for name in ("key", "value"))
    scales = (parts[name][:, :, :blocks] for name in ("key_scale", "value_scale"))
    key_scale, value_scale = scales
    return QuantizedKV(
        key, key_scale, kv_len, smoothing, value, value_scale, parts["value_channel"], parts["value_mean"],
        parts["first_value"],
    )  # fmt: skip
