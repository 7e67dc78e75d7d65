"""Plain tables and strict JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from sage_inductor.measurement.printable import printable

WIDTH = 120  # of what is piped or kept as text


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH) -> str:
    """A table in lines of at most `width` characters, its columns aligned with spaces and its header underlined. Cells are
    wrapped between words. Where a word would have to be broken, it is a block of lines for each row (`plain_records`)."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = column_widths(header, rows, width - 2 * (len(header) - 1))
    if widths is None:
        return plain_records(header, rows, width)
    lines = [_table_line(header, widths), _table_line(["-" * size for size in widths], widths)]
    return "\n".join([*lines, *(_table_line(row, widths) for row in rows)])


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One row, of as many lines as its longest cell is wrapped to."""
    wrapped = [wrap(cell, size) for cell, size in zip(cells, widths, strict=True)]
    return "\n".join(
        "  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    )


def plain_records(header: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH) -> str:
    """A block for each row: the first cell, and below it each other cell that is not empty, after its column's name."""
    label = max(map(len, header[1:]), default=0)
    indent = " " * (label + 4)
    lines = []
    for first, *rest in rows:
        lines.append(first)
        for name, cell in zip(header[1:], rest, strict=True):
            parts = wrap(cell, width - len(indent)) if cell else []
            lines += [
                f"  {name.ljust(label)}  {part}" if part is parts[0] else indent + part for part in parts
            ]
    return "\n".join(lines)


def column_widths(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[int, ...] | None:
    """Widths of the columns, at most `width` together, and each at least that of its longest word. None where the longest
    words do not fit."""
    columns = list(zip(header, *rows, strict=True))
    wanted = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
    if sum(least) > width:
        return None
    # Narrow columns keep their cells on one line; the widest are cut to one common width.
    widths = wanted
    for most in range(max(wanted), 0, -1):
        widths = [max(low, min(high, most)) for low, high in zip(least, wanted, strict=True)]
        if sum(widths) <= width:
            break
    return tuple(widths)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, unless a word is longer: words stay whole."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def to_json(data: Any, indent: int | None = 2) -> str:
    """`data` as JSON. A number that is NaN or infinite becomes text, "nan" or "inf", because JSON has no such numbers."""
    return json.dumps(_json_value(data), indent=indent, allow_nan=False)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, (list, tuple)) else value
