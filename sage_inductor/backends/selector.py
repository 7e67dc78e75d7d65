"""The choice of a backend for a layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TypeAlias

import torch

from sage_inductor import kernels
from sage_inductor.backends.abstract import AttentionBackend
from sage_inductor.backends.sage import SageAttentionBackend
from sage_inductor.backends.sdpa import SDPABackend
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.arguments import as_number
from sage_inductor.kernels.base import reason

log = logging.getLogger(__name__)

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.get_name(): backend for backend in (SageAttentionBackend, SDPABackend)
}
# The automatic choice is made for a self-attention of this length, as diffusion models have it. kernel="auto" then decides
# each call, because SDPA may win shorter ones.
TYPICAL_LENGTH = 16384

BackendLike: TypeAlias = str | Enum | type[AttentionBackend]


def get_attn_backend(
    head_size: int,
    dtype: torch.dtype,
    supported_attention_backends: Sequence[BackendLike] | None = None,
    default_backend: BackendLike | None = None,
    *,
    requested: BackendLike | None = None,
) -> type[AttentionBackend]:
    """The backend class for layers of `head_size` and `dtype` on the current device.

    A backend is named by string ("SAGE_ATTN", "TORCH_SDPA"), by an enum member of that name, or by its class.

    Args:
        head_size: size of the last dim of query, key and value.
        dtype: their dtype.
        supported_attention_backends: the backends that the layer allows; None for all. Names of other packages'
            backends may be among them.
        default_backend: the backend to take when none is requested, if it can run here.
        requested: taken or refused, never replaced. Where it is None, `default_backend` is taken; else SAGE_ATTN, if
            "auto" would choose a kernel for a long self-attention on this machine; else TORCH_SDPA.

    Raises:
        NotEligibleError: SAGE_ATTN is requested and no kernel can run this head_size and dtype here; or it is the only
            backend that the layer allows, and "auto" would choose no kernel. It has the reasons of the kernels.
        ValueError: a head_size or dtype that is none; an unknown backend, one that the layer does not support, or none left.
    """
    head_size = as_number(head_size)
    if not isinstance(head_size, int) or isinstance(head_size, bool) or head_size < 1:
        raise ValueError(f"head_size={head_size!r} (valid: an int from 1)")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} (valid: a torch.dtype)")
    allowed = _allowed(supported_attention_backends)
    if requested is not None:
        backend = _known(requested, "requested")
        if backend not in allowed:
            names = ", ".join(other.get_name() for other in allowed)
            raise ValueError(f"requested={backend.get_name()} (supported by the layer: {names})")
        reasons = _unservable_reasons(backend, head_size, dtype)
        if reasons:
            raise NotEligibleError(f"requested={backend.get_name()}", reasons)
        return backend
    if default_backend is not None:
        backend = _known(default_backend, "default_backend")
        reasons = _unservable_reasons(backend, head_size, dtype)
        if backend in allowed and not reasons:
            return backend
        why = "; ".join(reasons) or "the layer does not support it"
        log.debug("default_backend=%s not taken: %s", backend.get_name(), why)
    if SageAttentionBackend in allowed:
        precision = kernels.precision_on(_current_device(), "auto")
        kernel, reasons = kernels.select(_typical_problem(head_size, dtype, precision), "auto")
        if kernel is not None:
            return SageAttentionBackend
        log.debug("SAGE_ATTN not chosen: %s", "; ".join(reasons))
        if SDPABackend not in allowed:
            raise NotEligibleError("SAGE_ATTN, the only backend the layer supports", reasons)
    return SDPABackend


def _name(backend: BackendLike) -> str:
    if isinstance(backend, type) and issubclass(backend, AttentionBackend):
        return backend.get_name()
    return backend.name if isinstance(backend, Enum) else str(backend).strip().upper()


def _known(backend: BackendLike, argument: str) -> type[AttentionBackend]:
    name = _name(backend)
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} (valid: {', '.join(BACKENDS)})")
    return BACKENDS[name]


def _allowed(supported: Sequence[BackendLike] | None) -> list[type[AttentionBackend]]:
    if supported is None:
        return list(BACKENDS.values())
    if isinstance(supported, str) or not isinstance(supported, Iterable):
        raise ValueError(f"supported_attention_backends={supported!r} (valid: a list of backends)")
    names = [_name(backend) for backend in supported]
    allowed = [backend for name, backend in BACKENDS.items() if name in names]
    if not allowed:
        valid = ", ".join(BACKENDS)
        raise ValueError(f"supported_attention_backends={names} (valid: at least one of {valid})")
    return allowed


def _unservable_reasons(backend: type[AttentionBackend], head_size: int, dtype: torch.dtype) -> list[str]:
    """Why `backend` cannot run layers of this head_size and dtype here at any precision. Empty when it can."""
    if backend is not SageAttentionBackend:
        return []
    device = _current_device()
    if device.type not in kernels.AUTO_DEVICE_TYPES:  # Triton's CPU interpreter is not for use
        return [reason("device", device.type, kernels.AUTO_DEVICE_TYPES)]
    reasons = []
    for name in kernels.AUTO_ORDER:
        found = [
            kernels.select(_typical_problem(head_size, dtype, precision), name)[1]
            for precision in kernels.get(name).precisions
        ]
        if not all(found):
            return []
        reasons += [f"{name}: {text}" for text in found[0]]
    return reasons


def _current_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _typical_problem(head_size: int, dtype: torch.dtype, precision: str) -> AttentionProblem:
    shape = (1, 8, TYPICAL_LENGTH, head_size)
    stride = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    tensor = TensorSpec(shape, stride, dtype, _current_device())
    return AttentionProblem(tensor, tensor, tensor, None, AttentionParams(precision=precision))
