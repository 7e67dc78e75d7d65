"""The times of one comparison: every kernel and SDPA on the same data, in turns, on the site's device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sage_inductor.kernels import AttentionProblem, TensorSpec
from sage_inductor.measurement.timers import gpu_ms, host_ms
from sage_inductor.operators import inference
from sage_inductor.torch_internals.dispatch import outside_tracing
from sage_inductor.torch_internals.sdpa import builtin_sdpa
from sage_inductor.tuning.comparison import Comparison, SdpaCall
from sage_inductor.tuning.store import Result, Timing

# Milliseconds of all calls together. A GPU that was idle raises its clocks within some 20 ms of work.
WARM_UP_MS = 30.0
WARM_UP_TURNS = 30  # at most: the clock itself keeps the GPU busy for half a millisecond and more
ROUNDS_MS = 150.0
ROUNDS = (5, 40)  # at least and at most; each times every call once
# Memory beside the inputs, as a share of them: outputs, and workspaces of a kernel (query, key and value in 8 bits) and of
# SDPA.
WORKSPACE_SHARE = 1.5
KEPT_KEYS = 0.9  # of a bool mask, on average over the batch
DOCUMENTS = (
    512,
    32,
    2048,
    128,
    1024,
    64,
    256,
)  # tokens of packed documents, in this order: short and long ones

Timed = Callable[[], Any]
Clock = Callable[[Timed], float]


class CannotMeasure(Exception):
    """A comparison cannot be measured here and now; the message says why."""


def measure(comparison: Comparison, kernels: Sequence[str]) -> Result:
    """The times of the `kernels` and of SDPA at a hinted `comparison`, quantisation included.

    Must not be called while the stream is being captured. Leaves nothing behind but memory in the allocator's cache: inputs
    come from a random generator of their own, and no trace that is under way records them.

    Raises CannotMeasure: not enough memory, or SDPA does not take the inputs.
    """
    device = comparison.problem.query.device
    with outside_tracing(), _on(device):
        _check_memory(comparison)
        try:
            return _measure(comparison, kernels)
        except torch.OutOfMemoryError as error:
            raise CannotMeasure(f"out of memory: {_first_line(error)}") from None


def _measure(comparison: Comparison, kernels: Sequence[str]) -> Result:
    device = comparison.problem.query.device
    inputs = _Tensors(device)
    calls: dict[str, Timed] = {"sdpa": _sdpa(comparison, inputs)}
    try:
        calls["sdpa"]()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CannotMeasure(
            f"{comparison.sdpa.name} does not take the inputs: {_first_line(error)}"
        ) from None
    failed: dict[str, str] = {}
    for name in kernels:
        call = _kernel(comparison, name, inputs)
        try:
            call()  # compiles
            calls[name] = call
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The kernel would raise the same when the model runs. The site stays SDPA, and its reasons show the error.
            failed[name] = f"{type(error).__name__}: {_first_line(error)}"
    times = interleaved(calls, clock_of(device))
    timings = {name: _against(times[name], times["sdpa"]) for name in calls if name != "sdpa"}
    if inputs.scatter_masks():
        scattered = interleaved(calls, clock_of(device))
        for name, timing in timings.items():
            other = _against(scattered[name], scattered["sdpa"])
            timings[name] = replace(timing, scattered=other.ratio)
    return Result(*comparison.lengths, statistics.median(times["sdpa"]), timings, failed)


def _kernel(comparison: Comparison, name: str, inputs: _Tensors) -> Timed:
    problem, params = comparison.problem, comparison.problem.params
    args, segments = inputs.of(problem), inputs.segments(problem)
    return lambda: inference.attention(
        *args,
        params.is_causal,
        scale=params.scale,
        enable_gqa=problem.query.shape[1] != problem.key.shape[1],
        bottom_right=params.bottom_right,
        window_left=params.window_left,
        window_right=params.window_right,
        kernel_name=name,
        precision=params.precision,
        smoothing=params.smoothing,
        skip_threshold=params.skip_threshold,
        skip_by=params.skip_by,
        **segments,
    )


def _sdpa(comparison: Comparison, inputs: _Tensors) -> Timed:
    sdpa = comparison.sdpa
    args = inputs.of(sdpa)
    if sdpa.standing is not None:
        run = sdpa.standing.run
        return lambda: run(*args[:3])
    return lambda: builtin_sdpa(*args, is_causal=sdpa.is_causal, scale=sdpa.scale, enable_gqa=sdpa.enable_gqa)


class _Tensors:
    """Inputs of given shapes and strides. The kernels and SDPA read the same tensor where shape and strides agree."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.known: dict[tuple[str, TensorSpec], Tensor] = {}

    def of(self, call: AttentionProblem | SdpaCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """query, key, value and attn_mask."""
        return (
            self._tensor("query", call.query, self._normal),
            self._tensor("key", call.key, self._normal),
            self._tensor("value", call.value, self._normal),
            None if call.attn_mask is None else self._tensor("attn_mask", call.attn_mask, self._mask),
        )

    def segments(self, problem: AttentionProblem) -> dict[str, Tensor]:
        """The ids of `problem` by the names of the operator's arguments; none where it has none."""
        specs = {"query_segments": problem.query_segments, "key_segments": problem.key_segments}
        return {name: self._tensor(name, spec, self._ids) for name, spec in specs.items() if spec is not None}

    def _ids(self, spec: TensorSpec) -> Tensor:
        buffer = _buffer(spec)
        ids = usual_segments(spec.shape[-1], spec.device)
        _writable(buffer, spec).copy_(ids.expand(_own_shape(spec)))
        return buffer

    def _tensor(self, name: str, spec: TensorSpec, make: Callable[[TensorSpec], Tensor]) -> Tensor:
        inner = _without_leading_ones(spec)
        if (name, inner) not in self.known:
            self.known[name, inner] = make(inner)
        return self.known[name, inner].as_strided(spec.shape, spec.stride)

    def _normal(self, spec: TensorSpec) -> Tensor:
        """Standard normal numbers: zeros would draw less power, and so run at higher clocks."""
        return _buffer(spec).normal_(generator=self.generator)

    def _mask(self, spec: TensorSpec) -> Tensor:
        """A bool mask as models have it, or a bias of normal numbers."""
        if spec.dtype != torch.bool:
            return self._normal(spec)
        buffer = _buffer(spec)
        _writable(buffer, spec).copy_(usual_mask(_own_shape(spec), spec.device))
        return buffer

    def scatter_masks(self) -> bool:
        """Overwrite every bool mask by one that leaves keys drawn at random, and every query its first key, and all ids by
        ids drawn at random. A kernel that skips blocks of keys that are ruled out finds none to skip. Returns whether there is
        a bool mask, or ids."""
        masks = [(spec, buffer) for (_, spec), buffer in self.known.items() if spec.dtype == torch.bool]
        for spec, buffer in masks:
            buffer.bernoulli_(KEPT_KEYS, generator=self.generator)
            _writable(buffer, spec)[..., 0] = True
        ids = [(spec, buffer) for (_, spec), buffer in self.known.items() if spec.dtype == torch.int32]
        for spec, buffer in ids:
            _writable(buffer, spec).random_(0, len(DOCUMENTS), generator=self.generator)
        return bool(masks or ids)


def usual_segments(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids of documents that are packed into `length` tokens, int32 `[length]`, as data for training and prefilling is: of
    `DOCUMENTS` tokens in turns, and so many that `length` is filled. Fewer tokens than those have shorter documents: three
    at least."""
    unit = min(1.0, length / (3 * max(DOCUMENTS)))
    lengths = torch.tensor([max(1, round(unit * tokens)) for tokens in DOCUMENTS])
    rounds = -(-length // int(lengths.sum()))
    ends = lengths.repeat(rounds).cumsum(0)
    ids = torch.searchsorted(ends, torch.arange(length), right=True)
    return ids.to(device, torch.int32)


def usual_mask(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """A bool mask of `shape` as models have it: `[..., 1, keys]` or `[..., q_len, kv_len]`, True: attend.

    A mask over keys leaves a prefix, of another length for each entry of the batch, as where sequences are padded at the
    end. A mask of a row per query is causal at the lower right, and leaves out some first keys of each entry but the first,
    as where sequences are padded in front. A share of `KEPT_KEYS` of the keys is left on average, before causality. Every
    query keeps its first key.
    """
    *batch, q_len, kv_len = (1,) * (2 - len(shape)) + shape
    entries = math.prod(batch)
    keys = torch.arange(kv_len, device=device)
    least = 2 * KEPT_KEYS - 1
    shares = torch.linspace(1.0, least, entries, device=device) if entries > 1 else torch.tensor([KEPT_KEYS])
    left = (shares.to(device) * kv_len).round().clamp(min=1)[:, None, None]
    if q_len == 1:
        mask = keys < left
    else:
        rows = torch.arange(q_len, device=device)[:, None] + max(0, kv_len - q_len)
        padding = kv_len - left if entries > 1 else torch.zeros_like(left)
        mask = (keys <= rows) & ((keys >= padding) | (keys == 0))
    return mask.expand(entries, q_len, kv_len).reshape(shape)


def _own_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape with 1 for each expanded dim, whose elements cannot be written one by one."""
    return tuple(1 if stride == 0 else size for size, stride in zip(spec.shape, spec.stride, strict=True))


def _writable(buffer: Tensor, spec: TensorSpec) -> Tensor:
    return buffer.as_strided(_own_shape(spec), spec.stride)


def _without_leading_ones(spec: TensorSpec) -> TensorSpec:
    """`spec` from its first dim on that has more than one element. A tensor that kernels see with 4 dims may have fewer in
    the graph; without leading dims of 1 the two are equal."""
    outer = next((dim for dim, size in enumerate(spec.shape) if size != 1), 0)
    return replace(spec, shape=spec.shape[outer:], stride=spec.stride[outer:])


def _buffer(spec: TensorSpec) -> Tensor:
    return torch.empty(_extent(spec), dtype=spec.dtype, device=spec.device)


def _extent(spec: TensorSpec) -> int:
    """The number of elements of memory from the first to the last element of a tensor, gaps included."""
    if 0 in spec.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))


