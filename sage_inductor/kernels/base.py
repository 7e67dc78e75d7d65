"""The description of one attention problem, and the interface that every kernel family has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sage_inductor.graph.sizes import known, size_hint
from sage_inductor.kernels.key_value import Attend, KeyValueForm, KeyValueLayout, Quantize
from sage_inductor.torch_internals.dispatch import has_tangent, in_forward_ad

# What each precision means, the fastest first; errors are in README.md.
PRECISIONS: dict[str, str] = {
    "fast": "INT8 QK^T, FP8 (e4m3) PV",
    "balanced": "INT8 QK^T, INT8 PV",
    "accurate": "INT8 QK^T, FP16 (BF16 for bfloat16 inputs) PV",
}


@dataclass(frozen=True)
class AttentionParams:
    """The part of an attention call that is not a tensor.

    Query i may attend to key j when `-window_left <= j - (i + offset) <= window_right`. A negative window means no bound.
    The offset is 0 (top-left alignment, as in SDPA), or `kv_len - q_len` with `bottom_right` (as in FlashAttention).
    `is_causal` means the same as `window_right == 0`.
    """

    is_causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None  # None: head_dim ** -0.5
    precision: str = "fast"
    smoothing: str = "auto"  # one of kernels.smoothing.SMOOTHINGS
    skip_threshold: float = 0.0  # kernels/skipping.py, from 0 (nothing is left out) to below 1
    skip_by: str = "scores"  # what decides about it, one of skipping.DECIDERS

    def bounds(self, q_len: int, kv_len: int) -> tuple[int | None, int | None]:
        """(low, high): query i sees keys i + low .. i + high, None where there is no bound."""
        offset = kv_len - q_len if self.bottom_right else 0
        right = 0 if self.is_causal else self.window_right
        low = offset - self.window_left if self.window_left >= 0 else None
        high = offset + right if right >= 0 else None
        return low, high


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (in elements), dtype and device of a tensor; sizes may be symbolic in a traced graph."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def as_4d(self) -> TensorSpec:
        """The same with leading dims of size 1 up to four dims, as `unsqueeze` would give them."""
        return self._with_dims(4)

    def as_2d(self) -> TensorSpec:
        """The same of ids, which have two dims."""
        return self._with_dims(2)

    def _with_dims(self, dims: int) -> TensorSpec:
        missing = dims - len(self.shape)
        if not missing:
            return self
        outer = self.shape[0] * self.stride[0] if self.shape else 1
        return TensorSpec(
            (1,) * missing + self.shape, (outer,) * missing + self.stride, self.dtype, self.device
        )


class Segments(NamedTuple):
    """The ids of packed sequences: a query attends to the keys of its own id, wherever they lie, beside what a mask and a band
    leave. Both int32, any numbers; on the inputs' device, in any strides."""

    query: Tensor  # [batch, q_len]
    key: Tensor  # [batch, kv_len]


@dataclass(frozen=True)
class AttentionProblem:
    """One attention call as a kernel sees it.

    query `[batch, heads, q_len, head_dim]`, key `[batch, kv_heads, kv_len, head_dim]`, value
    `[batch, kv_heads, kv_len, value_head_dim]`; heads is a multiple of kv_heads. attn_mask is None, or a bool (True:
    attend) or additive tensor that broadcasts to `[batch, heads, q_len, kv_len]`. `query_segments` and `key_segments` are
    both None, or those of `Segments`. All may have any memory layout.
    """

    query: TensorSpec
    key: TensorSpec
    value: TensorSpec
    attn_mask: TensorSpec | None
    params: AttentionParams
    return_lse: bool = False
    query_segments: TensorSpec | None = None
    key_segments: TensorSpec | None = None


