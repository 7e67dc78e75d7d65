"""Who imports whom, and what an import brings with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = sorted((ROOT / "patterns").rglob("*.py"))
KERNELS = sorted((ROOT / "sage_inductor" / "kernels").rglob("*.py"))
BELOW_KERNELS = ("sage_inductor.kernels", "sage_inductor.reference", "sage_inductor.errors")


def module_name(path: Path) -> str:
    """The module's name, a package's own being that of its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("sage_inductor", *parts) if parts[0] == "patterns" else parts)


def modules_imported(source: str, module: str) -> Iterator[str]:
    """Absolute names of all that `module` imports, inside functions too.

    `from package import name` gives `package.name`: the name can be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def outside(imported: Iterator[str], allowed: tuple[str, ...]) -> list[str]:
    return [
        name for name in imported if not any((name + ".").startswith(package + ".") for package in allowed)
    ]


def run(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_loads_no_kernel_package(tmp_path: Path) -> None:
    """Nor torch's compiler, which imports Triton where it is installed."""
    code = """
import sys, sage_inductor
heavy = ("triton", "sageattention", "torch._dynamo", "torch._inductor")
print(sorted(name for name in sys.modules if name in heavy))
"""
    done = run(code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_import_needs_no_kernel_package(tmp_path: Path) -> None:
    """CPU builds of torch come without Triton, and neither package is there but on Linux."""
    code = """
import sys
sys.modules.update(triton=None, sageattention=None)  # importing them fails
import torch, sage_inductor
x = torch.randn(1, 2, 8, 16)
print(sage_inductor.sage_attention(x, x, x, kernel="reference").shape)
"""
    done = run(code, cwd=tmp_path)
    assert done.stdout == "torch.Size([1, 2, 8, 16])\n", done.stdout + done.stderr


def test_relative_imports_are_resolved() -> None:
    source = "from ..base import Kernel\nfrom . import tuning\nimport torch.fx\ndef f():\n  from a.b import c"
    assert list(modules_imported(source, "sage_inductor.kernels.triton.__init__")) == [
        "sage_inductor.kernels.base.Kernel",
        "sage_inductor.kernels.triton.tuning",
        "torch.fx",
        "a.b.c",
    ]
    assert outside(
        iter(["sage_inductor.call.Pattern", "sage_inductor.callback"]), ("sage_inductor.call",)
    ) == ["sage_inductor.callback"]


@pytest.mark.parametrize("path", PATTERNS, ids=module_name)
def test_patterns_import_only_the_call_record_and_each_other(path: Path) -> None:
    allowed = ("sage_inductor.call", "sage_inductor.patterns", "torch", *sys.stdlib_module_names)
    assert outside(modules_imported(path.read_text(), module_name(path)), allowed) == []


@pytest.mark.parametrize("path", KERNELS, ids=module_name)
def test_kernels_import_nothing_above_them(path: Path) -> None:
    imported = modules_imported(path.read_text(), module_name(path))
    own_package = (name for name in imported if name.split(".")[0] in ("sage_inductor", "patterns"))
    assert outside(own_package, BELOW_KERNELS) == []


def test_patterns_cannot_be_imported_by_the_name_of_the_folder() -> None:
    """A second copy of the patterns would be one that the pass does not use."""
    done = run("import patterns", cwd=ROOT)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ") and "Import sage_inductor.patterns" in error
