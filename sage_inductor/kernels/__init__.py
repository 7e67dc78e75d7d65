"""Kernel families, in the order "auto" tries them, and the choice among them."""

from __future__ import annotations

import importlib
from functools import cache

import torch

from sage_inductor.kernels.base import (
    PRECISIONS,
    AttentionParams,
    AttentionProblem,
    Kernel,
    TensorSpec,
    reason,
)

__all__ = [
    "KERNELS",
    "PRECISIONS",
    "AttentionParams",
    "AttentionProblem",
    "Kernel",
    "TensorSpec",
    "available",
    "get",
    "select",
]

# name -> "module:class". Modules are imported when first asked for, and import triton or sageattention later
# still.
KERNELS: dict[str, str] = {
    "hopper": "sage_inductor.kernels.hopper:HopperKernel",
    "triton": "sage_inductor.kernels.triton:TritonKernel",
    "sageattention": "sage_inductor.kernels.sageattention:SageAttentionKernel",
    "reference": "sage_inductor.kernels.reference:ReferenceKernel",
}
# Tried in this order by "auto". The reference is left out: it is never faster than SDPA.
AUTO_ORDER: tuple[str, ...] = ("hopper", "triton", "sageattention")
AUTO_DEVICE_TYPES: tuple[str, ...] = ("cuda",)


@cache
def get(name: str) -> Kernel:
    """The kernel family called `name`; ValueError lists the valid names."""
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} (valid: {', '.join(KERNELS)})")
    module, _, cls = KERNELS[name].partition(":")
    kernel: Kernel = getattr(importlib.import_module(module), cls)()
    return kernel


def available(device: torch.device | str | int | None = None) -> dict[str, list[str]]:
    """`{kernel name: reasons why it cannot run here}`; an empty list means that it can.

    `device` limits the question to one device; without it a kernel counts as available when any device of
    this machine can run it.
    """
    resolved = None if device is None else torch.device(device)
    return {name: get(name).unavailable_reasons(resolved) for name in KERNELS}


def select(problem: AttentionProblem, name: str) -> tuple[Kernel | None, list[str]]:
    """The kernel for `problem`, or None and every reason why not.

    A kernel asked for by name is judged alone. "auto" takes the first of `AUTO_ORDER` that is available,
    supports the problem and expects to beat SDPA on it.
    """
    if name != "auto":
        kernel = get(name)
        reasons = kernel.unavailable_reasons(problem.query.device) + kernel.not_supported_reasons(problem)
        return (None, list(dict.fromkeys(reasons))) if reasons else (kernel, [])
    if problem.query.device.type not in AUTO_DEVICE_TYPES:
        return None, [reason("device", problem.query.device.type, AUTO_DEVICE_TYPES)]
    all_reasons = []
    for candidate in AUTO_ORDER:
        kernel = get(candidate)
        reasons = kernel.unavailable_reasons(problem.query.device) + kernel.not_supported_reasons(problem)
        reasons = reasons or kernel.not_chosen_reasons(problem)
        if not reasons:
            return kernel, []
        all_reasons += [f"{candidate}: {text}" for text in dict.fromkeys(reasons)]
    return None, all_reasons
