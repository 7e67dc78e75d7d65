"""Wheel, source distribution, `pip install .` and `pip install -e .`, each in an environment of its own.

The environments see the packages of the running one (tests/helpers/environments.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, Environment, run

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "sage_inductor", "patterns")

# Run away from the repository, so that only what was installed is found. The package is never imported by hand.
COMPILE = """
import pathlib, sys, torch

def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)

assert "sage_inductor" not in sys.modules
q, k, v = torch.randn(3, 1, 2, 24, 32).unbind(0)
with torch.no_grad():
    compiled = torch.compile(attend, backend="sage_inductor", options={"sage.kernel": "reference"}, fullgraph=True)
    out, exact = compiled(q, k, v), attend(q, k, v)
error = ((out - exact).norm() / exact.norm()).item()
assert 0 < error < 0.05, error  # 0 would be SDPA itself

import sage_inductor, sage_inductor.patterns
assert sage_inductor.patterns.ALL
print(pathlib.Path(sage_inductor.__file__).parent)
print(pathlib.Path(sage_inductor.patterns.__file__).parent)
"""


# Graphs run as they are rewritten.
WITHOUT_INDUCTOR = """
import torch
torch._TorchCompileInductorWrapper.__call__ = lambda self, graph_module, inputs: graph_module.forward
"""


def compile_in(environment: Environment, cwd: Path, before: str = "") -> list[Path]:
    """Compiles through the named backend; the folders of the package and of its patterns."""
    printed = run(environment.python, "-c", before + textwrap.dedent(COMPILE), cwd=cwd)
    return [Path(line) for line in printed.splitlines()[-2:]]


pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="environments are laid out for POSIX"),
    pytest.mark.xdist_group("packaging"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building in the repository would leave folders behind and pick up old ones."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=ignored)
        else:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it, as an installer would."""
    folder = tmp_path_factory.mktemp("distributions")
    build = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", build, "build_wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def modules() -> set[str]:
    """Every module of the repository, under the path it is installed at."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sage_inductor").rglob("*.py")}
    return own | {f"sage_inductor/{path.relative_to(ROOT)}" for path in (ROOT / "patterns").rglob("*.py")}


def test_wheel_holds_every_module_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert {name for name in names if name.endswith(".py")} == modules()
    for data in ("py.typed", "report/html/page.css", "report/html/page.js"):
        assert f"sage_inductor/{data}" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sage_inductor"}


def installed_files(environment: Environment) -> dict[str, bytes]:
    """What lies in the package's folder, and how the backend is found by its name."""
    (entry_points,) = environment.packages.glob("sage_inductor-*.dist-info/entry_points.txt")
    files = (environment.packages / "sage_inductor").rglob("*")
    found = {str(file.relative_to(environment.packages)): file for file in files if file.suffix != ".pyc"}
    found["entry points"] = entry_points
    return {name: file.read_bytes() for name, file in found.items() if file.is_file()}


def test_installed(distributions: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The wheel compiles; the source distribution and the folder leave the same files."""
    sdist, wheel = distributions
    environments = {form: Environment(tmp_path / form) for form in ("wheel", "sdist", "folder")}
    for form, what in (("wheel", wheel), ("sdist", sdist), ("folder", source)):
        environments[form].install(what)
    environment = environments["wheel"]
    (elsewhere := tmp_path / "elsewhere").mkdir()
    package, patterns = compile_in(environment, elsewhere)
    assert package == environment.packages / "sage_inductor"
    assert patterns == package / "patterns"
    expected = installed_files(environment)
    assert modules() <= set(expected)
    for form in ("sdist", "folder"):
        assert installed_files(environments[form]) == expected, form


def test_editable(source: Path, tmp_path: Path) -> None:
    """Edits count at once, of patterns too, from any folder: the repository's own hides nothing."""
    environment = Environment(tmp_path / "environment")
    copy = shutil.copytree(source, tmp_path / "repository", ignore=shutil.ignore_patterns("build"))
    environment.install("--editable", copy)
    assert compile_in(environment, tmp_path, WITHOUT_INDUCTOR) == [copy / "sage_inductor", copy / "patterns"]
    with open(copy / "patterns" / "__init__.py", "a") as patterns:
        patterns.write("\nEDITED = True\n")
    run(environment.python, "-c", "from sage_inductor.patterns import EDITED", cwd=copy)
