"""What is in the distributions, beside what tests/packaging/test_packaging.py installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sage_inductor
from sage_inductor.tuning.machine import digest, source_files

ROOT = Path(__file__).resolve().parents[2]
LEFT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "results", ".*cache"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "sage_inductor"
    shutil.copytree(ROOT, folder, ignore=LEFT)
    return folder


def built(sources: Path, what: str) -> Path:
    hook = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", hook], cwd=sources, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return sources / "dist" / done.stdout.split()[-1]


def test_a_wheel_holds_no_modules_of_an_earlier_build(sources: Path) -> None:
    stale = sources / "build" / "lib" / "sage_inductor"
    stale.mkdir(parents=True)
    (stale / "walk.py").write_text("raise ImportError\n")
    names = zipfile.ZipFile(built(sources, "wheel")).namelist()
    assert "sage_inductor/walk.py" not in names and "sage_inductor/rewriting/driver.py" in names
    assert "sage_inductor/patterns/__init__.py" in names
    assert any(name.startswith(f"sage_inductor-{sage_inductor.__version__}.dist-info/") for name in names)


def test_a_source_distribution_holds_what_its_tests_share(sources: Path) -> None:
    with tarfile.open(built(sources, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "tests/helpers/zoo.py", "tests/constraints.txt", "setup.py"} <= names
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("*.py")} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_package_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel on sys.path: its patterns are found in it, and keys of caches go by its bytes."""
    finder = sage_inductor._PatternsBesideTheSources()
    monkeypatch.setattr(sage_inductor, "_PATTERNS", ROOT / "patterns")
    assert finder.find_spec("sage_inductor.patterns") is not None
    wheel = tmp_path / "package.whl"
    monkeypatch.setattr(sage_inductor, "_PATTERNS", wheel / "patterns")
    assert finder.find_spec("sage_inductor.patterns") is None
    hashes = []
    for content in ("a = 1", "a = 2"):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("sage_inductor/__init__.py", content)
        hashes.append(digest(source_files([wheel / "sage_inductor"])).hexdigest())
    assert hashes[0] != hashes[1]


def test_version() -> None:
    assert sage_inductor.__version__ == metadata.version("sage_inductor")
