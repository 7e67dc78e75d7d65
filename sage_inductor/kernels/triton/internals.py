"""Every name of Triton that is not public API, in one place."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import triton
from triton.runtime.errors import OutOfResources

__all__ = [
    "DirectLaunch",
    "OutOfResources",
    "constexpr_function",
    "current_stream",
    "direct_launch",
    "has_hooks",
    "interprets",
]

constexpr_function = triton.constexpr_function
"""A decorator of functions that kernels call while they are compiled, on constexprs; triton has it from 3.5 on."""


def interprets() -> bool:
    """Whether kernels that are decorated now run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def current_stream(index: int | None) -> int:
    """The handle of the current stream of CUDA device `index`."""
    return int(triton.runtime.driver.active.get_current_stream(index))


def has_hooks() -> bool:
    """Whether somebody, a profiler, wants to hear of launches."""
    runtime = triton.knobs.runtime
    return _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook)


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


@dataclass(frozen=True, eq=False)
class DirectLaunch:
    """What Triton itself launches a compiled kernel with.

    `run(programs, 1, 1, stream, function, metadata, *hooks, *arguments)` takes three hooks, which may be None, and tensor
    descriptors as `encode` gives them for each of `descriptors`; there is no `encode` where there is nothing to encode.
    """

    run: Callable[..., None]
    function: int
    metadata: Any
    encode: Callable[[Any, Any], list[Any]] | None
    descriptors: Any


# Of CudaLauncher.__call__ in Triton 3.6 and 3.7. The two take the same arguments.
_KNOWN_PARAMETERS = (
    "self, gridX, gridY, gridZ, stream, function, args",
    "self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook, "
    "launch_exit_hook, args",
)


def direct_launch(compiled: Any) -> DirectLaunch | None:
    """None where this version of Triton is built otherwise, as 3.9 is where descriptors are encoded."""
    run = getattr(compiled, "run", None)
    if run is None or ", ".join(inspect.signature(type(run).__call__).parameters) not in _KNOWN_PARAMETERS:
        return None
    descriptors = getattr(compiled.metadata, "tensordesc_meta", None)
    if not descriptors:
        return DirectLaunch(run, compiled.function, compiled.packed_metadata, None, None)
    from triton.backends.nvidia import driver

    # `run.launch` encodes descriptors at each launch, by the function below, and calls what is in its closure.
    encode = getattr(driver, "make_tensordesc_arg", None)
    wrapped = inspect.getclosurevars(run.launch).nonlocals.get("launcher")
    if (
        encode is None
        or wrapped is None
        or tuple(inspect.signature(encode).parameters) != ("arg", "metadata")
    ):
        return None
    run = copy(run)
    run.launch = wrapped
    return DirectLaunch(run, compiled.function, compiled.packed_metadata, encode, descriptors)
