"""Tables: in colour on a terminal where `rich` is installed, else plain text that grep and diff can read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from sage_inductor.cli.errors import CommandError
from sage_inductor.report.text import plain_table, to_json


@dataclass(frozen=True)
class Styled:
    """Text with a style of rich's, which plain text leaves out."""

    text: str
    style: str

    def __str__(self) -> str:
        return self.text


Cell: TypeAlias = "str | Styled"


def good(text: str) -> Styled:
    return Styled(text, "green")


def bad(text: str) -> Styled:
    return Styled(text, "bold red")


def weak(text: str) -> Styled:
    return Styled(text, "yellow")


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print one table, on stdout."""
    if not _is_rich():
        sys.stdout.write(f"{title}\n{plain_table(header, [list(map(str, row)) for row in rows])}\n\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell), cell.style if isinstance(cell, Styled) else "") for cell in row))
    Console().print(table)


def show_lines(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def show_json(data: Any) -> None:
    """Print data, or JSON that is made already."""
    show_lines(data if isinstance(data, str) else to_json(data))


def write_file(path: str, text: str) -> None:
    """CommandError when the file cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def _is_rich() -> bool:
    """On a terminal, or where FORCE_COLOR asks for it, as in rich itself."""
    return (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))) and find_spec("rich") is not None
