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
    Segments,
    TensorSpec,
    reason,
)
from sage_inductor.kernels.smoothing import SMOOTHINGS

__all__ = [
    "KERNELS",
    "PRECISIONS",
    "AttentionParams",
    "AttentionProblem",
    "Kernel",
    "Segments",
    "TensorSpec",
    "PRECISION_CHOICES",
    "SMOOTHINGS",
    "available",
    "candidates",
    "get",
    "no_choice_reasons",
    "precision_on",
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
PRECISION_CHOICES: tuple[str, ...] = ("auto", *PRECISIONS)
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
    supports the problem and, by the measurements shipped with it, beats SDPA on it.
    """
    if name != "auto":
        kernel = get(name)
        reasons = _cannot_run_reasons(kernel, problem)
        return (None, reasons) if reasons else (kernel, [])
    against = no_choice_reasons(problem)
    if against:
        return None, against
    runnable, refused = candidates(problem)
    for kernel in runnable:
        reasons = kernel.not_chosen_reasons(problem)
        if not reasons:
            return kernel, []
        refused[kernel.name] = _named(kernel.name, reasons)
    return None, [text for name in AUTO_ORDER for text in refused[name]]


def precision_on(device: torch.device, precision: str, kernel: str = "auto") -> str:
    """`precision`, or, for "auto", the fastest that `kernel` has on `device` ("auto": that any kernel has which "auto" may
    take): "fast" where the hardware computes in FP8, "balanced" on Ampere. All hold the error of "fast"."""
    if precision != "auto":
        return precision
    names = AUTO_ORDER if kernel == "auto" else tuple(name for name in (kernel,) if name in KERNELS)
    families = [get(name) for name in names]
    if kernel == "auto":
        families = [family for family in families if not family.only_by_name_reasons()]
    runnable = [family for family in families if not family.unavailable_reasons(device)]
    served = {name for family in runnable for name in family.precisions_on(device)}
    return next((name for name in PRECISIONS if name in served), next(iter(PRECISIONS)))


def no_choice_reasons(problem: AttentionProblem) -> list[str]:
    """Why "auto" leaves everything on the device of `problem` to SDPA; [] where it chooses."""
    device = problem.query.device.type
    return [] if device in AUTO_DEVICE_TYPES else [reason("device", device, AUTO_DEVICE_TYPES)]


def candidates(problem: AttentionProblem) -> tuple[list[Kernel], dict[str, list[str]]]:
    """The kernels that can run `problem` and that "auto" may take, in its order, whatever their speed; and why
    not the others, by name."""
    runnable, refused = [], {}
    for kernel in (get(name) for name in AUTO_ORDER):
        reasons = _cannot_run_reasons(kernel, problem) or kernel.only_by_name_reasons()
        if reasons:
            refused[kernel.name] = _named(kernel.name, reasons)
        else:
            runnable.append(kernel)
    return runnable, refused


def _cannot_run_reasons(kernel: Kernel, problem: AttentionProblem) -> list[str]:
    reasons = kernel.unavailable_reasons(problem.query.device) + kernel.not_supported_reasons(problem)
    return list(dict.fromkeys(reasons))


def _named(name: str, reasons: list[str]) -> list[str]:
    return [f"{name}: {text}" for text in dict.fromkeys(reasons)]
