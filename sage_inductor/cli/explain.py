"""Shows every attention of a model, whether it runs in 8 bits, and why not.

Traces the model with Dynamo and runs it once as it is; compiles nothing, but measures what a compile would (--tune).
Under torch.no_grad(), unless --training.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import torch

from sage_inductor.backend import explain
from sage_inductor.cli.errors import NOT_AS_ASKED
from sage_inductor.cli.model import Subject, add_model, failing, load
from sage_inductor.cli.options import add_config, chosen_config, config_fields
from sage_inductor.cli.output import (
    Cell,
    check_writable,
    good,
    show_json,
    show_lines,
    show_table,
    weak,
    write_file,
)
from sage_inductor.config import Config
from sage_inductor.report.report import Report
from sage_inductor.report.site import Site


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--html", metavar="FILE", help="also write a page to look at")
    parser.add_argument(
        "--require-all",
        action="store_true",
        help="fail where any attention stays, recognised or not, or none is found",
    )
    parser.add_argument(
        "--dynamic",
        action=argparse.BooleanOptionalAction,
        help="sizes symbolic, or fixed, as for torch.compile",
    )
    parser.add_argument(
        "--regional",
        action="append",
        metavar="CLASS",
        help="compile modules of this class one by one, as regional compilation does; may be repeated",
    )
    add_config(parser, config_fields())


def run(options: argparse.Namespace) -> int:
    config = chosen_config(options)
    if options.html is not None:
        check_writable(options.html)
    report = explained(load(options.model), config, options.dynamic, options.regional or False)
    with contextlib.ExitStack() as written:
        if options.html is not None:
            # Whichever of the two fails, the other one is there.
            written.callback(write_file, options.html, report.to_html(options.model))
        _show(options, report)
    others = [item for item in report.operators if not item.is_own]
    short = bool(report.refused or report.unread or others) or not (report.sites or report.operators)
    return NOT_AS_ASKED if options.require_all and short else 0


def _show(options: argparse.Namespace, report: Report) -> None:
    if options.json:
        show_json(report.to_json())
    else:
        show_report(options.model, report)


def explained(
    subject: Subject, config: Config, dynamic: bool | None = None, regional: bool | Sequence[str] = False
) -> Report:
    """The report of `explain` about the model. Raises NotEligibleError as `explain`, and CommandError for anything else that
    the model raises."""
    with failing("the model raised"), contextlib.nullcontext() if config.training else torch.no_grad():
        return explain(
            subject.model,
            *subject.args,
            config=config,
            dynamic=dynamic,
            regional=regional,
            **subject.kwargs,
        )


def show_report(title: str, report: Report) -> None:
    measured = any(site.speedup is not None or site.rel_l2 is not None for site in report.sites)
    header = [
        "site",
        "source",
        "query",
        "key",
        "mask",
        "decision",
        *(("error", "speed-up") if measured else ()),
        "reasons",
    ]
    if report.sites:
        show_table(title, header, [_row(site, measured) for site in report.sites])
    show_lines(report.summary())


def _row(site: Site, measured: bool) -> list[Cell]:
    key = "x".join(map(str, site.key.shape)) if site.key else "?"
    decision = good(f"{site.kernel} {site.form}") if site.rewritten else weak("SDPA")
    error = "" if site.rel_l2 is None else f"{site.rel_l2:.4f}"
    speedup = "" if site.speedup is None else f"{site.speedup:.2f}x"
    figures = [error, speedup] if measured else []
    return [
        site.title,
        site.source,
        str(site.query or "?"),
        key,
        site.mask,
        decision,
        *figures,
        "; ".join(site.reasons),
    ]
