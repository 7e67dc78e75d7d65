"""The blocks of a model that are compiled one by one, for regional compilation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any

from torch import nn


def blocks_of(model: Callable[..., Any], regional: bool | Sequence[str | type[nn.Module]]) -> list[nn.Module]:
    """The modules that `regional` names: classes or their names, or with True those that the model names itself in
    `_repeated_blocks`; none for False. Raises ValueError where it names no module."""
    if regional is False:
        return []
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    classes = getattr(model, "_repeated_blocks", None) if regional is True else regional
    if isinstance(classes, str) or not isinstance(classes, (Iterable, NoneType)):
        raise TypeError(
            f"regional={classes!r} (valid: True, False, a tuple or list of classes or their names)"
        )
    wanted = {cls if isinstance(cls, str) else cls.__name__ for cls in classes or ()}
    blocks = [module for module in modules if wanted & {cls.__name__ for cls in type(module).__mro__}]
    if not blocks:
        counts = Counter(type(module).__name__ for module in modules)
        repeated = ", ".join(name for name, count in counts.items() if count > 1) or "none"
        raise ValueError(f"regional={regional!r} names no module (classes that repeat: {repeated})")
    return blocks
