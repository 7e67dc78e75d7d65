"""Virtual environments made in seconds and without the network: they see packages of the running one.

Not its sage_inductor: that is what they are there to install.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def environment_of_a_user() -> dict[str, str]:
    """Without the options that the tests are run with."""
    ours = ("TRITON_INTERPRET", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment_of_a_user(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A virtual environment that finds packages of the running one after its own: all, or `only` these distributions."""

    def __init__(self, folder: Path, only: Iterable[str] | None = None) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / "bin" / "python"
        # Those of an environment beneath the running one, too.
        everything = [
            path for path in dict.fromkeys(sys.path) if path.endswith(("site-packages", "dist-packages"))
        ]
        shared = everything if only is None else [str(linked(only, folder / "shared"))]
        # A path line, unlike site.addsitedir, does not read the .pth files there, which would find an editable
        # install of this package.
        (self.packages / "zz_shared.pth").write_text("\n".join(shared) + "\n")

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def install(self, *arguments: str | Path, cwd: Path | None = None) -> None:
        # The running environment's pip, which need not be among the shared packages. --ignore-installed: its own
        # sage_inductor is not to be removed.
        command = [sys.executable, "-m", "pip", "--python", self.python, "install"]
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet")
        run(*command, *options, *arguments, cwd=cwd or self.folder)


def linked(distributions: Iterable[str], folder: Path) -> Path:
    """A folder of links to what the distributions consist of."""
    folder.mkdir()
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


def required(requirements: Iterable[str]) -> set[str]:
    """The distributions that `pip install` of these brings: theirs, and what those require. No extras."""
    found: set[str] = set()
    wanted = [Requirement(text) for text in requirements]
    while wanted:
        requirement = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found.add(requirement.name)
            requires = importlib.metadata.distribution(requirement.name).requires or ()
            wanted += [Requirement(text) for text in requires]
    return found


def clone(folder: Path) -> Path:
    """The repository as somebody gets it: what git tracks or would track, as it is on disk."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # no git, or no repository, as in the copy that .ci/run makes
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache")
        return Path(shutil.copytree(ROOT, folder, ignore=ignored))
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder
