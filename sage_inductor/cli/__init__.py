"""`python -m sage_inductor doctor | explain | calibrate | bench`: the arguments, and the exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sage_inductor.cli import bench, calibrate, doctor, explain
from sage_inductor.cli.errors import FAILED, NOT_AS_ASKED, USAGE, CommandError
from sage_inductor.errors import NotEligibleError

COMMANDS = {"doctor": doctor, "explain": explain, "calibrate": calibrate, "bench": bench}
EXIT_CODES = f"""exit codes:
  0  done, and all is well
  {FAILED}  something is wrong: a self-test failed, an installation is broken, the model raised
  {USAGE}  bad usage: an unknown option or value, a file that is missing or is not what it should be
  {NOT_AS_ASKED}  not as asked: no kernel can run here, a kernel asked for by name cannot, attention stays under --require-all
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; what is wrong with the arguments goes to stderr."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        return int(options.run(options))
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except NotEligibleError as error:
        # Not its text: Dynamo, which it may have come through, adds hints on debugging to that.
        sys.stderr.write(f"{error.site}: {'; '.join(error.reasons)}\n")
        return NOT_AS_ASKED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
