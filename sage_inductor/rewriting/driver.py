"""The way through a graph: finds every attention in it, judges each, rewrites those that are eligible."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from sage_inductor import kernels
from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.call import AttentionCall, Expansion, Value, example_tensor
from sage_inductor.graph.origin import module_path, source_code, source_line
from sage_inductor.graph.surroundings import Surroundings, ambient_pin, enter
from sage_inductor.graph.writes import Writes, follow_in_place, submodule_of
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import Fingerprint, calls_per_module
from sage_inductor.report.report import Report
from sage_inductor.report.site import Names, Site, TensorInfo
from sage_inductor.rewriting import workarounds
from sage_inductor.rewriting.eligibility import (
    gradient_reasons,
    ineligible_reasons,
    make_problem,
    make_sdpa_call,
)
from sage_inductor.rewriting.masks import classify
from sage_inductor.rewriting.repeated_heads import absorb_repeated_heads
from sage_inductor.rewriting.substitution import insert_expansion, rewrite
from sage_inductor.torch_internals import trace_artifact
from sage_inductor.tuning import Choice, Comparison, choose

log = logging.getLogger(__name__)


def rewrite_graph(graph: fx.Graph, config: Config) -> tuple[Site, ...]:
    """Rewrite `graph` and the graphs of its submodules in place, as `config` says. Returns every site found.

    Raises NotEligibleError where a kernel that was asked for by name cannot run on this machine, and, with
    `fallback="error"`, where any site stays.
    """
    sites = rewrite_sites(graph, config)
    for site in sites:
        log.debug("%s", site)
    rewritten = sum(site.rewritten for site in sites)
    if sites:
        log.info("%d of %d attention(s) rewritten (kernel=%s)", rewritten, len(sites), config.kernel)
        trace_artifact("sage_inductor_report", lambda: Report(sites).to_json())
        if config.plan is not None:
            _compare_with_plan(sites, _plan_of(config))
    _fall_back([site for site in sites if not site.rewritten], config)
    return sites


def rewrite_sites(graph: fx.Graph, config: Config) -> tuple[Site, ...]:
    """The rewriting alone: says nothing, and raises only where a kernel asked for by name cannot run here. The nodes
    of our operator carry the name of their site as `meta["sage_site"]`."""
    calls = (
        Counter()
        if config.plan is None
        else Counter(_module_paths(graph, Surroundings(ambient_pin()), set()))
    )
    walk = _Walk(config, Names(), calls)
    return tuple(_walk(graph, walk, Surroundings(ambient_pin()), set()))


@dataclass(frozen=True)
class _Walk:
    """What holds for one graph and all below it."""

    config: Config
    names: Names
    calls: Mapping[str, int]
    """Attention calls per module path, counted where there is a plan."""


def _plan_of(config: Config) -> Plan:
    assert isinstance(config.plan, Plan)  # a path was read when the Config was made
    return config.plan


def _compare_with_plan(sites: Sequence[Site], plan: Plan) -> None:
    """Say where a plan and a graph do not fit. What they disagree about stays SDPA."""
    calls = calls_per_module(sites)
    verdicts = [plan.verdict(site.name, Fingerprint.of(site, calls[site.module])) for site in sites]
    for verdict in verdicts:
        if not verdict.known:
            log.warning("%s; it stays SDPA", verdict.reason)
    missing = plan.missing(site.name for site in sites)
    if missing:
        log.warning("plan has sites that this graph lacks: %s", ", ".join(missing))


def _fall_back(refused: list[Site], config: Config) -> None:
    if not refused or config.fallback == "sdpa":
        return
    if config.fallback == "warn":
        for site in refused:
            warnings.warn(f"sage_inductor: {site}", stacklevel=2)
        return
    first, *others = refused
    raise NotEligibleError(
        first.name, [*first.reasons, *(f"{site.name}: {'; '.join(site.reasons)}" for site in others)]
    )


def _walk(graph: fx.Graph, walk: _Walk, around: Surroundings, visited: set[int]) -> Iterator[Site]:
    """Judge the nodes of `graph` in order; a subgraph where it is first referred to, in its surroundings
    there."""
    constants: dict[fx.Node, Tensor | None] = {}
    follow_in_place(graph)
    writes = Writes(graph)
    transformed: set[fx.Node] = set()
    for node in list(graph.nodes):
        around = enter(node, around)
        if around.transforms:
            transformed.add(node)
        submodule = submodule_of(node)
        if submodule is not None and id(submodule) not in visited:
            visited.add(id(submodule))
            yield from _walk(submodule.graph, walk, around, visited)
            submodule.recompile()
            continue
        for opaque in OPAQUE:
            closed = opaque.closed_reasons(node)
            if closed:
                yield _closed_site(node, opaque.name, closed, walk)
                break
            expansion = opaque.expand(node)
            if expansion is not None:
                yield from _judge_expansion(node, opaque.name, expansion, walk, around, constants, writes)
                break
        match = _match(node, writes, around)
        if match is not None:
            yield _judge(match, walk, around, constants, writes)
    workarounds.apply(graph, transformed)


def _module_paths(graph: fx.Graph, around: Surroundings, visited: set[int]) -> Iterator[str]:
    """The module path of every site that `_walk` will find."""
    writes = Writes(graph)
    for node in graph.nodes:
        around = enter(node, around)
        submodule = submodule_of(node)
        if submodule is not None and id(submodule) not in visited:
            visited.add(id(submodule))
            yield from _module_paths(submodule.graph, around, visited)
            continue
        inner: list[fx.Node] = []
        for opaque in OPAQUE:
            if opaque.closed_reasons(node):
                yield module_path(node)
                break
            expansion = opaque.expand(node)
            if expansion is not None:
                inner = list(expansion.graph.nodes)
                break
        for candidate in (*inner, node):
            if _match(candidate, writes, around) is not None:
                yield module_path(node)


def _closed_site(node: fx.Node, pattern: str, reasons: list[str], walk: _Walk) -> Site:
    path, config = module_path(node), walk.config
    reasons = config.selection_reasons(path) + reasons
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
    )


@dataclass(frozen=True)
class _Match:
    """A call with repeated heads seen through, and as the model makes it."""

    call: AttentionCall
    as_found: AttentionCall


def _match(node: fx.Node, writes: Writes, around: Surroundings) -> _Match | None:
    patterns = [pattern for pattern in ALL if pattern.under_transforms or not around.transforms]
    matches = (pattern.match(node) for pattern in patterns)
    found = next((call for call in matches if call is not None), None)
    if found is None:
        return None
    candidates = (absorb_repeated_heads(found), found)
    call = next((call for call in candidates if not writes.overwrite(call)), None)
    return None if call is None else _Match(call, found)


def _judge(
    match: _Match,
    walk: _Walk,
    around: Surroundings,
    constants: dict[fx.Node, Tensor | None],
    writes: Writes,
) -> Site:
    """The decision about `match`, carried out."""
    call = match.call
    mask = classify.classify(call, constants, writes)
    site, choice = _decide(match.as_found, call, mask, walk, around, call.node)
    if site.rewritten:
        rewrite(call, mask, site, choice)
    return site


def _judge_expansion(
    node: fx.Node,
    pattern: str,
    expansion: Expansion,
    walk: _Walk,
    around: Surroundings,
    constants: dict[fx.Node, Tensor | None],
    writes: Writes,
) -> Iterator[Site]:
    """The attention inside an opaque node. The node gives way to its expansion only where that wins something."""
    gradients = gradient_reasons(node, walk.config)
    inlined = insert_expansion(node, expansion)
    decided = []
    matches = [_match(inner, writes, around) for inner in inlined.nodes]
    for match in [match for match in matches if match is not None]:
        call = dataclasses.replace(match.call, pattern=pattern)
        mask = classify.classify(call, constants, writes)
        decided.append((call, mask, *_decide(match.as_found, call, mask, walk, around, node, gradients)))
    if any(site.rewritten for _, _, site, _ in decided):
        inlined.replace(node)
    else:
        inlined.remove()
    for call, mask, site, choice in decided:
        if site.rewritten:
            rewrite(call, mask, site, choice)
        yield site


def _decide(
    as_found: AttentionCall,
    call: AttentionCall,
    mask: classify.Mask,
    walk: _Walk,
    around: Surroundings,
    node: fx.Node,
    reasons: Sequence[str] = (),
) -> tuple[Site, Choice]:
    """The decision about `call`, which the model makes at `node`, and which is `as_found` with repeated heads seen
    through."""
    path, config = module_path(node), walk.config
    site = Site(
        name=walk.names.next(path),
        module=path,
        source=source_line(node),
        pattern=call.pattern,
        query=_info(call.query),
        key=_info(call.key),
        value=_info(call.value),
        mask=str(mask),
        kernel=None,
        precision=config.precision,
        rewritten=False,
        code=source_code(node),
    )
    reasons = [*config.selection_reasons(path), *reasons]
    if config.plan is not None:
        verdict = _plan_of(config).verdict(site.name, Fingerprint.of(site, walk.calls[path]))
        config = dataclasses.replace(config, precision=verdict.precision or config.precision)
        site = dataclasses.replace(site, precision=config.precision, rel_l2=verdict.rel_l2)
        reasons += [] if verdict.reason is None else [verdict.reason]
    reasons += ineligible_reasons(call, mask, config, around)
    problem, sdpa_call = make_problem(call, mask, config), make_sdpa_call(as_found)
    choice = Choice(None)
    if problem is not None and sdpa_call is not None:
        if config.kernel != "auto":
            missing = kernels.get(config.kernel).unavailable_reasons(problem.query.device)
            if missing:
                raise NotEligibleError(f"kernel={config.kernel}", missing)
        # What stays for another reason is not worth a measurement.
        unmeasured = bool(reasons) and config.tune == "measure"
        tuning = dataclasses.replace(config, tune="table") if unmeasured else config
        choice = choose(Comparison(problem, sdpa_call), tuning)
        reasons += choice.reasons
    site = dataclasses.replace(
        site,
        kernel=None if reasons else choice.kernel,
        rewritten=not reasons,
        reasons=tuple(dict.fromkeys(reasons)),
        speedup=choice.speedup,
    )
    return site, choice


def _info(node: Value) -> TensorInfo | None:
    tensor = example_tensor(node)
    return None if tensor is None else TensorInfo.of(tensor)
