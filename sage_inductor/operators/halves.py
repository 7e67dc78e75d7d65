"""`quantize_key_value` and `attention_prequantized`: the two halves of `sage_attention`, and the record between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels import AttentionParams, TensorSpec
from sage_inductor.kernels.arguments import as_flag, as_scale, check_tensor
from sage_inductor.kernels.key_value import KeyValueForm, Piece
from sage_inductor.kernels.smoothing import EQUALISING
from sage_inductor.operators.prequantized import (
    attention_prequantized_op,
    check_are_plain,
    check_inputs,
    check_names,
    family_for,
    form_of,
    problem_of,
    quantize_key_value_op,
)
from sage_inductor.operators.validation import misfit


@dataclass(frozen=True)
class QuantizedKeyValue:
    """Keys and values in 8 bits, as `quantize_key_value` gives them. `packed` is all that has to be sent; what is received
    into that of `empty_like` is attended to like the original."""

    packed: Tensor
    """uint8, one dim: all parts, on the device of the keys."""
    form: KeyValueForm
    kernel: str
    """The family that made it, and that can attend to it."""
    kv_len: int
    """Keys that are attended to: the first of `form.kv_len`."""

    def parts(self) -> dict[str, Tensor]:
        """The parts by name, views of `packed` in the layout of the kernel: `key` (int8) and its scales, K's mean, `value`
        (e4m3, int8, or 16 bits with "accurate"), its scales, V's mean, and what that leaves of the first key's value, which is 0 in
        8 bits. With "reference" they are `key` `[batch, kv_heads, blocks * 128, head_dim]`, `key_scale` `[batch, kv_heads,
        blocks]`, `key_mean` `[batch, kv_heads, 1, head_dim]`, `value`, `value_scale`, `value_channel`, `value_mean` and
        `first_value` alike. The GPU kernels' lie as in their workspace (kernels/triton/workspace.py): `value_channels` holds V's
        channel scales, its mean and the first key's value, `value_log2_scale` log2 of its scales."""
        form = self.form
        # Numbers, also where Dynamo has made symbols of them: a view in another dtype whose sizes are symbolic comes out of a graph
        # with a part of its elements (torch 2.13).
        sizes = map(index, (form.batch, form.kv_heads, form.kv_len, form.head_dim, form.value_head_dim))
        pieces = _pieces(self.kernel, *sizes, form.dtype, form.precision, form.smoothing)
        return {name: Piece(offset, shape, dtype).of(self.packed) for name, offset, shape, dtype in pieces}

    def empty_like(self) -> QuantizedKeyValue:
        """One of as many keys, to receive into. Its numbers are undefined."""
        return self.with_packed(torch.empty_like(self.packed))

    def with_packed(self, packed: Tensor) -> QuantizedKeyValue:
        """The same for other numbers, such as those of another rank. Raises RuntimeError for a buffer of another size."""
        if packed.shape != self.packed.shape or packed.dtype != torch.uint8:
            raise misfit(
                f"packed is {tuple(packed.shape)} {packed.dtype} (valid: {tuple(self.packed.shape)} torch.uint8)"
            )
        return replace(self, packed=packed)

    def first(self, keys: int) -> QuantizedKeyValue:
        """The first `keys` keys alone, in the same memory: as quantised among all, so that their scales and the mean are those
        of all. Raises ValueError for a number that there is not."""
        if not 0 < keys <= self.form.kv_len:
            raise ValueError(f"keys={keys} (valid: 1 to {self.form.kv_len})")
        return replace(self, kv_len=keys)


def quantize_key_value(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    *,
    kernel: str = "auto",
    precision: str = "auto",
    smoothing: str = "auto",
) -> QuantizedKeyValue:
    """Smooth and quantise keys and values, once for several calls of `attention_prequantized`, or to be sent in 8 bits.

    Args:
        key: `[batch, kv_heads, kv_len, head_dim]`, float16, bfloat16 or float32, in any memory layout.
        value: `[batch, kv_heads, kv_len, value_head_dim]`.
        query: `[batch, heads, q_len, head_dim]`, with smoothing "equalise" and "both" only: queries by whose sizes K's
            channels are scaled. Any that resemble those that will attend, such as a rank's own: the factors go with the keys,
            and whichever query attends is multiplied by them.
        kernel: "auto" is the first of "hopper" and "triton" that can run; or one of them, or "reference".
        precision: "fast", "balanced" or "accurate"; "auto" is the fastest of them that the GPU has.
        smoothing: "mean", "equalise", "rotate" or "both", as `Config.smoothing`; "auto" is "both" with a query, "rotate" without.

    Raises:
        NotEligibleError: the kernel cannot run, or cannot quantise apart from attention; gradients are wanted.
        RuntimeError: the inputs do not fit together.
        TypeError: an input is no tensor.
        ValueError: an unknown kernel, precision or smoothing.
    """
    check_tensor("key", key)
    check_tensor("value", value)
    check_tensor("query", query, optional=True)
    if isinstance(smoothing, str) and smoothing == "auto":
        smoothing = "rotate" if query is None else "both"
    check_names(kernel, precision, smoothing)
    check_inputs(key, value, query, smoothing)
    # Head dims that Dynamo has made symbolic become numbers, as kernels are compiled for them.
    dims = index(key.shape[-1]), index(value.shape[-1])
    kernel, precision = _open_choices(key.device, key.dtype, *dims, kernel, precision, smoothing)
    packed = quantize_key_value_op(
        key, value, query if smoothing in EQUALISING else None,
        kernel_name=kernel, precision=precision, smoothing=smoothing,
    )  # fmt: skip
    form = form_of(key, value, precision, smoothing)
    return QuantizedKeyValue(packed, form, kernel, form.kv_len)


