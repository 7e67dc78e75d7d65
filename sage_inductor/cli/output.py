"""Tables: in colour on a terminal where `rich` is installed, else plain text that grep and diff can read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias

from sage_inductor.cli.errors import CommandError
from sage_inductor.kernels.files import check_target, replace_file
from sage_inductor.measurement.printable import printable
from sage_inductor.report.text import WIDTH, column_widths, plain_records, plain_table, to_json, wrap


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
    """Print one table to stdout, no wider than the terminal, or than 120 columns elsewhere. No word is broken."""
    title = printable(title)
    rows = [
        [
            Styled(printable(cell.text), cell.style) if isinstance(cell, Styled) else printable(cell)
            for cell in row
        ]
        for row in rows
    ]
    texts = [list(map(str, row)) for row in rows]
    if not _is_rich():
        width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
        sys.stdout.write(f"{title}\n{plain_table(header, texts, width)}\n\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # Each column has a border and a space on either side.
    widths = column_widths(header, texts, console.width - 3 * len(header) - 1)
    if widths is None:
        console.print(Text(title, "bold"))
        for row, text in zip(rows, texts, strict=True):
            record = Text(plain_records(header, [text], console.width) + "\n")
            for cell in row:
                if isinstance(cell, Styled):
                    record.highlight_words([cell.text], cell.style)
            console.print(record, no_wrap=True, overflow="ignore", crop=False)
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, width=width)
    for row in rows:
        table.add_row(
            *(
                Text("\n".join(wrap(str(cell), width)), cell.style if isinstance(cell, Styled) else "")
                for cell, width in zip(row, widths, strict=True)
            )
        )
    console.print(table)


def show_lines(*lines: str) -> None:
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))


def show_json(data: Any) -> None:
    """Print data as JSON; a str is JSON already."""
    show_lines(data if isinstance(data, str) else to_json(data))


def show_error(text: str) -> None:
    """Print to stderr, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{printable(text)}\n")


def check_writable(path: str) -> None:
    """Raise CommandError for a file that cannot be written, before there is anything to write."""
    try:
        check_target(path)
    except (OSError, ValueError) as error:
        raise CommandError(_cannot_write(path, error)) from None


def write_file(path: str, text: str) -> None:
    """Write the file as a whole. Raises CommandError where that fails, and then leaves the file as it was. Characters that
    UTF-8 does not have are escaped."""
    try:
        replace_file(path, text.encode("utf-8", "backslashreplace"), sync=True)
    except (OSError, ValueError) as error:
        raise CommandError(_cannot_write(path, error)) from None


def _cannot_write(path: str, error: Exception) -> str:
    return f"cannot write {path}: {getattr(error, 'strerror', None) or error}"


def _is_rich() -> bool:
    """Whether to print with rich: on a terminal, or where FORCE_COLOR asks for it, as in rich itself."""
    return (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))) and find_spec("rich") is not None
