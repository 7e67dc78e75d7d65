"""Every name of torch that is not public API, in one place."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch

__all__ = [
    "compile_with_inductor",
    "configured_pre_grad_pass",
    "graph_breaks",
    "inductor_modes",
    "keep_gpu_busy",
    "outside_tracing",
    "pinned_sdpa_backends",
    "pre_grad_pass",
    "storage_id",
    "surfaced",
    "tensors_of",
    "trace_artifact",
    "without_limit_of_recompiles",
    "without_leaving_dynamo_entries",
]


def compile_with_inductor(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    """What `torch.compile(backend="inductor", mode=..., options=...)` does with a graph."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    inductor = wrapper(mode, dict(options or {}), None)
    return cast(Callable[..., Any], inductor(graph_module, example_inputs))


def inductor_modes() -> tuple[str, ...]:
    """What `torch.compile(mode=...)` takes: default, reduce-overhead, ..."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def configured_pre_grad_pass() -> Any:
    """The pass, or passes, that the user set in `torch._inductor.config.pre_grad_custom_pass`."""
    import torch._inductor.config as inductor_config

    return inductor_config.pre_grad_custom_pass


@contextmanager
def pre_grad_pass(graph_pass: Any) -> Iterator[None]:
    """Inductor runs `graph_pass` on every graph that is compiled inside."""
    import torch._inductor.config as inductor_config

    with inductor_config.patch(pre_grad_custom_pass=graph_pass):
        yield


def graph_breaks() -> int:
    """How often Dynamo has broken a graph in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def pinned_sdpa_backends() -> tuple[str, ...]:
    """Names of the SDPA backends that are enabled now, e.g. ("CUDNN_ATTENTION", "FLASH_ATTENTION", ...)."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return tuple(backend.name for backend in _cur_sdpa_kernel_backends())


@contextmanager
def outside_tracing() -> Iterator[None]:
    """Operations inside are carried out, and seen by no dispatch mode, whatever is being traced or counted around
    them; without gradients and autocast."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
        with cpu, cuda:
            yield


@contextmanager
def without_leaving_dynamo_entries() -> Iterator[None]:
    """Drops what Dynamo caches inside for code that had no entry before, so that tracing a model to look at
    it does not count against its limit of recompiles, and forgets the sizes it met: a later call of another size
    would be compiled for dynamic shapes at once. Code that is compiled already keeps its entries, and one more."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo import convert_frame
    from torch._dynamo.pgo import get_code_state

    def compiled() -> dict[int, Any]:
        codes = (reference() for reference in list(convert_frame.input_codes.seen))
        return {id(code): code for code in codes if code is not None and _debug_get_cache_entry_list(code)}

    before = compiled()
    sizes = copy.deepcopy(get_code_state())
    try:
        yield
    finally:
        get_code_state().clear()
        get_code_state().update(sizes)
        for key, code in compiled().items():
            if key not in before:
                reset_code(code)


def keep_gpu_busy(cycles: int) -> None:
    """Occupies the current stream for so many clock cycles, while the host queues work behind it: a million are about
    half a millisecond."""
    torch.cuda._sleep(cycles)


@contextmanager
def without_limit_of_recompiles() -> Iterator[None]:
    """Dynamo compiles code inside for as many shapes as it meets; at its limit (8) it would run it uncompiled."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        yield


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a structure of tuples, dicts and what else is registered with pytree, in order."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def storage_id(tensor: torch.Tensor) -> int | None:
    """The same for all tensors, fake ones too, that lie in one storage, while one of them exists; None where there is
    none to be had (a nested or sparse tensor)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def trace_artifact(name: str, make_json: Callable[[], str]) -> None:
    """Add JSON to the trace that TORCH_TRACE=folder asks for, where tlparse lists it with the graph's own artifacts."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=make_json)


def surfaced(error: Exception) -> Exception:
    """`error` in a form that leaves Dynamo as what it is. Dynamo wraps what a backend raises in
    BackendCompilerFailed, except for its own ShortenTraceback."""
    return _surfaced_type(type(error))(error)  # type: ignore[arg-type]


@cache
def _surfaced_type(error_type: type[Exception]) -> Callable[[Exception], Exception]:
    from torch._dynamo.exc import ShortenTraceback

    def __init__(self: Any, error: Exception) -> None:
        Exception.__init__(self, *error.args)
        self.__dict__.update(error.__dict__)
        self.first_useful_frame = None

    namespace = {
        "__init__": __init__,
        "__module__": error_type.__module__,
        "__reduce__": error_type.__reduce__,
    }
    return type(error_type.__name__, (error_type, ShortenTraceback), namespace)
