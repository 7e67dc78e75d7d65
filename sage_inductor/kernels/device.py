"""Facts about the machine: whether it has a GPU, its compute capability, and whether Triton interprets instead."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch

from sage_inductor.kernels.base import reason


def has_gpu() -> bool:
    """Whether this machine has a GPU. Tensors may be traced as CUDA tensors without one."""
    return torch.cuda.is_available()


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device as (major, minor). Kept, because the driver takes microseconds to answer."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int | None) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, or will when it is imported. TRITON_INTERPRET decides, or the setting in
    Triton that was changed since."""
    if sys.modules.get("triton") is not None:
        from sage_inductor.kernels.triton.internals import interprets

        return interprets()
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def capability_reasons(found: tuple[int, int], least: tuple[int, int]) -> list[str]:
    if found >= least:
        return []
    return [reason("compute capability", "{}.{}".format(*found), "{}.{} and newer".format(*least))]
