"""Text that came from a model, a file or an argument, for a terminal."""

from __future__ import annotations

import unicodedata

# Control and format characters (escape sequences, changes of writing direction), lone surrogates, line separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""`text` with what a terminal would obey, or could not show, as Python writes it: "\x1b[31m". Lines end as they
    do."""
    if text.isprintable():
        return text
    return "".join(
        repr(char)[1:-1] if char != "\n" and unicodedata.category(char) in _HIDDEN else char for char in text
    )