def attention_prequantized(
    query: Tensor,
    key_value: QuantizedKeyValue,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """8-bit attention to keys and values that were quantised before. Output and LSE are those of `sage_attention` with that
    kernel, precision and smoothing, bit for bit where the query is quantised alike (always but for "equalise" and "both",
    whose factors come from the query that `quantize_key_value` was given).

    The LSE is that of the keys as they were, not as they were smoothed: parts that were quantised apart, each with a mean of its
    own, are merged by it exactly.

    Args:
        query: `[batch, heads, q_len, head_dim]` in the dtype that the keys had; heads is a multiple of the key heads.
        key_value: from `quantize_key_value`, on the query's device.
        is_causal: query i sees keys 0 .. i; with `bottom_right` the last query sees all keys.
        scale: factor of the scores, `head_dim ** -0.5` when None.
        window_left, window_right: query i sees keys i - window_left .. i + window_right; negative: no bound.
        return_lse: also return the LSE, fp32 `[batch, heads, q_len]`, natural log.

    Raises:
        NotEligibleError: the kernel cannot run here; gradients are wanted.
        RuntimeError: the inputs do not fit together.
        TypeError: query is no tensor, key_value not what `quantize_key_value` gave, scale no number.
        ValueError: is_causal or bottom_right is no bool.
    """
    if not isinstance(key_value, QuantizedKeyValue):
        raise TypeError(f"key_value is a {type(key_value).__name__} (valid: what quantize_key_value gave)")
    check_tensor("query", query)
    is_causal, bottom_right = as_flag("is_causal", is_causal), as_flag("bottom_right", bottom_right)
    scale = as_scale(scale)
    form = key_value.form
    check_are_plain(query=query, packed=key_value.packed)
    if query.dtype != form.dtype:
        raise misfit(f"query is {query.dtype}, keys were {form.dtype}")
    out, lse = attention_prequantized_op(
        query, key_value.packed, kv_heads=form.kv_heads, kv_len=key_value.kv_len, stored_len=form.kv_len,
        value_head_dim=form.value_head_dim, kernel_name=key_value.kernel, precision=form.precision,
        smoothing=form.smoothing, is_causal=is_causal, scale=scale, bottom_right=bottom_right,
        window_left=window_left, window_right=window_right,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _open_choices(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int,
    kernel: str,
    precision: str,
    smoothing: str,
) -> tuple[str, str]:
    """`kernel` and `precision`, where they are "auto" by what can run on `device`, for any lengths. A kernel that was named is
    judged by the operator."""
    precision = kernels.precision_on(device, precision, kernel)
    if kernel == "auto":
        form = KeyValueForm(1, 1, 1, head_dim, value_head_dim, dtype, precision, smoothing)
        query = TensorSpec((1, 1, 1, head_dim), (head_dim, head_dim, head_dim, 1), dtype, device)
        params = AttentionParams(precision=precision, smoothing=smoothing)
        kernel = family_for("auto", problem_of(query, form, 1, params)).name
    return kernel, precision


def _pieces(kernel: str, *form: Any) -> tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]:
    """Name, offset, shape and dtype of each part of a buffer that `kernel` made, for the fields of its form."""
    pieces = kernels.get(kernel).key_value_layout(KeyValueForm(*form)).pieces
    return tuple((name, *piece) for name, piece in pieces.items())


# Dynamo calls them while tracing, and takes what they return for constants.
_open_choices._dynamo_marked_constant = True  # type: ignore[attr-defined]
_pieces._dynamo_marked_constant = True  # type: ignore[attr-defined]
