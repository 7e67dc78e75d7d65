"""One line for the libraries in which people hold their models. A module each, imported when it is first asked for.

A module imports the library that it is named after only where it is called, so that none has to be installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_inductor.integrations import diffusers, fastvideo, xdit

__all__ = ["diffusers", "fastvideo", "xdit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} (valid: {', '.join(__all__)})")
