"""Measures every attention of a model in every precision, and writes a plan that keeps within a tolerance.

The plan is for `Config(plan=...)`, and for `explain --plan`. The inputs that come with the model are one sample; give
more, of the lengths and content that will be met, with --samples. What is measured is kept in FILE.partial until the plan
is written: after an interruption the same command goes on from there.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

import sage_inductor
from sage_inductor.cli.errors import FAILED, CommandError
from sage_inductor.cli.model import add_model, failing, load, make
from sage_inductor.cli.options import add_config, chosen_config
from sage_inductor.cli.output import check_writable, show_json, show_lines, show_table, write_file
from sage_inductor.kernels.files import is_regular_target
from sage_inductor.kernels.smoothing import SMOOTHINGS
from sage_inductor.plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the plan, as JSON")
    parser.add_argument("--metric", default="rel_l2", help="of the error (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="of the metric (default: the metric's own)")
    parser.add_argument(
        "--samples",
        metavar="FILE.py:FUNCTION",
        help="a function without arguments that returns the inputs to measure with, as calibrate() takes them",
    )
    parser.add_argument(
        "--smoothings",
        nargs="+",
        choices=tuple(SMOOTHINGS),
        metavar="NAME",
        help="what to do to Q and K before they are rounded: the least that holds is taken (default: auto; valid: "
        f"{', '.join(SMOOTHINGS)})",
    )
    parser.add_argument(
        "--skip",
        action="store_true",
        help="also find the largest skip_threshold that holds the tolerance at each attention, and how much it leaves out",
    )
    add_config(parser, ("kernel", "include", "exclude"))


def run(options: argparse.Namespace) -> int:
    config = chosen_config(options)
    check_writable(options.out)
    partial = f"{options.out}.partial" if is_regular_target(options.out) else None
    if partial is not None:
        check_writable(partial)
    subject = load(options.model)
    inputs = subject.sample() if options.samples is None else make(options.samples)
    with failing("calibration failed"), torch.no_grad():
        plan = sage_inductor.calibrate(
            subject.model,
            inputs,
            tolerance=options.tolerance,
            metric=options.metric,
            config=config,
            smoothings=options.smoothings,
            skip=options.skip,
            keep=partial,
        )
    failed: CommandError | None = None
    try:
        write_file(options.out, plan.to_json())
        end = f"written to {options.out}"
    except CommandError as error:
        failed = CommandError(str(error), FAILED)
        end = _kept_elsewhere(plan)
    if options.json:
        show_json(plan.to_json())
    else:
        if plan.sites:
            show_table(options.model, *plan.table())
        show_lines(*plan.summary(), end)
    if failed is not None:
        raise failed
    return 0


def _kept_elsewhere(plan: Plan) -> str:
    """Where the plan is instead: what took hours is not lost to a disk that has filled up meanwhile."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="sage_inductor-plan-", suffix=".json")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(plan.to_json())
        return f"written to {path} instead"
    except OSError:
        return plan.to_json()
