"""What a machine can run: whether it has a GPU, of which compute capability, and whether Triton interprets instead."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch

from sage_inductor.kernels.base import reason


def has_gpu() -> bool:
    """Whether there is a GPU to ask; traced CUDA tensors need none."""
    return torch.cuda.is_available()


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device, asked for once (the driver takes microseconds to answer)."""
    return torch.cuda.get_device_capability(index)


def interpreted() -> bool:
    """Whether Triton runs, or will run when it is imported, kernels on the CPU: its own environment variable decides, or
    what was set in its place."""
    if sys.modules.get("triton") is not None:
        from sage_inductor.kernels.triton.internals import interprets

        return interprets()
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def capability_reasons(found: tuple[int, int], least: tuple[int, int]) -> list[str]:
    if found >= least:
        return []
    return [reason("compute capability", "{}.{}".format(*found), "{}.{} and newer".format(*least))]
