"""Who imports whom, and what an import brings with it."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import import_graph  # noqa: E402
from import_graph import Import  # noqa: E402


@cache
def imports() -> list[Import]:
    return import_graph.imports(import_graph.modules())


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


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert import_graph.circles(imports()) == []


def test_no_room_imports_from_one_above_it() -> None:
    assert import_graph.upward(imports()) == []


def test_imports_are_read_from_functions_and_relative_names() -> None:
    source = (
        "from ..base import Kernel\nfrom . import configs\nimport torch.fx\ndef f():\n  from a.b import c"
    )
    assert list(import_graph.imported_names(source, "sage_inductor.kernels.triton", is_package=True)) == [
        ("sage_inductor.kernels.base.Kernel", 1),
        ("sage_inductor.kernels.triton.configs", 2),
        ("torch.fx", 3),
        ("a.b.c", 5),
    ]


def test_a_circle_and_an_upward_import_are_found() -> None:
    """The two tests above can fail."""
    plan, file, report = (f"sage_inductor.{name}" for name in ("plan.plan", "plan.file", "report.report"))
    edges = [Import(plan, file, 1), Import(file, report, 2), Import(report, plan, 3)]
    assert import_graph.circles(edges) == [sorted([plan, file, report])]
    assert import_graph.upward(edges) == [Import(report, plan, 3)]
    with pytest.raises(ValueError, match="attic"):
        import_graph.upward([Import(plan, "sage_inductor.attic.box", 1)])


def test_patterns_import_only_facts_about_nodes() -> None:
    rooms = {
        import_graph.room(edge.imported)
        for edge in imports()
        if import_graph.room(edge.importer) == "patterns"
    }
    assert rooms == {"graph", "patterns", "torch_internals"}


@pytest.mark.parametrize("path", sorted((ROOT / "patterns").glob("*.py")), ids=lambda path: path.stem)
def test_patterns_import_no_library_whose_attention_they_find(path: Path) -> None:
    names = import_graph.imported_names(path.read_text(), f"sage_inductor.patterns.{path.stem}", False)
    packages = {name.split(".")[0] for name, _ in names}
    assert packages <= {"sage_inductor", "torch", *sys.stdlib_module_names}


def test_the_packages_own_folder_is_short() -> None:
    entries = {path.name for path in (ROOT / "sage_inductor").iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 20, sorted(entries)


def test_patterns_cannot_be_imported_by_the_name_of_the_folder() -> None:
    """A second copy of the patterns would be one that the pass does not use."""
    done = run("import patterns", cwd=ROOT)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ") and "Import sage_inductor.patterns" in error


def test_walking_the_package_ends() -> None:
    """torch does so for TORCH_LOGS. In a clone the root, which holds the package, is no place to look for submodules."""
    code = """
import pkgutil, sage_inductor
names = [module.name for module in pkgutil.walk_packages(sage_inductor.__path__, "sage_inductor.")]
assert "sage_inductor.rewriting.driver" in names and "sage_inductor.sage_inductor" not in names
print(len(names), sage_inductor.patterns.__path__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and str(ROOT / "patterns") in done.stdout, done.stderr
