"""The way through a graph: finds every attention in it, judges each, rewrites those that are eligible."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

from torch import fx

from sage_inductor import kernels
from sage_inductor.config import Config, Precision
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.call import AttentionCall, Value, example_tensor
from sage_inductor.graph.origin import ROOT, source_code, source_line
from sage_inductor.graph.places import Places
from sage_inductor.graph.surroundings import Surroundings, enter, inside
from sage_inductor.graph.writes import Writes, follow_in_place, submodule_of
from sage_inductor.measurement.printable import printable_line
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.patterns.flex_attention import FlexCall
from sage_inductor.patterns.sdpa import as_autocast_reads
from sage_inductor.patterns.varlen_attention import VarlenAttention
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import Fingerprint, Verdict, calls_per_module
from sage_inductor.report.report import Report
from sage_inductor.report.site import Names, Site, TensorInfo
from sage_inductor.rewriting import workarounds
from sage_inductor.rewriting.block_lists import BlockLists
from sage_inductor.rewriting.eligibility import (
    gradient_reasons,
    ineligible_reasons,
    make_problem,
    make_sdpa_call,
    varlen_reasons,
)
from sage_inductor.rewriting.masks import classify
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.repeated_heads import absorb_repeated_heads
from sage_inductor.rewriting.selection import selection_reasons, warn_of_unmatched
from sage_inductor.rewriting.sharded import Seen, on_this_rank, ring_parts
from sage_inductor.rewriting.substitution import Inlined, Substitute, insert_expansion, insert_substitute
from sage_inductor.torch_internals.dynamo import trace_artifact
from sage_inductor.tuning import Choice, Comparison, choose

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
            _compare_with_plan(sites, _plan_of(config))
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
    regions: list[_Region] = []
    found = list(_collect(graph, Surroundings.ambient(), regions, set()))
    placeholders = graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, inputs, strict=True)) if len(placeholders) == len(inputs) else {}
    walk = _Walk(config, Names(), places, Counter(places.of(item.node)[0].path for item in found), values)
    decisions = [_judge(item, walk) for item in found]
    for region in regions:
        _carry_out(region, [decision for decision in decisions if decision.found.region is region])
    return tuple(decision.site for decision in decisions)


@dataclass(frozen=True)
class _Walk:
    """The facts that hold for one graph and all below it."""

    config: Config
    names: Names
    places: Places
    calls: Mapping[str, int]
    """Attention calls per module path."""
    values: Mapping[fx.Node, Any]
    """The inputs of the graph, as far as they are known."""


def _plan_of(config: Config) -> Plan:
    assert isinstance(config.plan, Plan)  # a path was read when the Config was made
    return config.plan


def _compare_with_plan(sites: Sequence[Site], plan: Plan) -> None:
    """Log where a plan and a graph do not fit. Sites about which they disagree stay SDPA."""
    calls = calls_per_module(sites)
    verdicts = [_verdict(plan, site, calls[site.module]) for site in sites]
    for verdict in verdicts:
        if not verdict.known:
            log.warning("%s; it stays SDPA", printable_line(str(verdict.reason)))
    names = [name for site in sites for name in planned_names(plan, site)]
    missing = plan.missing(names, {path for site in sites for path in site.compiled})
    if missing:
        log.warning("plan has sites that this graph lacks: %s", printable_line(", ".join(missing)))


def _verdict(plan: Plan, site: Site, calls: int) -> Verdict:
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


@dataclass(frozen=True, eq=False)
class _Region:
    """The root graph, or the graph of a submodule, as matching sees it: before anything in it is rewritten."""

    graph: fx.Graph
    owner: fx.GraphModule | None
    """The submodule whose graph it is; None for the root, which the caller recompiles."""
    writes: Writes
    transformed: set[fx.Node] = field(default_factory=set)
    """Nodes inside functorch transforms."""
    openings: list[_Opening] = field(default_factory=list)

    @cached_property
    def masks(self) -> classify.Masks:
        return classify.Masks(self.graph, self.writes, self.transformed)


@dataclass(frozen=True, eq=False)
class _Opening:
    """An opaque node and its expansion, which stands in front of it in the graph."""

    node: fx.Node
    inlined: Inlined


@dataclass(frozen=True)
class _Match:
    """A call twice: `call` reads key and value from before their heads were repeated, `as_found` is as the model makes it."""

    call: AttentionCall
    as_found: AttentionCall


@dataclass(frozen=True)
class _Found:
    """An attention of the model, called at `node`. `match` is there, or in the expansion of `node` if that is opaque. Where
    `match` is None, `node` is opaque and cannot be opened."""

    node: fx.Node
    pattern: str
    region: _Region
    around: Surroundings
    match: _Match | None = None
    opening: _Opening | None = None
    closed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Decision:
    """The decision about `found`. `insert` puts our operator into the graph; it is None where the attention stays."""

    found: _Found
    site: Site
    insert: partial[Substitute] | None = None
    lists: BlockLists | None = None
    """Those of a block_mask, which are looked at in the graph."""


def _collect(
    graph: fx.Graph,
    around: Surroundings,
    regions: list[_Region],
    visited: set[int],
    owner: fx.GraphModule | None = None,
) -> Iterator[_Found]:
    """Every attention of `graph` in the order of its nodes.

    Those of a subgraph come where it is first referred to, with the surroundings there. Nothing is rewritten, but afterwards
    the expansions of opaque nodes stand in front of them. `regions` receives `graph` and all graphs below it.
    """
    follow_in_place(graph)
    region = _Region(graph, owner, Writes(graph))
    regions.append(region)
    for node in list(graph.nodes):
        around = enter(node, around)
        if around.transforms:
            region.transformed.add(node)
        submodule = submodule_of(node)
        if submodule is not None and id(submodule) not in visited:
            visited.add(id(submodule))
            yield from _collect(submodule.graph, inside(node, around), regions, visited, submodule)
            continue
        yield from _opened(node, region, around)
        match = _match(node, region.writes, around)
        if match is not None:
            yield _Found(node, match.call.pattern, region, around, match)


def _opened(node: fx.Node, region: _Region, around: Surroundings) -> Iterator[_Found]:
    """The attentions inside `node` if that is opaque; one with `closed` reasons if it cannot be opened."""
    for opaque in OPAQUE:
        closed = opaque.closed_reasons(node)
        if closed:
            yield _Found(node, opaque.name, region, around, closed=tuple(closed))
            return
        expansion = opaque.expand(node)
        if expansion is not None:
            opening = _Opening(node, insert_expansion(node, expansion))
            region.openings.append(opening)
            for inner in opening.inlined.nodes:
                match = _match(inner, region.writes, around)
                if match is not None:
                    yield _Found(node, opaque.name, region, around, match, opening)
            return


def _match(node: fx.Node, writes: Writes, around: Surroundings) -> _Match | None:
    patterns = [pattern for pattern in ALL if pattern.under_transforms or not around.transforms]
    matches = (pattern.match(node) for pattern in patterns)
    found = next((call for call in matches if call is not None), None)
    if found is None:
        return None
    found = as_autocast_reads(found, around)
    candidates = (absorb_repeated_heads(found), found)
    call = next((call for call in candidates if not writes.overwrite(call)), None)
    return None if call is None else _Match(call, found)


def _judge(found: _Found, walk: _Walk) -> _Decision:
    if found.match is None:
        return _Decision(found, _closed_site(found.node, found.pattern, list(found.closed), walk))
    call = dataclasses.replace(found.match.call, pattern=found.pattern)
    mask = classify.classify(call, found.region.masks)
    reasons = gradient_reasons(found.node, walk.config) if found.opening is not None else []
    if found.pattern == VarlenAttention.name:
        mask = dataclasses.replace(mask, as_read=None)
        reasons += varlen_reasons(found.node, mask, walk.config, found.around)
    flex = FlexCall.of(found.node)
    lists = None if flex is None else BlockLists(flex, mask, found.region.writes)
    if lists is not None:
        reasons += lists.reasons(call, walk.values)
    as_found = found.match.as_found
    if flex is not None and str(mask) == "causal":
        # a baseline as good as flex_attention, which passes over blocks
        as_found = dataclasses.replace(as_found, attn_mask=None, is_causal=True)
    site, choice, mask, moves_to = _decide(as_found, call, mask, walk, found.around, found.node, reasons)
    insert = partial(insert_substitute, call, mask, site, choice, moves_to) if site.rewritten else None
    return _Decision(found, site, insert, lists if flex is not None and flex.has_lists else None)


def _carry_out(region: _Region, decisions: Sequence[_Decision]) -> None:
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


def _closed_site(node: fx.Node, pattern: str, reasons: list[str], walk: _Walk) -> Site:
    places, config = walk.places.of(node), walk.config
    path = places[0].path
    reasons = selection_reasons(config, places) + reasons
    return Site(
        name=walk.names.next(path),
        module=path,
        source=source_line(node),
        pattern=pattern,
        query=None,
        key=None,
        value=None,
        mask="unknown",
        kernel=None,
        precision=config.precision,
        rewritten=False,
        reasons=tuple(reasons),
        code=source_code(node),
        places=places,
    )


def _decide(
    as_found: AttentionCall,
    call: AttentionCall,
    mask: Mask,
    walk: _Walk,
    around: Surroundings,
    node: fx.Node,
    reasons: Sequence[str] = (),
) -> tuple[Site, Choice, Mask, tuple[int, ...] | None]:
    """The decision about `call`, which the model makes at `node`; its mask as the kernel is to read it; and the dims by which
    the output is to be sharded (`Seen.moves_to`). `as_found` is the same call with its heads still repeated. `reasons` speak
    against it already."""
    places, config = walk.places.of(node), walk.config
    path, seen = places[0].path, on_this_rank(call, mask)
    site = Site(
        name=walk.names.next(path),
        module=path,
        source=source_line(node),
        pattern=call.pattern,
        query=_info(seen.call.query, seen.placements[0]),
        key=_info(seen.call.key, seen.placements[1]),
        value=_info(seen.call.value, seen.placements[2]),
        mask=str(mask),
        kernel=None,
        precision=config.precision,
        rewritten=False,
        code=source_code(node),
        places=places,
    )
    reasons = [*selection_reasons(config, places), *reasons]
    if config.plan is not None:
        verdict = _verdict(_plan_of(config), site, walk.calls[path])
        planned = cast(Precision, verdict.precision or config.precision)
        config = dataclasses.replace(config, precision=planned)
        site = dataclasses.replace(site, precision=config.precision, rel_l2=verdict.rel_l2)
        reasons += [] if verdict.reason is None else [verdict.reason]
    query = example_tensor(call.query)
    if config.precision == "auto" and query is not None:
        precision = kernels.precision_on(query.device, "auto", config.kernel)
        config = dataclasses.replace(config, precision=cast(Precision, precision))
        site = dataclasses.replace(site, precision=precision, precision_was_open=True)
    against, choice = _chosen(as_found, seen, mask, config, around, reasons, site.precision_was_open)
    if against and mask.as_read is not None:
        mask = mask.as_read
        seen = on_this_rank(call, mask)
        others, choice = _chosen(as_found, seen, mask, config, around, reasons, site.precision_was_open)
        against = [*against, *others] if others else []
    reasons += against
    site = dataclasses.replace(
        site,
        kernel=None if reasons else choice.kernel,
        rewritten=not reasons,
        reasons=tuple(dict.fromkeys(reasons)),
        speedup=choice.speedup,
    )
    return site, choice, mask, seen.moves_to


def _chosen(
    as_found: AttentionCall,
    seen: Seen,
    mask: Mask,
    config: Config,
    around: Surroundings,
    before: Sequence[str],
    precision_is_open: bool,
) -> tuple[list[str], Choice]:
    """(all reasons against a call with `mask`, as kernels are to judge it, beside those from `before`; the kernel)."""
    reasons = [*seen.reasons] or ineligible_reasons(seen.call, seen.mask, config, around)
    problem = make_problem(seen.call, seen.mask, config, seen.gives_lse)
    sdpa_call = make_sdpa_call(on_this_rank(as_found, mask).call)
    choice = Choice(None)
    if problem is not None and sdpa_call is not None:
        if config.kernel != "auto":
            missing = kernels.get(config.kernel).unavailable_reasons(problem.query.device)
            if missing:
                raise NotEligibleError(f"kernel={config.kernel}", missing)
        # A site that stays for another reason is not worth a measurement.
        unmeasured = bool(before or reasons) and config.tune == "measure"
        tuning = dataclasses.replace(config, tune="table") if unmeasured else config
        choice = choose(Comparison(problem, sdpa_call, seen.whole), tuning, precision_is_open)
        reasons += choice.reasons
        if choice.kernel is not None and seen.gives_lse:
            for part in ring_parts(problem):
                reasons += kernels.select(part, choice.kernel)[1]
    return reasons, choice


def _info(node: Value, placements: str) -> TensorInfo | None:
    tensor = example_tensor(node)
    return None if tensor is None else TensorInfo.of(tensor, placements)
