"""What holds around a node: the SDPA backends that the user pinned, and functorch transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sage_inductor.torch_internals import allowed_sdpa_backends, is_inside_sdpa_kernel, prefers_math


@dataclass(frozen=True)
class Surroundings:
    """What holds at a point of the graph: the SDPA backends pinned there, and the functorch transforms
    entered."""

    pinned: tuple[str, ...] | None = None
    transforms: tuple[str, ...] = ()


def ambient_pin() -> tuple[str, ...] | None:
    """The SDPA backends that a surrounding `sdpa_kernel(...)` leaves, None when nothing is pinned.

    Flags of the whole process (`torch.backends.cuda.enable_math_sdp(False)`) are no choice for the code at hand: they say what
    SDPA may run where it runs."""
    found = _pin(allowed_sdpa_backends(), prefers_math())
    return found if found is not None and is_inside_sdpa_kernel() else None


def _pin(allowed: tuple[str, ...], math_first: bool) -> tuple[str, ...] | None:
    """The choice that an `sdpa_kernel(...)` of these backends makes. The math backend serves everything: who allows it beside
    a faster one leaves the choice to torch, unless it is to come first."""
    if "MATH" not in allowed:
        return allowed
    return ("MATH",) if math_first or len(allowed) == 1 else None


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
        if set(backends) == set(allowed_sdpa_backends()):  # behind a region: what it was before
            return Surroundings(ambient_pin(), around.transforms)
        has_order = len(node.args) > 1 and node.args[1] is True
        return Surroundings(_pin(backends, has_order and backends[0] == "MATH"), around.transforms)
    return around


def _backend_name(item: Any) -> str:
    """Dynamo writes a backend as a node that makes it from its name."""
    return str(item.args[0]) if isinstance(item, fx.Node) else str(getattr(item, "name", item))
