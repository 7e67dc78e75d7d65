"""The README's figures are those of the committed results, and its commands are the ones CI runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_figures_come_from_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_option_and_kernel_is_in_the_readme() -> None:
    from dataclasses import fields

    from sage_inductor import Config, kernels

    text = (ROOT / "README.md").read_text()
    for name in [field.name for field in fields(Config)] + list(kernels.KERNELS) + list(kernels.PRECISIONS):
        assert f"`{name}`" in text, name


def test_every_command_is_in_the_readme() -> None:
    from sage_inductor.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"python -m sage_inductor {name} " in text, name
