"""Every name of diffusers that is not public API: the list of attention backends, and what context parallelism is made of.

The list (`AttentionBackendName`) is an Enum, which Python closes. diffusers offers no way to add to it; its dispatcher looks a
backend up by its member. So a member is added as Enum's own machinery would have made it, and taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import version
from typing import Any

from torch import nn

from sage_inductor.integrations.versions import require

SUPPORTED = ("0.36", "1")  # from the first, below the second, where they have what is used here


def dispatcher() -> Any:
    """The module of diffusers' attention dispatcher.

    Raises:
        ImportError: diffusers is not installed, or its version is not supported. Names the versions that are.
    """
    require("diffusers", *SUPPORTED)
    try:
        from diffusers.models import attention_dispatch

        registry = attention_dispatch._AttentionBackendRegistry
        missing = [
            name
            for holder, names in (
                (
                    attention_dispatch,
                    (
                        "AttentionBackendName",
                        "_templated_context_parallel_attention",
                        "TemplatedUlyssesAttention",
                    ),
                ),
                (
                    registry,
                    ("register", "_backends", "_constraints", "_supported_arg_names", "_active_backend"),
                ),
                (registry, ("_supports_context_parallel",)),
            )
            for name in names
            if not hasattr(holder, name)
        ]
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{_of_another_form()}: {error}", name="diffusers") from error
    if missing:
        raise ImportError(f"{_of_another_form()}: no {', '.join(missing)}", name="diffusers")
    return attention_dispatch


def _of_another_form() -> str:
    return (
        f"the attention dispatcher of diffusers {version('diffusers')} has another form than that of 0.36 to 0.42, which are "
        "supported"
    )


def backend_names() -> list[str]:
    """The names that `set_attention_backend` takes."""
    return [str(member.value) for member in dispatcher().AttentionBackendName]


def add_backend(name: str, attention: Callable[..., Any]) -> None:
    """Add `attention` to the dispatcher under a name that it does not have yet."""
    module = dispatcher()
    member = _extended(module.AttentionBackendName, name.upper(), name)
    registry = module._AttentionBackendRegistry
    registry.register(
        member, constraints=[module._check_device, module._check_shape], supports_context_parallel=True
    )(attention)


def replace_backend(name: str, attention: Callable[..., Any]) -> None:
    """Let a backend that `add_backend` added be another function."""
    module = dispatcher()
    module._AttentionBackendRegistry._backends[module.AttentionBackendName(name)] = attention


def remove_backend(name: str) -> None:
    """Take out what `add_backend` added. Where it was the active backend, diffusers' default is again."""
    module = dispatcher()
    registry, names = module._AttentionBackendRegistry, module.AttentionBackendName
    member = names(name)
    if registry._active_backend == member:
        registry._active_backend = names(module.DIFFUSERS_ATTN_BACKEND)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)
    registry._supports_context_parallel.discard(name)
    _shortened(names, member)


def backends_in_use(model: nn.Module) -> set[str]:
    """The names of the attention backends that `model` asks for, and of the one that is active for those that ask for none."""
    registry = dispatcher()._AttentionBackendRegistry
    asked = {
        getattr(processor, "_attention_backend", None) or registry._active_backend
        for processor in _processors(model)
    }
    return {str(getattr(backend, "value", backend)) for backend in asked}


def _processors(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_attention_backend"):
            yield processor


def context_parallel_attention() -> Callable[..., Any]:
    """diffusers' ring and Ulysses, around an attention of one rank."""
    attention: Callable[..., Any] = dispatcher()._templated_context_parallel_attention
    return attention


def ulysses_attention() -> Any:
    """diffusers' Ulysses around an attention of one rank, or one that rings: an autograd function."""
    return dispatcher().TemplatedUlyssesAttention


def parallel_degrees(parallel_config: Any) -> tuple[int, int, int]:
    """(degree of the ring, degree of Ulysses, this rank's place in the ring)."""
    config = parallel_config.context_parallel_config
    return config.ring_degree, config.ulysses_degree, config._ring_local_rank


def ring_group(parallel_config: Any) -> Any:
    """The process group of the ranks of this one's ring, in the order of their parts."""
    return parallel_config.context_parallel_config._ring_mesh.get_group()


def ulysses_group(parallel_config: Any) -> tuple[Any, int]:
    """The process group of the ranks that exchange heads with this one, and its place among them."""
    config = parallel_config.context_parallel_config
    return config._ulysses_mesh.get_group(), config._ulysses_local_rank


def parts_differ(parallel_config: Any) -> str | None:
    """The option by which ranks may hold parts of different lengths, or of heads (`ring_anything` and `ulysses_anything`, in newer
    versions), if one is on."""
    config = parallel_config.context_parallel_config
    names = ("ring_anything", "ulysses_anything")
    return next((name for name in names if getattr(config, name, False)), None)


def parallel_group(parallel_config: Any) -> Any:
    """The process group of all ranks that share a sequence, in the order of their parts."""
    return parallel_config.context_parallel_config._flattened_mesh.get_group()


def _extended(names: Any, name: str, value: str) -> Any:
    """A new member of the Enum of strings `names`."""
    member = str.__new__(names, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    names._member_names_.append(name)
    names._member_map_[name] = member
    names._value2member_map_[value] = member
    if isinstance(known := getattr(names, "_hashable_values_", None), list):  # from Python 3.12 on
        known.append(value)
    type.__setattr__(names, name, member)
    return member


def _shortened(names: Any, member: Enum) -> None:
    """Undo `_extended`."""
    names._member_names_.remove(member.name)
    del names._member_map_[member.name]
    del names._value2member_map_[member.value]
    if isinstance(known := getattr(names, "_hashable_values_", None), list):
        known.remove(member.value)
    type.__delattr__(names, member.name)
