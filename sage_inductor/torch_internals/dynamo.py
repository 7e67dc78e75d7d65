"""Dynamo: who compiles what for whom, when, and what it reports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch


def listen_to_compiles(starts: Callable[[str], None], ends: Callable[[str], None]) -> None:
    """Dynamo calls `starts` and `ends` around every compile, in the thread that compiles, with its number: "3/1" is the second
    compile of the fourth piece of code. `torch._dynamo.reset()` forgets them."""
    from torch._dynamo.callback import callback_handler

    def on_start(args: Any) -> None:
        starts(str(args.compile_id))

    on_start.listener = starts  # type: ignore[attr-defined]
    callback_handler.register_start_callback(on_start)
    callback_handler.register_end_callback(lambda args: ends(str(args.compile_id)))


def listens_to_compiles(starts: Callable[[str], None]) -> bool:
    """Whether Dynamo still calls `starts`."""
    from torch._dynamo.callback import callback_handler

    return any(getattr(callback, "listener", None) is starts for callback in callback_handler.start_callbacks)


def dynamo_is_compiling() -> bool:
    """Whether Dynamo is compiling on this thread: what is called around it is what it compiles."""
    from torch._guards import CompileContext

    return CompileContext.current_compile_id() is not None


def inside_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself."""
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(inside, torch.nn.Module) else model


def traced_for() -> Any:
    """The backend that Dynamo traces for on this thread, out of what torch.compile wraps it in; None where nothing is traced."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # no translator is at work
        return None
    wrapper: Any = torch._TorchCompileWrapper
    while True:
        if hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, wrapper):
            backend = backend.compiler_fn
        else:
            return backend


def ends_its_frame(graph_module: torch.fx.GraphModule | None) -> bool:
    """Whether this graph of Dynamo's goes on to where the function returns, and is not cut off by a break."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


def graph_breaks() -> int:
    """How often Dynamo has broken a graph in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


@contextmanager
def without_limit_of_recompiles() -> Iterator[None]:
    """Dynamo compiles code inside for as many shapes as it meets; at its limit (8) it would run it uncompiled."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        yield


@contextmanager
def compiled_one_by_one(modules: Sequence[torch.nn.Module], **compile_args: Any) -> Iterator[None]:
    """Inside, calls of these modules are compiled, as `module.compile(**compile_args)` does for good."""
    before = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module.compile(**compile_args)
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            module._compiled_call_impl = call


def compiled_calls(modules: Sequence[torch.nn.Module], **compile_args: Any) -> list[Callable[..., Any]]:
    """What `module.compile(**compile_args)` would let each module's calls be; the modules stay as they are."""
    with compiled_one_by_one(modules, **compile_args):
        return cast(list[Callable[..., Any]], [module._compiled_call_impl for module in modules])


@contextmanager
def called_by(
    modules: Sequence[torch.nn.Module], calls: Sequence[Callable[..., Any] | None]
) -> Iterator[None]:
    """Inside, calls of each module go to its own of `calls`, which `compiled_calls` gave; None: to no compiled code."""
    before = [module._compiled_call_impl for module in modules]
    try:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            module._compiled_call_impl = call


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


def trace_artifact(name: str, make_json: Callable[[], str]) -> None:
    """Add JSON to the trace that TORCH_TRACE=folder asks for, where tlparse lists it with the graph's own artifacts."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=make_json)
