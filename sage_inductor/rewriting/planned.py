"""A plan beside a graph: what it says of each site, and where the two do not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sage_inductor.config import Config
from sage_inductor.graph.origin import ROOT
from sage_inductor.measurement.printable import printable_line
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import Fingerprint, Verdict, calls_per_module
from sage_inductor.report.site import Site

log = logging.getLogger(__name__)


def plan_of(config: Config) -> Plan:
    assert isinstance(config.plan, Plan)  # a path was read when the Config was made
    return config.plan


def compare_with_plan(sites: Sequence[Site], plan: Plan) -> None:
    """Log where a plan and a graph do not fit. Sites about which they disagree stay SDPA."""
    calls = calls_per_module(sites)
    verdicts = [verdict_of(plan, site, calls[site.module]) for site in sites]
    for verdict in verdicts:
        if not verdict.known:
            log.warning("%s; it stays SDPA", printable_line(str(verdict.reason)))
    names = [name for site in sites for name in planned_names(plan, site)]
    missing = plan.missing(names, {path for site in sites for path in site.compiled})
    if missing:
        log.warning("plan has sites that this graph lacks: %s", printable_line(", ".join(missing)))


def verdict_of(plan: Plan, site: Site, calls: int) -> Verdict:
    name, *others = planned_names(plan, site)
    return plan.verdict(name, Fingerprint.of(site, calls), others)


def planned_names(plan: Plan, site: Site) -> list[str]:
    """The names that `plan` may have for `site` and for the other sites that run its code. They are module paths, or "<root>"
    where the plan was made for the module alone."""
    number = site.name.removeprefix(site.module)
    names = [place.path + number for place in site.places]
    alone = ROOT + number
    if ROOT in site.places[0].names and not plan.sites_called(names[0]) and plan.sites_called(alone):
        return [alone]
    return names
