"""Checks of what callers pass. Errors name the argument, the value and what is valid."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_choice(name: str, value: object, valid: Collection[str]) -> None:
    """Raise ValueError for a `value` that is none of `valid`. One of another type is compared with none of them: arrays compare
    element by element."""
    if not isinstance(value, str) or value not in tuple(valid):
        raise ValueError(f"{name}={value!r} (valid: {', '.join(valid)})")


def check_tensor(name: str, value: object, optional: bool = False) -> None:
    """Raise TypeError for a `value` that is no tensor, unless it is None and may be."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name} is a {type(value).__name__} (valid: a tensor{', None' if optional else ''})")


def as_number(value: Any) -> Any:
    """A number of another kind as Python's: NumPy's scalars, tensors without dims, fractions. Anything else as it is."""
    if isinstance(value, (int, float)):  # so are a trace's symbols in Dynamo
        return value
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        return value.item()
    return float(value) if isinstance(value, Real) else value


def as_scale(scale: Any) -> Any:
    """`scale` as a number of Python, or None. Raises TypeError for anything else."""
    number = as_number(scale)
    if number is not None and not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale={scale!r} (valid: a number, None)")
    return number


def as_flag(name: str, value: Any) -> Any:
    """`value` as a bool, or as the symbol of one that it is; None is False, 0 and 1 are what they stand for. Raises ValueError for
    anything else: a text such as "no" would be true."""
    if isinstance(value, (bool, torch.SymBool)):
        return value
    number = as_number(value)
    if number is None or (isinstance(number, (bool, int, float)) and number in (0, 1)):
        return bool(number)
    raise ValueError(f"{name}={value!r} (valid: True, False)")
