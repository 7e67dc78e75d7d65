"""The decision about one attention: its mask, the reasons against it, its precision and its kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import fx

from sage_inductor import kernels
from sage_inductor.config import Config, Precision, Smoothing
from sage_inductor.errors import NotEligibleError
from sage_inductor.graph.call import AttentionCall, Value, example_tensor
from sage_inductor.graph.origin import source_code, source_line
from sage_inductor.graph.places import Places
from sage_inductor.graph.surroundings import Surroundings
from sage_inductor.kernels.forms import parts_of
from sage_inductor.kernels.skipping import Decider
from sage_inductor.patterns.flex_attention import FlexCall
from sage_inductor.patterns.varlen_attention import VarlenAttention
from sage_inductor.report.site import Names, Site, TensorInfo
from sage_inductor.rewriting.block_lists import BlockLists
from sage_inductor.rewriting.eligibility import (
    flex_reasons,
    gradient_reasons,
    ineligible_reasons,
    make_problem,
    make_sdpa_call,
    varlen_reasons,
)
from sage_inductor.rewriting.flex_baseline import standing_flex
from sage_inductor.rewriting.found import Found
from sage_inductor.rewriting.masks import classify
from sage_inductor.rewriting.masks.mask import Mask
from sage_inductor.rewriting.planned import plan_of, verdict_of
from sage_inductor.rewriting.selection import selection_reasons
from sage_inductor.rewriting.sharded import Seen, on_this_rank, ring_parts
from sage_inductor.rewriting.substitution import Substitute, insert_substitute
from sage_inductor.tuning import Choice, Comparison, choose


@dataclass(frozen=True)
class Walk:
    """The facts that hold for one graph and all below it."""

    config: Config
    names: Names
    places: Places
    calls: Mapping[str, int]
    """Attention calls per module path."""
    values: Mapping[fx.Node, Any]
    """The inputs of the graph, as far as they are known."""


@dataclass(frozen=True)
class Decision:
    """The decision about `found`. `insert` puts our operator into the graph; it is None where the attention stays."""

    found: Found
    site: Site
    insert: partial[Substitute] | None = None
    lists: BlockLists | None = None
    """Those of a block_mask, which are looked at in the graph."""


def judge(found: Found, walk: Walk) -> Decision:
    if found.match is None:
        return Decision(found, _closed_site(found, walk))
    call = dataclasses.replace(found.match.call, pattern=found.pattern)
    mask = classify.classify(call, found.region.masks)
    reasons = gradient_reasons(found.node, walk.config) if found.opening is not None else []
    if found.pattern == VarlenAttention.name:
        mask = dataclasses.replace(mask, as_read=None)
        reasons += varlen_reasons(found.node, mask, walk.config, found.around_all_calls)
    flex = FlexCall.of(found.node)
    lists = None if flex is None else BlockLists(flex, mask, found.region.writes)
    if lists is not None:
        reasons += lists.reasons(call, walk.values) + flex_reasons(mask, walk.config)
    as_found = found.match.as_found
    if flex is not None and str(mask) == "causal":
        # a baseline as good as flex_attention, which passes over blocks
        as_found = dataclasses.replace(as_found, attn_mask=None, is_causal=True)
    elif flex is not None and as_found.attn_mask is not None:
        standing = standing_flex(mask, as_found.scale)
        if standing is not None:
            as_found = dataclasses.replace(as_found, attn_mask=None, standing=standing)
    site, choice, mask, moves_to = _decide(as_found, call, mask, walk, found, reasons)
    insert = None
    if site.rewritten:
        insert = partial(insert_substitute, call, mask, site, choice, moves_to, walk.config.wires)
    return Decision(found, site, insert, lists if flex is not None and flex.has_lists else None)


def _closed_site(found: Found, walk: Walk) -> Site:
    node, config = found.node, walk.config
    places = walk.places.of(node, found.region.shared)
    path = places[0].path
    reasons = [*selection_reasons(config, places), *found.closed]
    return Site(
        name=walk.names.next(path),
        module=path,
        source=source_line(node),
        pattern=found.pattern,
        query=None,
        key=None,
        value=None,
        mask="unknown",
        kernel=None,
        precision=config.precision,
        smoothing=config.smoothing,
        skip_threshold=config.skip_threshold,
        skip_by=config.skip_by,
        rewritten=False,
        reasons=tuple(reasons),
        code=source_code(node),
        places=places,
    )


def _decide(
    as_found: AttentionCall,
    call: AttentionCall,
    mask: Mask,
    walk: Walk,
    found: Found,
    reasons: Sequence[str] = (),
) -> tuple[Site, Choice, Mask, tuple[int, ...] | None]:
    """The decision about `call`, which the model makes at the node of `found`; its mask as the kernel is to read it; and the dims by which
    the output is to be sharded (`Seen.moves_to`). `as_found` is the same call with its heads still repeated. `reasons` speak
    against it already."""
    node, around, config = found.node, found.around_all_calls, walk.config
    places = walk.places.of(node, found.region.shared)
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
        smoothing=config.smoothing,
        skip_threshold=config.skip_threshold,
        skip_by=config.skip_by,
        rewritten=False,
        code=source_code(node),
        places=places,
    )
    reasons = [*selection_reasons(config, places), *reasons]
    if config.plan is not None:
        verdict = verdict_of(plan_of(config), site, walk.calls[path])
        if verdict.precision is not None:
            form = parts_of(verdict.precision)
            config = dataclasses.replace(
                config,
                precision=cast(Precision, form.precision),
                smoothing=cast(Smoothing, form.smoothing),
                skip_threshold=form.skip_threshold,
                skip_by=cast(Decider, form.skip_by),
            )
        site = dataclasses.replace(
            site,
            precision=config.precision,
            smoothing=config.smoothing,
            skip_threshold=config.skip_threshold,
            skip_by=config.skip_by,
            rel_l2=verdict.rel_l2,
            skipped=verdict.skipped,
        )
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