def interleaved(calls: dict[str, Timed], clock: Clock) -> dict[str, list[float]]:
    """Times in ms of every call, one for each round. Calls take turns, so that a drifting clock, or a neighbour on the
    machine, slows all of them alike."""
    spent, once = 0.0, dict.fromkeys(calls, 0.0)
    for _ in range(WARM_UP_TURNS):
        once = {name: clock(call) for name, call in calls.items()}
        spent += sum(once.values())
        if spent >= WARM_UP_MS:
            break
    rounds = round(ROUNDS_MS / sum(once.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(min(max(rounds, ROUNDS[0]), ROUNDS[1])):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            times[name].append(clock(calls[name]))
    return times


def _against(times: Sequence[float], sdpa: Sequence[float]) -> Timing:
    """The kernel's median time, and the median of its ratios to SDPA's time in the same round, with its noise.

    The noise is half the 95% interval of a median: 1.57 times the interquartile range over the root of the count, the notch
    of a box plot (McGill, Tukey and Larsen, Variations of Box Plots, 1978).
    """
    ratios = [own / other for own, other in zip(times, sdpa, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(times), middle, 1.57 * (upper - lower) / math.sqrt(len(ratios)))


def clock_of(device: torch.device) -> Clock:
    """The clock that times one call on `device`, in ms."""
    return _CudaClock(device) if device.type == "cuda" else host_ms


class _CudaClock:
    """Times a call by the larger of its time on the GPU and the host's time to queue it: a model hides the host's time only
    where it is the shorter one. The GPU is busy while the host queues, and finds nothing in its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Timed) -> float:
        self.flush.zero_()
        queueing: list[float] = []
        on_gpu = gpu_ms(lambda: queueing.append(host_ms(call)))
        return max(on_gpu, *queueing)


def _check_memory(comparison: Comparison) -> None:
    device = comparison.problem.query.device
    if device.type != "cuda":
        return
    tensors = {
        (name, _without_leading_ones(spec))
        for call in (comparison.problem, comparison.sdpa)
        for name in ("query", "key", "value", "attn_mask")
        if (spec := getattr(call, name)) is not None
    }
    needed = round(sum(_extent(spec) * spec.dtype.itemsize for _, spec in tensors) * (1 + WORKSPACE_SHARE))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if needed > free:
        raise CannotMeasure(f"out of memory: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
