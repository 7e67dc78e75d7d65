"""SDPA: the builtin, its kernels, and what a process has told torch about them."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, GeneratorType
from typing import Any, cast

import torch


def _builtin_sdpa() -> Callable[..., torch.Tensor]:
    names = (torch._C._nn, torch.nn.functional)
    found = (getattr(namespace, "scaled_dot_product_attention", None) for namespace in names)
    builtin = next((function for function in found if isinstance(function, BuiltinFunctionType)), None)
    # Where both names are taken, the operator that the builtin calls.
    return torch.ops.aten.scaled_dot_product_attention.default if builtin is None else builtin


# `F.scaled_dot_product_attention` as torch brings it. People put functions of their own in that name's place (SageAttention's
# users `sage_attention` itself, torch's context_parallel a wrapper), before or after this package is loaded; graphs
# hold the builtin all the same, since Dynamo traces through Python functions, and exact attention is what it computes.
builtin_sdpa: Callable[..., torch.Tensor] = _builtin_sdpa()


def allowed_sdpa_backends() -> tuple[str, ...]:
    """Names of the SDPA backends that are enabled now, e.g. ("CUDNN_ATTENTION", "FLASH_ATTENTION", ...)."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return tuple(backend.name for backend in _cur_sdpa_kernel_backends())


def prefers_math() -> bool:
    """Whether SDPA's math backend comes first, which `sdpa_kernel([MATH, ...], set_priority=True)` asks for."""
    from torch.nn.attention import SDPBackend

    return bool(_sdpa_priority()[:1] == [int(cast(Any, SDPBackend.MATH))])


def _sdpa_priority() -> list[int]:
    order = getattr(torch._C, "_get_sdp_priority_order", list)
    return [int(backend) for backend in order()]


def is_inside_sdpa_kernel() -> bool:
    """Whether a `with sdpa_kernel(...)` is open in this process.

    It sets the flags that `torch.backends.cuda.enable_math_sdp(False)` and its like set, and leaves nothing else behind that
    would tell it from them, but itself: a generator that waits to be resumed. To look for it takes as long as a collection of
    garbage."""
    import gc
    import inspect

    from torch.nn.attention import sdpa_kernel

    code = inspect.unwrap(sdpa_kernel).__code__
    return any(
        type(item) is GeneratorType
        and item.gi_code is code
        and inspect.getgeneratorstate(item) == inspect.GEN_SUSPENDED
        for item in gc.get_objects()
    )


def ambient_settings() -> dict[str, Any]:
    """What this process has told torch about attention: all that changes which kernel SDPA runs, how fast it is or what it
    computes, beside its inputs. JSON."""
    from torch import nn

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    flash = getattr(nn.attention, "current_flash_attention_impl", None)  # torch 2.11 may lack it
    return {
        "backends": sorted(allowed_sdpa_backends()),
        "priority": _sdpa_priority(),
        "flash": None if flash is None else str(flash()),
        "cudnn": {
            name: _setting(lambda name=name: getattr(cudnn, name))  # type: ignore[misc]
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
        "math": _setting(cuda.fp16_bf16_reduction_math_sdp_allowed),
        "float16": _setting(lambda: cuda.matmul.allow_fp16_reduced_precision_reduction),
        "bfloat16": _setting(lambda: cuda.matmul.allow_bf16_reduced_precision_reduction),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def autocast_dtypes() -> dict[str, str]:
    """The dtype that autocast casts to, by type of device, where it is on."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return {device: str(torch.get_autocast_dtype(device)) for device in devices}


def float32_precision() -> str:
    """ "highest", "high" or "medium", or "mixed" where single operations have their own."""
    return _setting(torch.get_float32_matmul_precision)


def _setting(read: Callable[[], Any]) -> str:
    try:
        return str(read())
    except (
        RuntimeError
    ):  # set for single operations, by torch's newer interface, which the older one cannot say
        return "mixed"


def keep_gpu_busy(cycles: int) -> None:
    """Occupies the current stream for so many clock cycles, while the host queues work behind it: a million are about
    half a millisecond."""
    torch.cuda._sleep(cycles)
