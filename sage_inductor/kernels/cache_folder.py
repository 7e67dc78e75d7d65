"""Where the package keeps what it would otherwise work out again."""

from __future__ import annotations

import os
from pathlib import Path


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/sage_inductor`, or `~/.cache/sage_inductor`. RuntimeError where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sage_inductor"
