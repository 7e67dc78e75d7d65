"""What is compared at a site: the problem that kernels would solve, and the SDPA call that stands there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from sage_inductor.graph.call import Standing
from sage_inductor.graph.sizes import size_hint
from sage_inductor.kernels import AttentionProblem, TensorSpec
from sage_inductor.torch_internals.sdpa import ambient_settings, float32_precision

# Lengths without a hint, which depend on data, are judged at this one; the crossover decides at run time.
UNKNOWN_LENGTH = 4096
# Lengths of one bucket share their leading bit and the two behind it, so they differ by less than a factor of 5/4.
BUCKET_BITS = 3
BUCKET_WIDTH = 1.25


@dataclass(frozen=True)
class SdpaCall:
    """The `F.scaled_dot_product_attention` call that a kernel would replace, as the graph makes it.

    It still has the mask that a kernel gets as `is_causal`, and the repeated key heads that a kernel reads unrepeated.
    Tensors have 2 to 4 dimensions. Attention that is written out counts as the SDPA call it stands for.
    """

    query: TensorSpec
    key: TensorSpec
    value: TensorSpec
    attn_mask: TensorSpec | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    standing: Standing | None = None
    """The operator that stands there instead."""

    @property
    def name(self) -> str:
        return "SDPA" if self.standing is None else self.standing.name


Described = TypeVar("Described", AttentionProblem, SdpaCall)


@dataclass(frozen=True)
class Comparison:
    """One problem, as kernels see it and as SDPA does. Sizes may be symbolic, but for those of `hinted()`."""

    problem: AttentionProblem
    sdpa: SdpaCall
    whole: str = ""
    """The inputs as all ranks have them together, where each has a part of them; "" where they are this process's own."""

    @property
    def lengths(self) -> tuple[int, int]:
        """(q_len, kv_len)"""
        return self.problem.query.shape[2], self.problem.key.shape[2]

    @property
    def symbolic(self) -> tuple[bool, bool]:
        """Whether q_len and kv_len change from call to call."""
        q_len, kv_len = self.lengths
        return not isinstance(q_len, int), not isinstance(kv_len, int)

    def hinted(self) -> Comparison:
        """The comparison at the sizes that it was traced with."""
        return Comparison(_hinted(self.problem), _hinted(self.sdpa), self.whole)

    def at(self, q_len: int, kv_len: int) -> Comparison:
        """A hinted comparison at other lengths; strides keep their order, and gaps their share."""
        return Comparison(
            _resized(self.problem, q_len, kv_len), _resized(self.sdpa, q_len, kv_len), self.whole
        )

    def key(self) -> dict[str, Any]:
        """Everything in a hinted comparison, and in torch's settings, that times depend on; lengths by their bucket. It can
        be written as JSON."""
        problem, params = self.problem, self.problem.params
        q_len, kv_len = self.lengths
        return {
            "device": problem.query.device.type,
            "batch": problem.query.shape[0],
            "q_len": bucket(q_len),
            "kv_len": bucket(kv_len),
            "kernel": {
                **_described(problem),
                "is_causal": params.is_causal,
                "bottom_right": params.bottom_right,
                "window": [params.window_left, params.window_right],
                "precision": params.precision,
                **({} if params.smoothing == "mean" else {"smoothing": params.smoothing}),
                **({"skip_threshold": params.skip_threshold} if params.skip_threshold else {}),
                **({"skip_by": "sample"} if params.skip_threshold and params.skip_by == "sample" else {}),
                **({} if problem.key_segments is None else {"segments": "ids"}),
            },
            "sdpa": {
                **_described(self.sdpa),
                "is_causal": self.sdpa.is_causal,
                "enable_gqa": self.sdpa.enable_gqa,
                "dims": len(self.sdpa.query.shape),  # its fused kernels take 4
                **({} if self.sdpa.standing is None else {"standing": self.sdpa.standing.name}),
                "torch": ambient_settings(),
                "float32": float32_precision() if self.sdpa.query.dtype == torch.float32 else None,
            },
        }


def bucket(length: int) -> str:
    """The range of lengths that are looked up together: "4096 to 5119" for 5000."""
    shift = max(0, length.bit_length() - BUCKET_BITS)
    first = length >> shift << shift
    return f"{first} to {first + (1 << shift) - 1}"


