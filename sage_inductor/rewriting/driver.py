"""The way through a graph: finds every attention in it, judges each, rewrites those that are eligible."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.places import Places
from sage_inductor.graph.surroundings import Surroundings
from sage_inductor.measurement.printable import printable_line
from sage_inductor.report.report import Report
from sage_inductor.report.site import Names, Site
from sage_inductor.rewriting import workarounds
from sage_inductor.rewriting.decision import Decision, Walk, judge
from sage_inductor.rewriting.found import Region, collect
from sage_inductor.rewriting.planned import compare_with_plan, plan_of
from sage_inductor.rewriting.selection import selection_reasons, warn_of_unmatched
from sage_inductor.torch_internals.dynamo import trace_artifact

log = logging.getLogger(__name__)


def rewrite_graph(graph: fx.Graph, config: Config, inputs: Sequence[Any] = ()) -> tuple[Site, ...]:
    """Rewrite `graph` and the graphs of its submodules in place, as `config` says. Returns every site found. `inputs`: what the
    graph is called with now, where that is known.

    Raises NotEligibleError where a kernel that was asked for by name cannot run on this machine, and, with
    `fallback="error"`, where any site stays.
    """
    places = Places()
    sites = rewrite_sites(graph, config, places, inputs)
    for site in sites:
        log.debug("%s", site)
    rewritten = sum(site.rewritten for site in sites)
    if sites:
        log.info("%d of %d attention(s) rewritten (kernel=%s)", rewritten, len(sites), config.kernel)
        trace_artifact("sage_inductor_report", lambda: Report(sites).to_json())
        if config.plan is not None:
            compare_with_plan(sites, plan_of(config))
        warn_of_unmatched(config, sites, graph, places)
    # What include and exclude leave out stays on purpose.
    _fall_back([site for site in sites if not site.rewritten and not _left_out(site, config)], config)
    return sites


def rewrite_sites(
    graph: fx.Graph, config: Config, places: Places | None = None, inputs: Sequence[Any] = ()
) -> tuple[Site, ...]:
    """The rewriting alone, without log, warnings or fallback. The nodes of our operator that it writes carry the name of their
    site as `meta["sage_site"]`. Raises NotEligibleError where a kernel asked for by name cannot run here."""
    places = Places() if places is None else places
    regions: list[Region] = []
    found = list(collect(graph, Surroundings.ambient(), regions, {}))
    placeholders = graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, inputs, strict=True)) if len(placeholders) == len(inputs) else {}
    calls = Counter(places.of(item.node, item.region.shared)[0].path for item in found)
    walk = Walk(config, Names(), places, calls, values)
    decisions = [judge(item, walk) for item in found]
    for region in regions:
        _carry_out(region, [decision for decision in decisions if decision.found.region is region])
    return tuple(decision.site for decision in decisions)


def _left_out(site: Site, config: Config) -> bool:
    return bool(selection_reasons(config, site.places))


def _fall_back(refused: list[Site], config: Config) -> None:
    if not refused or config.fallback == "sdpa":
        return
    if config.fallback == "warn":
        for site in refused:
            warnings.warn(f"sage_inductor: {site}", stacklevel=2)
        return
    first, *others = refused
    reasons = [*first.reasons, *(f"{site.name}: {'; '.join(site.reasons)}" for site in others)]
    raise NotEligibleError(printable_line(first.name), list(map(printable_line, reasons)))


def _carry_out(region: Region, decisions: Sequence[Decision]) -> None:
    """Rewrite the graph of `region`. An opaque node is replaced by its expansion only if some attention in it is rewritten."""
    won = {decision.found.opening for decision in decisions if decision.insert is not None}
    for opening in region.openings:
        if opening not in won:
            opening.inlined.remove()
    checks = [decision.lists for decision in decisions if decision.insert is not None and decision.lists]
    for lists in {
        lists.key: lists for lists in reversed(checks)
    }.values():  # the first call of those that share one
        lists.insert_check()
    # A call may read the value of another, so all operators are inserted before the first call is replaced.
    substitutes = [decision.insert() for decision in decisions if decision.insert is not None]
    for opening in region.openings:
        if opening in won:
            opening.inlined.replace(opening.node)
    for substitute in substitutes:
        substitute.replace()
    workarounds.apply(region.graph, region.transformed)
    if region.owner is not None:
        region.owner.recompile()
