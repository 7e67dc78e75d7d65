"""The error that ends a command, and the exit codes."""

from __future__ import annotations

FAILED, USAGE, NOT_AS_ASKED = 1, 2, 3
INTERRUPTED = 130  # as shells have it of a program that SIGINT ended


class CommandError(Exception):
    """Ends a command with `exit_code`. Its message is all that the user needs to see."""

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
