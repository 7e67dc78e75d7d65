"""The surroundings of a node: SDPA backends that the user pinned, functorch transforms, and autocast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sage_inductor.torch_internals.sdpa import allowed_sdpa_backends, is_inside_sdpa_kernel, prefers_math


@dataclass(frozen=True)
class Surroundings:
    """What surrounds a point of the graph: the SDPA backends pinned there, and the functorch transforms, levels of forward-mode AD
    among them, and autocast regions that were entered before it."""

    pinned: tuple[str, ...] | None = None
    transforms: tuple[str, ...] = ()
    own_gradients: bool = False
    """Whether this is the forward or the backward of a `torch.autograd.Function` whose gradients are wanted."""
    autocast: tuple[tuple[str, torch.dtype | None], ...] = ()
    """(device type, dtype that it casts to, None where it is off) of each autocast region, the innermost last."""

    @classmethod
    def ambient(cls) -> Surroundings:
        """The surroundings of the whole graph, by torch's settings while it is being compiled."""
        on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        return cls(ambient_pin(), autocast=tuple((device, torch.get_autocast_dtype(device)) for device in on))

    def joined(self, other: Surroundings) -> Surroundings:
        """These, with all of `other` that speaks against a kernel: one graph is run in both. Autocast is none of it; Dynamo has
        traced the operations of one."""
        return replace(
            self,
            pinned=other.pinned if self.pinned is None else self.pinned,
            transforms=self.transforms or other.transforms,
            own_gradients=self.own_gradients or other.own_gradients,
        )

    def autocast_dtype(self, device_type: str) -> torch.dtype | None:
        """The dtype that autocast casts to there, None where it does not."""
        return next((dtype for device, dtype in reversed(self.autocast) if device == device_type), None)


def ambient_pin() -> tuple[str, ...] | None:
    """The SDPA backends that a surrounding `sdpa_kernel(...)` leaves; None when nothing is pinned.

    Flags of the whole process, as `torch.backends.cuda.enable_math_sdp(False)` sets, pin nothing: they limit SDPA where it
    runs, and are no choice for the code at hand.
    """
    found = _pin(allowed_sdpa_backends(), prefers_math())
    return found if found is not None and is_inside_sdpa_kernel() else None


def _pin(allowed: tuple[str, ...], math_first: bool) -> tuple[str, ...] | None:
    """The backends that an `sdpa_kernel(...)` of `allowed` pins; None where it leaves the choice to torch. That is so where the
    math backend, which serves everything, is allowed beside a faster one and is not to come first."""
    if "MATH" not in allowed:
        return allowed
    return ("MATH",) if math_first or len(allowed) == 1 else None


def enter(node: fx.Node, around: Surroundings) -> Surroundings:
    """The surroundings after `node`, which may open or close a transform or an `sdpa_kernel` region."""
    if node.op != "call_function":
        return around
    name = getattr(node.target, "__name__", "")
    if name.endswith("_increment_nesting"):
        transform = name.removeprefix("_").removesuffix("_increment_nesting")
        return replace(around, transforms=(*around.transforms, transform))
    if name.endswith("_decrement_nesting"):
        return replace(around, transforms=around.transforms[:-1])
    if name == "_enter_dual_level":  # forward-mode AD: tensors may carry tangents
        return replace(around, transforms=(*around.transforms, "dual_level"))
    if name == "_exit_dual_level":
        return replace(around, transforms=around.transforms[:-1])
    if name == "_sdpa_kernel":
        backends = tuple(_backend_name(item) for item in node.args[0])  # type: ignore[union-attr]
        if set(backends) == set(allowed_sdpa_backends()):  # the end of a region restores the state before it
            return replace(around, pinned=ambient_pin())
        has_order = len(node.args) > 1 and node.args[1] is True
        return replace(around, pinned=_pin(backends, has_order and backends[0] == "MATH"))
    if name == "_enter_autocast":
        return _under_autocast(node, around)
    if name == "_exit_autocast":
        return replace(around, autocast=around.autocast[:-1])
    return around


def inside(node: fx.Node, around: Surroundings) -> Surroundings:
    """The surroundings within the graph that `node` refers to, which an exported program may run under autocast."""
    for user in node.users:
        name = getattr(user.target, "__name__", "")
        if name == "wrap_with_autocast":
            return _under_autocast(user, around)
        if name == "autograd_function_apply":  # of no_grad code, Dynamo traces the forward alone
            return replace(around, own_gradients=True)
    return around


def _under_autocast(node: fx.Node, around: Surroundings) -> Surroundings:
    """`around` in the autocast region that `node` opens; its first arguments are device type, dtype and whether it is
    on."""
    device, dtype, on = node.args[:3]
    wanted = (
        (dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))) if on else None
    )
    return replace(around, autocast=(*around.autocast, (str(device), wanted)))


def _backend_name(item: Any) -> str:
    """Dynamo writes a backend as a node that makes it from its name."""
    return str(item.args[0]) if isinstance(item, fx.Node) else str(getattr(item, "name", item))
