"""The times of one comparison: every kernel and SDPA on the same data, in turns, on the site's device."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.kernels import AttentionProblem, TensorSpec
from sage_inductor.measurement.timers import gpu_ms, host_ms
from sage_inductor.operators import inference
from sage_inductor.torch_internals import outside_tracing
from sage_inductor.tuning.comparison import Comparison, SdpaCall
from sage_inductor.tuning.store import Result, Timing

# Milliseconds of all calls together. A GPU that was idle raises its clocks within some 20 ms of work.
WARM_UP_MS = 30.0
WARM_UP_TURNS = 30  # at most: the clock itself keeps the GPU busy for half a millisecond and more
ROUNDS_MS = 150.0
ROUNDS = (5, 40)  # at least and at most; each times every call once
# Beside the inputs: outputs, and workspaces of a kernel (8 bits each of query, key and value) and of SDPA.
WORKSPACE_SHARE = 1.5
KEPT_KEYS = 0.9  # of a bool mask

Call = Callable[[], Any]
Clock = Callable[[Call], float]


class CannotMeasure(Exception):
    """Why there are no times to be had of a comparison, here and now."""


def measure(comparison: Comparison, kernels: Sequence[str]) -> Result:
    """The times of the `kernels` and of SDPA at a hinted `comparison`, quantisation included.

    Raises CannotMeasure. Not for a stream that is being captured. Leaves nothing behind but memory in the
    allocator's cache: the inputs come from a generator of their own, and no trace that is under way records them.
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
    inputs = _Inputs(device)
    calls: dict[str, Call] = {"sdpa": _sdpa(comparison, inputs)}
    try:
        calls["sdpa"]()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CannotMeasure(f"SDPA does not take the inputs: {_first_line(error)}") from None
    failed: dict[str, str] = {}
    for name in kernels:
        call = _kernel(comparison, name, inputs)
        try:
            call()  # compiles
            calls[name] = call
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # What it would raise when the model runs; whatever it is, the site stays SDPA and shows it.
            failed[name] = f"{type(error).__name__}: {_first_line(error)}"
    times = interleaved(calls, clock_of(device))
    timings = {name: _against(times[name], times["sdpa"]) for name in calls if name != "sdpa"}
    return Result(*comparison.lengths, statistics.median(times["sdpa"]), timings, failed)


def _kernel(comparison: Comparison, name: str, inputs: _Inputs) -> Call:
    problem, params = comparison.problem, comparison.problem.params
    args = inputs.of(problem)
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
    )


def _sdpa(comparison: Comparison, inputs: _Inputs) -> Call:
    sdpa = comparison.sdpa
    args = inputs.of(sdpa)
    return lambda: F.scaled_dot_product_attention(
        *args, is_causal=sdpa.is_causal, scale=sdpa.scale, enable_gqa=sdpa.enable_gqa
    )


class _Inputs:
    """Tensors of given shapes and strides; the kernels and SDPA read the same ones where they agree."""

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

    def _tensor(self, name: str, spec: TensorSpec, make: Callable[[TensorSpec], Tensor]) -> Tensor:
        inner = _without_leading_ones(spec)
        if (name, inner) not in self.known:
            self.known[name, inner] = make(inner)
        return self.known[name, inner].as_strided(spec.shape, spec.stride)

    def _normal(self, spec: TensorSpec) -> Tensor:
        """Standard normal numbers: zeros would draw less power, and so run at higher clocks."""
        return _buffer(spec).normal_(generator=self.generator)

    def _mask(self, spec: TensorSpec) -> Tensor:
        """A bool mask that leaves every query its first key, or a bias."""
        if spec.dtype != torch.bool:
            return self._normal(spec)
        buffer = _buffer(spec).bernoulli_(KEPT_KEYS, generator=self.generator)
        # Without expanded dims, which cannot be written to.
        sizes = [1 if stride == 0 else size for size, stride in zip(spec.shape, spec.stride, strict=True)]
        buffer.as_strided(sizes, spec.stride)[..., 0] = True
        return buffer


def _without_leading_ones(spec: TensorSpec) -> TensorSpec:
    """What kernels see with 4 dimensions may have fewer in the graph, and be the same tensor."""
    outer = next((dim for dim, size in enumerate(spec.shape) if size != 1), 0)
    return replace(spec, shape=spec.shape[outer:], stride=spec.stride[outer:])


def _buffer(spec: TensorSpec) -> Tensor:
    return torch.empty(_extent(spec), dtype=spec.dtype, device=spec.device)


def _extent(spec: TensorSpec) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in spec.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))


def interleaved(calls: dict[str, Call], clock: Clock) -> dict[str, list[float]]:
    """Times in ms of every call, one a round: a clock that drifts, or a neighbour, concerns all alike."""
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
    """The kernel's median, and that of the ratios within a round with half its 95% interval: 1.57 times the
    interquartile range over the root of the count (McGill, Tukey and Larsen 1978, the notch of a box plot)."""
    ratios = [own / other for own, other in zip(times, sdpa, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(times), middle, 1.57 * (upper - lower) / math.sqrt(len(ratios)))


def clock_of(device: torch.device) -> Clock:
    """What times one call on `device`, in ms."""
    return _CudaClock(device) if device.type == "cuda" else host_ms


class _CudaClock:
    """The larger of the time on the GPU and that of queueing the work, which a model does not hide where it is the
    larger one. The GPU is busy while the host queues, and finds nothing in its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
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