def _described(call: AttentionProblem | SdpaCall) -> dict[str, Any]:
    mask = call.attn_mask
    return {
        "query": _layout(call.query),
        "key": _layout(call.key),
        "value": _layout(call.value),
        "attn_mask": None if mask is None else _layout(mask, is_mask=True),
    }


def _layout(spec: TensorSpec, is_mask: bool = False) -> str:
    """`bfloat16 heads=8 dim=128 b n h d, row 3072, aligned 16`: what speed depends on beside the lengths.

    Dims are listed from outermost to innermost in memory, without those of one element; an expanded one stands in
    parentheses. `row`, the stride of the sequence, is there where head_dim is innermost: it does not change with the
    length then.
    """
    dims = len(spec.shape)
    names = ("b", "h", "q", "k")[-dims:] if is_mask else ("b", "h", "n", "d")[-dims:]
    order = sorted((dim for dim in range(dims) if spec.shape[dim] != 1), key=lambda dim: -spec.stride[dim])
    parts = [str(spec.dtype).removeprefix("torch.")]
    if not is_mask:
        parts += [f"heads={spec.shape[-3] if dims > 2 else 1}", f"dim={spec.shape[-1]}"]
    parts += [f"({names[dim]})" if spec.stride[dim] == 0 else names[dim] for dim in order]
    text = " ".join(parts)
    if not is_mask and spec.stride[-1] == 1:
        text += f", row {spec.stride[-2]}"
    unit = 16  # elements: wide loads need 16 bytes, and kernels specialise on 16 elements
    for dim in order:
        if spec.stride[dim] != 1:
            unit |= spec.stride[dim]
    return f"{text}, aligned {unit & -unit}"


def _hinted(call: Described) -> Described:
    q_len, kv_len = (size_hint(spec.shape[-2]) or UNKNOWN_LENGTH for spec in (call.query, call.key))

    def numbers(spec: TensorSpec, lengths: dict[int, int]) -> TensorSpec:
        shape = tuple(
            lengths.get(dim, size_hint(size) or 1)
            for dim, size in zip(range(-len(spec.shape), 0), spec.shape, strict=True)
        )
        hints = [size_hint(stride) for stride in spec.stride]
        stride = tuple(hint for hint in hints if hint is not None)
        return replace(spec, shape=shape, stride=stride if None not in hints else _contiguous(shape))

    return _with_lengths(call, q_len, kv_len, numbers)


def _resized(call: Described, q_len: int, kv_len: int) -> Described:
    def resized(spec: TensorSpec, lengths: dict[int, int]) -> TensorSpec:
        dims = range(-len(spec.shape), 0)
        shape = tuple(lengths.get(dim, spec.shape[dim]) for dim in dims)
        stride = [0] * len(shape)
        before = after = 1  # elements that the dims inside take, the gaps between their rows included
        for dim in sorted(dims, key=lambda dim: spec.stride[dim]):
            if spec.stride[dim] != 0:
                stride[dim] = max(1, round(spec.stride[dim] / before * after))
                before = max(before, spec.stride[dim] * spec.shape[dim])
                after = max(after, stride[dim] * shape[dim])
        return replace(spec, shape=shape, stride=tuple(stride))

    return _with_lengths(call, q_len, kv_len, resized)


def _with_lengths(
    call: Described, q_len: int, kv_len: int, change: Callable[[TensorSpec, dict[int, int]], TensorSpec]
) -> Described:
    """`call` with every tensor changed. `change` gets a tensor and the new sizes of those dims that are lengths: {-2: kv_len}
    for the key, {-2: q_len, -1: kv_len} for a mask, without dims that it broadcasts."""
    mask = call.attn_mask
    if mask is not None:
        lengths = {-2: q_len, -1: kv_len}
        mask = change(mask, {dim: lengths[dim] for dim in lengths if not _is_broadcast(mask, dim)})
    changes: dict[str, Any] = {
        "query": change(call.query, {-2: q_len}),
        "key": change(call.key, {-2: kv_len}),
        "value": change(call.value, {-2: kv_len}),
        "attn_mask": mask,
    }
    if isinstance(call, AttentionProblem) and call.query_segments and call.key_segments:
        changes["query_segments"] = change(call.query_segments, {-1: q_len})
        changes["key_segments"] = change(call.key_segments, {-1: kv_len})
    return replace(call, **changes)


def _is_broadcast(mask: TensorSpec, dim: int) -> bool:
    size = mask.shape[dim] if len(mask.shape) >= -dim else 1
    return isinstance(size, int) and size == 1


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
