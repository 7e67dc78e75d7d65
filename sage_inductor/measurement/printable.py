"""Text from a model, a file or an argument, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

# Control and format characters (escape sequences, changes of writing direction), lone surrogates, line separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable_line(text: str) -> str:
    r"""`printable`, of one line: newlines are escaped, too, so that a name cannot write lines of its own into a log."""
    return printable(text).replace("\n", r"\n")


def printable(text: str) -> str:
    r"""`text` with the characters that a terminal would obey, or could not show, escaped as in Python: "\x1b[31m". Newlines
    stay."""
    if text.isprintable():
        return text
    return "".join(
        repr(char)[1:-1] if char != "\n" and unicodedata.category(char) in _HIDDEN else char for char in text
    )
