"""Timers: of a single call, as the choice of a kernel uses, and the median that the command line and benchmarks print."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sage_inductor.torch_internals.sdpa import keep_gpu_busy

BUSY_CYCLES = 1_000_000  # about half a millisecond


def median_ms(
    calls: Sequence[Callable[[], Any]],
    target_ms: float = 40.0,
    least: int = 5,
    device: torch.device | str = "cuda",
) -> float:
    """Median time of one call on `device`, in ms.

    `calls` do the same on different data and take turns. Each runs once beforehand. Then so many are timed as take
    `target_ms` together: at least `least` and, above that, at most 50.

    A GPU is kept busy before each call while the host queues it. Launch latency, which a model hides, is thus not
    measured; idle time between the kernels of one call is.
    """
    timed = gpu_ms if torch.device(device).type == "cuda" else host_ms
    for call in calls:
        call()
    once = timed(calls[0])
    repeats = max(least, min(50, int(target_ms / max(once, 1e-3))))
    return statistics.median(timed(calls[i % len(calls)]) for i in range(repeats))


def gpu_ms(call: Callable[[], Any]) -> float:
    """The time of one call on the current GPU in ms. The GPU is busy with other work while the host queues the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    keep_gpu_busy(BUSY_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_ms(call: Callable[[], Any]) -> float:
    """The time until one call returns, in ms. On a GPU the call has only been queued by then."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def sets_beyond_l2(bytes_per_set: int, device: torch.device | str = "cuda") -> int:
    """How many sets of inputs must take turns so that none is found in the GPU's L2 cache."""
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(8, -(-3 * cache // bytes_per_set)))
