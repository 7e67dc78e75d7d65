"""Where the package keeps what it would otherwise work out again."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/sage_inductor`, or `~/.cache/sage_inductor`. RuntimeError where there is no home, or one that
    depends on the working directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else expanded("~") / ".cache") / "sage_inductor"


def expanded(folder: str) -> Path:
    """`folder`, with the home folder for a leading "~". RuntimeError where there is none, as above."""
    path = Path(folder).expanduser()
    if folder.startswith("~") and not path.is_absolute():
        raise RuntimeError(f"the home folder is a relative path: {path}")
    return path
