"""`python -m sage_inductor doctor | explain | calibrate | bench`: the arguments, and the exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from sage_inductor.cli import bench, calibrate, doctor, explain
from sage_inductor.cli.errors import FAILED, INTERRUPTED, NOT_AS_ASKED, USAGE, CommandError
from sage_inductor.cli.output import show_error
from sage_inductor.errors import NotEligibleError
from sage_inductor.measurement.printable import printable

COMMANDS = {"doctor": doctor, "explain": explain, "calibrate": calibrate, "bench": bench}
EXIT_CODES = f"""exit codes:
  0  done, and all is well
  {FAILED}  something is wrong: a self-test failed, an installation is broken, the model raised, output cannot be printed
  {USAGE}  bad usage: an unknown option or value, a file that is missing or is not what it should be
  {NOT_AS_ASKED}  not as asked: no kernel can run here, a kernel asked for by name cannot, attention stays under --require-all
{INTERRUPTED}  interrupted (Ctrl-C)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors in the arguments go to stderr."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may be of ASCII, a name of lone surrogates
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _command(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has had enough
        _let_go_of_stdout()
        return FAILED
    except OSError as error:  # a full disk; files have errors of their own
        _let_go_of_stdout()
        show_error(f"cannot print: {error.strerror or error}")
        return FAILED
    except KeyboardInterrupt:
        show_error("interrupted (calibrate: the same command goes on from here)")
        return INTERRUPTED


def _let_go_of_stdout() -> None:
    """Replace stdout by the null device: the interpreter flushes stdout at its end, and would report the error again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def _command(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        return int(options.run(options))
    except CommandError as error:
        show_error(str(error))
        return error.exit_code
    except NotEligibleError as error:
        # Not its text: Dynamo, which it may have come through, adds hints on debugging to that.
        show_error(f"{error.site}: {'; '.join(error.reasons)}")
        return NOT_AS_ASKED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sage_inductor",
        description="Which attentions of a model run in 8 bits, how fast and how exact; and whether the kernels work here.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n")
        command = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{details}",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run=module.run)
    return parser
