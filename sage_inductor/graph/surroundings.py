"""What holds around a node: the SDPA backends that the user pinned, and functorch transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sage_inductor.torch_internals import pinned_sdpa_backends


@dataclass(frozen=True)
class Surroundings:
    """What holds at a point of the graph: the SDPA backends pinned there, and the functorch transforms
    entered."""

    pinned: tuple[str, ...] | None = None
    transforms: tuple[str, ...] = ()


def ambient_pin() -> tuple[str, ...] | None:
    """The SDPA backends a surrounding `sdpa_kernel(...)` leaves, None when nothing is pinned."""
    return _pin(pinned_sdpa_backends())


def _pin(enabled: tuple[str, ...]) -> tuple[str, ...] | None:
    """The math backend serves everything, so only an explicit choice ever excludes it, or leaves it alone: who allows it
    beside a faster one leaves the choice to torch."""
    return None if "MATH" in enabled and len(enabled) > 1 else enabled


def enter(node: fx.Node, around: Surroundings) -> Surroundings:
    """The surroundings behind `node`, which may open or close a transform or an `sdpa_kernel` region."""
    if node.op != "call_function":
        return around
    name = getattr(node.target, "__name__", "")
    if name.endswith("_increment_nesting"):
        transform = name.removeprefix("_").removesuffix("_increment_nesting")
        return Surroundings(around.pinned, (*around.transforms, transform))
    if name.endswith("_decrement_nesting"):
        return Surroundings(around.pinned, around.transforms[:-1])
    if name == "_sdpa_kernel":
        backends = tuple(_backend_name(item) for item in node.args[0])  # type: ignore[union-attr]
        return Surroundings(_pin(backends), around.transforms)
    return around


def _backend_name(item: Any) -> str:
    """Dynamo writes a backend as a node that makes it from its name."""
    return str(item.args[0]) if isinstance(item, fx.Node) else str(getattr(item, "name", item))
