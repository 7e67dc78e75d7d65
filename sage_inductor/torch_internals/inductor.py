"""Inductor: a compile by it, its modes, and the passes that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch


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


def passes_of(backend: Any) -> list[Any]:
    """The passes that Inductor, if `backend` is Inductor, runs before gradients are taken: its options' and the configured."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    if not isinstance(backend, wrapper):
        return []
    found = [backend.config.get("pre_grad_custom_pass"), configured_pre_grad_pass()]
    return [each for item in found for each in (item if isinstance(item, (list, tuple)) else [item])]


if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
else:

    def __getattr__(name: str) -> Any:
        """`CustomGraphPass`, whose import brings Inductor, and with it triton."""
        if name != "CustomGraphPass":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from torch._inductor.custom_graph_pass import CustomGraphPass

        return CustomGraphPass
