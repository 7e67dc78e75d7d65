"""The README's figures are those of the committed results, and its commands are the ones CI runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_figures_come_from_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_quality_figures_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "benchmarks/results/quality_minilm_cpu.json").read_text())["results"]
    assert len(results) == 6
    for row in results:
        tops = " / ".join(f"{share:.3f}" for share in row["top_overlap"].values())
        figures = f"{row['rel_l2']:.4f} | {row['max_cosine_change']:.4f} | {row['spearman']:.5f} | {tops} | {row['mrr']:.3f}"
        assert f", {row['dtype']} | {figures} |" in text, row


def test_smoothing_figures_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/quality_smollm2_cpu.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        median, largest = (f"{row[name]:.4f}".lstrip("0") for name in ("median_rel_l2", "largest_rel_l2"))
        assert f"{median} / {largest}; {row['perplexity_change']:+.2%}" in text, row


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
