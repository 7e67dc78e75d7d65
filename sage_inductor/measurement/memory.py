"""Memory that a call takes on a GPU, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most that torch's allocator holds during `call` beyond what it held before; None where `device` is no GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def mebibytes(size: int | None, measured: bool = True) -> str:
    """ "12.5", in MiB; "~12.5" of a size that was worked out and not measured; "" of none."""
    return "" if size is None else f"{'' if measured else '~'}{size / 2**20:.3g}"
