"""Other libraries' ways of choosing attention, a library a module.

A module is imported when it is first asked for, as `sage_inductor.integrations.diffusers` or by an import, and imports its
library when one of its functions is called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_inductor.integrations import diffusers, fastvideo, transformers, xdit

__all__ = ["diffusers", "fastvideo", "transformers", "xdit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} (valid: {', '.join(__all__)})")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
