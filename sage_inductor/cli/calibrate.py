"""Measures every attention of a model in every precision, and writes a plan that keeps within a tolerance.

The plan is for `Config(plan=...)`, and for `explain --plan`. The inputs that come with the model are one sample; give
more, of the lengths and content that will be met, with --samples.
"""

from __future__ import annotations

import argparse

import torch

import sage_inductor
from sage_inductor.cli.errors import CommandError
from sage_inductor.cli.model import add_model, failing, load, make
from sage_inductor.cli.options import add_config, chosen_config
from sage_inductor.cli.output import show_json, show_lines, show_table


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
    add_config(parser, ("kernel", "include", "exclude"))


def run(options: argparse.Namespace) -> int:
    config = chosen_config(options)
    subject = load(options.model)
    inputs = subject.sample() if options.samples is None else make(options.samples)
    with failing("calibration failed"), torch.no_grad():
        plan = sage_inductor.calibrate(
            subject.model, inputs, tolerance=options.tolerance, metric=options.metric, config=config
        )
    try:
        plan.save(options.out)
    except OSError as error:
        raise CommandError(f"cannot write {options.out}: {error.strerror or error}") from None
    if options.json:
        show_json(plan.to_json())
    else:
        if plan.sites:
            show_table(options.model, *plan.table())
        show_lines(*plan.summary(), f"written to {options.out}")
    return 0
