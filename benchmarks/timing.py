"""The timer and the facts about the machine that every benchmark shares."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median_ms(calls: list[Callable[[], Any]], target_ms: float = 40.0, least: int = 5) -> float:
    """Median GPU time of one call in ms. `calls` do the same on different data and take turns.

    The GPU is kept busy before each call while the host queues it, so that launch latency, which a model
    hides, is not measured; what the GPU waits for between the kernels of one call is.
    """
    for call in calls:
        call()
    once = _timed(calls[0])
    repeats = max(least, min(50, int(target_ms / max(once, 1e-3))))
    return statistics.median(_timed(calls[i % len(calls)]) for i in range(repeats))


def _timed(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def sets_beyond_l2(bytes_per_set: int) -> int:
    """How many sets of inputs must take turns so that none is found in L2."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(8, -(-3 * cache // bytes_per_set)))


def machine() -> dict[str, str]:
    """GPU ("CPU" where there is none) and library versions, as they stand in every row of results."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton_version}