class Prepared(Protocol):
    """`Kernel.run` without the parameters."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
        *,
        segments: Segments | None = None,
    ) -> None: ...


class Kernel(ABC):
    """One kernel family. Its limits are class attributes; `run` may be called when both reason lists are
    empty."""

    name: ClassVar[str]
    precisions: ClassVar[Collection[str]]
    dtypes: ClassVar[Collection[torch.dtype]]
    device_types: ClassVar[Collection[str]]
    head_dims: ClassVar[Collection[int]]
    takes_segments: ClassVar[bool] = False
    smoothings: ClassVar[Collection[str]] = ("mean", "auto")
    prequantizes: ClassVar[bool] = False  # whether K and V can be quantised apart from attention to them
    skips: ClassVar[bool] = False  # whether it leaves out tiles (skipping.py)
    oracle_distance: ClassVar[float] = 1.0
    """How far an output may lie from the oracle's, in units of the precision's documented error.

    1 is for a kernel that takes the oracle's steps: if it rounds P against other maxima, in narrower tiles, that differs
    by less than the documented error. 2 is for another algorithm: both outputs lie within that error of the exact one.
    """

    @abstractmethod
    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        """Why the kernel cannot run on `device` (None: on any device of this machine); empty when it can."""

    def broken_reasons(self, device: torch.device | None = None) -> list[str]:
        """Those of `unavailable_reasons` that come from a fault of the installation, not from a limit of the machine."""
        return []

    def not_supported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Every reason why the kernel cannot serve `problem`; empty when it can. Touches no device."""
        reasons = []
        if problem.query.device.type not in self.device_types:
            reasons.append(reason("device", problem.query.device.type, self.device_types))
        if problem.query.dtype not in self.dtypes:
            reasons.append(reason("dtype", problem.query.dtype, self.dtypes))
        if problem.params.precision not in self.precisions:
            reasons.append(reason("precision", problem.params.precision, self.precisions))
        if problem.params.smoothing not in self.smoothings:
            reasons.append(reason("smoothing", problem.params.smoothing, self.smoothings))
        for name, size in (
            ("head_dim", problem.query.shape[-1]),
            ("value_head_dim", problem.value.shape[-1]),
        ):
            if size_hint(size) not in self.head_dims:
                reasons.append(reason(name, size, self.head_dims))
        return reasons + self.segment_reasons(problem) + self.skip_reasons(problem)

    def segment_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why the kernel cannot serve the segments of `problem`; empty where it can, and where there are none."""
        has_none = problem.query_segments is None or self.takes_segments
        return [] if has_none else ["segments (supported: none)"]

    def skip_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why the kernel cannot serve the skip_threshold of `problem`; empty where it can, and where there is none."""
        threshold, mask = problem.params.skip_threshold, problem.attn_mask
        if not threshold:
            return []
        if not self.skips:
            return [reason("skip_threshold", threshold, 0)]
        reasons = []
        # A query says little about its neighbours where those see other keys.
        if problem.params.skip_by == "sample":
            if mask is not None and differs_by_query_or_head(mask):
                shape = tuple(mask.shape)
                reasons.append(
                    reason('attn_mask with skip_by="sample"', shape, "the same for all heads and queries")
                )
            if problem.query_segments is not None:
                reasons.append('segments with skip_by="sample" (supported: none)')
        return reasons

    def precisions_on(self, device: torch.device) -> Collection[str]:
        """Those of `precisions` that the hardware of `device` can run."""
        return self.precisions

    def only_by_name_reasons(self) -> list[str]:
        """Why "auto" never takes this kernel, however fast it is. Empty when it may."""
        return []

    def unmeasured_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why "auto" takes this kernel for `problem` only where it was timed on the machine itself. Empty where the shipped
        measurements hold."""
        return []

    def not_chosen_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why "auto" leaves `problem` to SDPA although the kernel could run it: it would be slower, by the measurements
        shipped with the kernel, or there are none. Empty when "auto" may take it."""
        return []

    @abstractmethod
    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor | None,
        segments: Segments | None = None,
    ) -> None:
        """Write the attention of 4-D inputs (see `AttentionProblem`) into `out`, and its LSE into `lse` if that is given.

        `out` is `[batch, heads, q_len, value_head_dim]` of any strides. `lse` is contiguous, float32
        `[batch, heads, q_len]`, in natural log. Inputs are never written to. The work goes to the current stream of the
        inputs' device.
        """

    def prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor | None,
        segments: Segments | None = None,
    ) -> Prepared:
        """`run` for all tensors of these shapes, strides, dtypes and device, at any address. Work that depends on those facts
        alone is done once, here. The result keeps no tensor, and threads may share it."""

        def prepared(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None,
            out: Tensor,
            lse: Tensor | None,
            *,
            segments: Segments | None = None,
        ) -> None:
            if segments is None:
                self.run(query, key, value, attn_mask, params, out, lse)
            else:
                self.run(query, key, value, attn_mask, params, out, lse, segments)

        return prepared

    # Those of kernels that prequantize. As `prepare`, they work out what depends on shapes, strides, dtypes and device alone;
    # threads may share what they give.

    def key_value_layout(self, form: KeyValueForm) -> KeyValueLayout:
        """Of the buffers that this family makes and reads."""
        raise NotImplementedError(f"kernel={self.name} has no quantised K and V of its own")

    def prepare_key_value(
        self, key: Tensor, value: Tensor, query: Tensor | None, form: KeyValueForm
    ) -> Quantize:
        """Quantising K and V of `form`, with at least one key. `query` is there where smoothing evens its channels with K's."""
        raise NotImplementedError(f"kernel={self.name} has no quantised K and V of its own")

    def prepare_prequantized(
        self,
        query: Tensor,
        form: KeyValueForm,
        kv_len: int,
        params: AttentionParams,
        out: Tensor,
        lse: Tensor,
    ) -> Attend:
        """Attention to the first `kv_len` keys of a buffer of `form`. Tensors as in `run`; there is always an LSE."""
        raise NotImplementedError(f"kernel={self.name} has no quantised K and V of its own")


