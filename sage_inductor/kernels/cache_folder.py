"""The folder in which the package keeps measured times and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/sage_inductor`, or `~/.cache/sage_inductor`. Raises RuntimeError where there is no home folder, or where
    it is a relative path."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else expanded("~") / ".cache") / "sage_inductor"


def expanded(folder: str) -> Path:
    """`folder`, with the home folder for a leading "~". Raises RuntimeError as `default_folder` does."""
    path = Path(folder).expanduser()
    if folder.startswith("~") and not path.is_absolute():
        raise RuntimeError(f"the home folder is a relative path: {path}")
    return path
