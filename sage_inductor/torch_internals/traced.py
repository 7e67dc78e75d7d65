"""Traced graphs, modules and tensors: what they are, and which belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


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


def first_fake(values: Sequence[Any]) -> Any:
    """The first fake tensor among `values`; None where there is none."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value for value in values if isinstance(value, FakeTensor)), None)


def fake_mode_of(value: Any) -> Any:
    """The fake mode that `value` was traced in, of a DTensor that of its local tensor; None where there is none."""
    return getattr(getattr(value, "_local_tensor", value), "fake_mode", None)


def is_erased(node: torch.fx.Node) -> bool:
    """Whether `node` is no longer in its graph."""
    return node._erased


def children_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Submodules by their names; one that is held under two names comes twice, as in `named_children` it does not."""
    return ((name, child) for name, child in module._modules.items() if child is not None)
