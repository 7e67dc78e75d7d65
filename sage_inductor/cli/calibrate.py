"""Measures every attention of a model in every precision, and writes the plan that keeps within a tolerance.

The plan is for `Config(plan=...)`, and for `explain --plan`.
"""

from __future__ import annotations

import argparse

import torch

import sage_inductor
from sage_inductor.cli.errors import CommandError
from sage_inductor.cli.model import add_model, failing, load
from sage_inductor.cli.output import show_json, show_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--tolerance", type=float, required=True, help="largest error that is allowed, by the metric"
    )
    parser.add_argument("--metric", default="rel_l2", help="of the error (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the plan, as JSON")


def run(options: argparse.Namespace) -> int:
    subject = load(options.model)
    sample = subject.sample()
    with failing("calibration failed"), torch.no_grad():
        plan = sage_inductor.calibrate(
            subject.model, [sample], tolerance=options.tolerance, metric=options.metric
        )
    try:
        plan.save(options.out)
    except OSError as error:
        raise CommandError(f"cannot write {options.out}: {error.strerror or error}") from None
    if options.json:
        show_json({"plan": options.out})
    else:
        show_lines(str(plan), f"written to {options.out}")
    return 0
