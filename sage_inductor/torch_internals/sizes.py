"""Symbolic sizes and numbers: what is known of them, without a guard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def expression(size: torch.SymInt) -> Any:
    """What tracing knows `size` to be, as a sympy expression (or a number). Max(1, x), which strides of symbolic sizes hold,
    is x: they differ where a tensor is empty, and its strides say nothing."""
    from torch.utils._sympy.functions import Max

    found: Any = getattr(size.node, "expr", size)  # a jagged length has none, and compares by what it is
    if found is size or isinstance(found, int):
        return found
    if found.is_number:
        return int(found)
    if not found.has(Max):
        return found
    return found.replace(
        lambda part: isinstance(part, Max) and len(part.args) == 2 and 1 in part.args,
        lambda part: next(argument for argument in part.args if argument != 1),
    )


def is_always_true(condition: bool | torch.SymBool) -> bool:
    """Whether `condition` holds for all inputs that the trace serves, as far as is known; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def bounds_of(size: Any, shape_env: Any) -> tuple[int | None, int | None]:
    """The least and the most that a sympy expression of symbolic sizes can be; None where there is no bound. Adds no guard."""
    found = shape_env.bound_sympy(size)
    lower, upper = (int(end) if end.is_Integer else None for end in (found.lower, found.upper))
    return lower, upper


def shape_env_of(size: torch.SymInt) -> Any:
    """Where the bounds of symbolic sizes are known."""
    return size.node.shape_env


def is_backed(size: int | torch.SymInt) -> bool:
    """Whether the inputs of a graph tell `size`; a size that only the data tell is not."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, int) or not free_unbacked_symbols(size)


def hinted(size: torch.SymInt, instead: int) -> int:
    """`size` with the values that it was traced with, and `instead` for each that only the data tell; adds no guard."""
    found, shape_env = size.node.expr, size.node.shape_env
    # The first name is that of torch 2.13 and newer.
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    values = getattr(shape_env, name, {})
    return int(found.xreplace({symbol: values.get(symbol, instead) for symbol in found.free_symbols}))


def number_of(value: Any) -> Any:
    """The number that a symbolic float is known to be, as where it was specialised to what it was traced with: dropout_p of
    SDPA is, always. `value` itself where there is none; adds no guard."""
    expression: Any = getattr(getattr(value, "node", None), "expr", None)
    return float(expression) if getattr(expression, "is_number", False) else value


@contextmanager
def without_guards(fake_mode: Any) -> Iterator[None]:
    """Operations inside on traced tensors of `fake_mode` leave no guards on symbolic sizes. Nor are their results kept: the
    mode's cache would spare the same operations the guards that they need when the graph itself is traced."""
    caches, fake_mode.cache_enabled = fake_mode.cache_enabled, False
    try:
        with fake_mode, fake_mode.shape_env.suppress_guards():
            yield
    finally:
        fake_mode.cache_enabled = caches