def without_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    segments: Segments | None = None,
) -> None:
    """Write the result that every kernel gives where there are no keys: 0, and an LSE of -inf."""
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)


def expanded_dim(tensor: Tensor) -> int | None:
    """The first expanded dim of `tensor`, whose elements are one in memory and cannot be written; None where there is none."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if type(stride) is int and stride == 0 and size > 1:
            return dim
    return None


def output_problem(out: Tensor, **inputs: Tensor | None) -> str | None:
    """Why `out` cannot be written to; None where it can.

    Either torch's own `out=` would not take it, or it shares memory with one of `inputs`, which a kernel reads while it
    writes.
    """
    if out.requires_grad and torch.is_grad_enabled():
        return "out requires grad, of which the operator has none (valid: torch.no_grad(), out.detach())"
    if out.is_neg() or out.is_conj():
        kind = "negative" if out.is_neg() else "conjugate"
        return f"out is a {kind} view, whose memory holds other numbers (valid: a tensor of its own)"
    if (dim := expanded_dim(out)) is not None:
        return f"out is expanded in dim {dim}: its {out.shape[dim]} elements are one in memory"
    if (dim := _overlapping_dim(out)) is not None:
        return f"out's elements overlap in memory, in dim {dim}: strides {tuple(out.stride())}"
    for name, tensor in inputs.items():
        if tensor is not None and _share_memory(out, tensor):
            return f"out shares memory with {name}, which is read while out is written"
    return None


def gradient_problem(**inputs: Tensor | None) -> str | None:
    """The reason against a kernel that has no derivative: it names the `inputs` that require gradients, where those are enabled, or carry
    a tangent of forward-mode AD. None where none does."""
    backward, forward = torch.is_grad_enabled(), in_forward_ad()
    if not backward and not forward:
        return None
    tensors = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    if backward and (wanting := [name for name, tensor in tensors.items() if tensor.requires_grad]):
        return reason("requires_grad", wanting, "none; use torch.no_grad()")
    if forward and (wanting := [name for name, tensor in tensors.items() if has_tangent(tensor)]):
        return reason("forward-mode tangent", wanting, "none")
    return None


def mark_written(out: Tensor) -> None:
    """Tell autograd that `out` was written to: it may have saved `out` for a gradient, and does not see a kernel's writes."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _overlapping_dim(tensor: Tensor) -> int | None:
    """A dim whose stride is no larger than the span of the dims with smaller strides, so that elements may share memory. None
    where no two elements do."""
    span = 0
    for stride, size, dim in sorted(zip(tensor.stride(), tensor.shape, range(tensor.dim()), strict=True)):
        if size > 1:
            if stride <= span:
                return dim
            span += stride * (size - 1)
    return None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors without gaps share memory. Tensors with gaps, such as slices of one buffer, may lie in one another
    and share nothing; as in torch, they count only where address and strides are equal."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    if not all(
        torch.ops.aten.is_non_overlapping_and_dense(tensor) and tensor.numel() for tensor in (one, other)
    ):
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.numel() > 0
    (first, end), (other_first, other_end) = (
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in (one, other)
    )
    return first < other_end and other_first < end


def reason(name: str, value: object, supported: object) -> str:
    """`head_dim=80 (supported: 64, 128)`."""
    return f"{name}={_text(value)} (supported: {_text(supported)})"


def _text(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, range):
        step = f" in steps of {value.step}" if value.step != 1 else ""
        return f"{value.start} to {value[-1]}{step}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_text(item) for item in value)
    return str(value)


def differs_by_query_or_head(mask: TensorSpec) -> bool:
    """Whether a mask with four dims may differ from query to query or from head to head, by its shape and strides. Sizes that are not
    known count as more than one."""
    return any(
        known(size) != 1 and known(stride) != 0
        for size, stride in zip(mask.shape[1:3], mask.stride[1:3], strict=True)
    )


def is_key_mask(attn_mask: Tensor) -> bool:
    """Whether a mask that was expanded to `[batch, heads, q_len, kv_len]` is the same for every head and query, by its
    strides. All kernels go by this."""
    heads, q_len = attn_mask.shape[1:3]
    _, head_stride, row_stride, _ = attn_mask.stride()
    return (head_stride == 0 or heads == 1) and (row_stride == 0 or q_len == 1)
