"""Who imports whom in the package: prints circles, imports that run upwards, and the rooms with what each imports.

    python tools/import_graph.py

A room is a folder of `sage_inductor/`, a module beside them, or `patterns/`. Imports are read from the sources, those inside
functions and under `TYPE_CHECKING` included. An import of a name from a package's `__init__` counts as one of that
`__init__`. Exit code 1 where there is a circle or an upward import.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sage_inductor"
# From the ground up: a room may import from rooms in front of it in this list, and from itself.
ROOMS: tuple[str, ...] = (
    "errors",
    "torch_internals",
    "graph",
    "kernels",
    "operators",
    "patterns",
    "measurement",
    "report",
    "plan",
    "config",
    "tuning",
    "rewriting",
    "calibration",
    "backend",
    "backends",
    "integrations",
    "testing",
    "__init__",
    "cli",
    "__main__",
)


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package's own name stands for its `__init__`."""
    own = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.patterns": ROOT / "patterns"}
    found = {}
    for name, folder in own.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = path
    return found


def imported_names(source: str, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Absolute names of all that a module imports, with the line; `from package import name` gives `package.name`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)


def imports(found: Mapping[str, Path]) -> list[Import]:
    """Every import of one module of the package by another."""
    result = []
    for module, path in sorted(found.items()):
        is_package = path.name == "__init__.py"
        for name, line in imported_names(path.read_text(encoding="utf-8"), module, is_package):
            target = name if name in found else name.rpartition(".")[0]
            if target in found and target != module:
                result.append(Import(module, target, line))
    return result


def circles(edges: list[Import]) -> list[list[str]]:
    """Sets of modules that import each other, directly or by way of others (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        graph[edge.importer].add(edge.imported)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def room(module: str) -> str:
    """`rewriting` for `sage_inductor.rewriting.driver`."""
    return module.split(".")[1] if "." in module else "__init__"


def upward(edges: list[Import]) -> list[Import]:
    """Imports from a room by one in front of it in `ROOMS`. Raises ValueError for a room that is not in the list."""
    unknown = {room(name) for edge in edges for name in (edge.importer, edge.imported)} - set(ROOMS)
    if unknown:
        raise ValueError(f"rooms without a place in ROOMS: {', '.join(sorted(unknown))}")
    level = {name: position for position, name in enumerate(ROOMS)}
    return [edge for edge in edges if level[room(edge.importer)] < level[room(edge.imported)]]


def main() -> int:
    found = modules()
    edges = imports(found)
    rooms: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        rooms[room(edge.importer)].add(room(edge.imported))
    for name in ROOMS:
        below = sorted(rooms[name] - {name}, key=ROOMS.index)
        print(f"{name}: {', '.join(below) or '-'}")
    round_trips, climbs = circles(edges), upward(edges)
    print(f"\n{len(found)} modules, {len(round_trips)} circles, {len(climbs)} upward imports")
    for circle in round_trips:
        print(f"circle: {', '.join(circle)}")
    for climb in climbs:
        print(f"upward: {climb}")
    return 1 if round_trips or climbs else 0


if __name__ == "__main__":
    sys.exit(main())
