"""A name has one meaning in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from sage_inductor import config
from sage_inductor.kernels import KERNELS, PRECISIONS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("sage_inductor", "patterns") for path in (ROOT / folder).rglob("*.py")]


def type_names(tree: ast.Module) -> Iterator[str]:
    """Classes, and what is assigned to a name like one's (aliases and type variables)."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.lstrip("_")[:2].istitle():
                yield target.id


def test_no_two_types_share_a_name() -> None:
    """Nor differ in an underscore."""
    places = defaultdict(list)
    for path in SOURCES:
        for name in type_names(ast.parse(path.read_text(encoding="utf-8"))):
            places[name.strip("_")].append(f"{path.relative_to(ROOT)}: {name}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_one_module_asks_for_versions_of_packages_and_one_for_the_interpreter() -> None:
    """What else reads metadata are entry points."""

    def holding(*texts: str) -> set[str]:
        return {
            path.relative_to(ROOT).as_posix()
            for path in SOURCES
            if any(text in path.read_text(encoding="utf-8") for text in texts)
        }

    assert holding("metadata.version(", "/proc/driver/nvidia") == {"sage_inductor/kernels/installed.py"}
    assert holding(
        "def interpreted", "runtime.interpret", "InterpretedFunction", '"TRITON_INTERPRET", "0"'
    ) == {
        "sage_inductor/kernels/device.py",
        "sage_inductor/kernels/triton/internals.py",
    }


def test_the_literals_of_config_are_the_names_in_use() -> None:
    assert get_args(config.KernelName) == ("auto", *KERNELS)
    assert get_args(config.Precision) == ("auto", *PRECISIONS)
