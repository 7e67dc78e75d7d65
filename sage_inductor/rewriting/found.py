"""Every attention of a graph, before anything in it is rewritten.

A graph and those below it are regions. An attention is a match of a pattern at a node: of the model's own nodes, or of those that
stand in front of an opaque node and say what it computes (`nn.MultiheadAttention` is one).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from sage_inductor.graph.call import AttentionCall
from sage_inductor.graph.surroundings import Surroundings, enter, inside
from sage_inductor.graph.writes import Writes, follow_in_place, submodule_of
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.patterns.sdpa import as_autocast_reads
from sage_inductor.rewriting.masks.understood import Masks
from sage_inductor.rewriting.repeated_heads import absorb_repeated_heads
from sage_inductor.rewriting.substitution import Inlined, insert_expansion


@dataclass(frozen=True, eq=False)
class Region:
    """The root graph, or the graph of a submodule, as matching sees it: before anything in it is rewritten."""

    graph: fx.Graph
    owner: fx.GraphModule | None
    """The submodule whose graph it is; None for the root, which the caller recompiles."""
    writes: Writes
    transformed: set[fx.Node] = field(default_factory=set)
    """Nodes inside functorch transforms."""
    openings: list[Opening] = field(default_factory=list)
    within: Region | None = None
    """The region whose node refers to it first; None for the root."""
    callers: list[fx.Node] = field(default_factory=list)
    """The nodes that call it."""
    calls_within: list[Surroundings] = field(default_factory=list)
    """The surroundings of each call."""

    @property
    def shared(self) -> fx.Graph | None:
        """The outermost graph, this one or one around it, that several calls run, as `nested_compile_region` makes them. None where
        each call has its own."""
        around = None if self.within is None else self.within.shared
        return around or (self.graph if len(self.callers) > 1 else None)

    @cached_property
    def masks(self) -> Masks:
        return Masks(self.graph, self.writes, self.transformed)


@dataclass(frozen=True, eq=False)
class Opening:
    """An opaque node and its expansion, which stands in front of it in the graph."""

    node: fx.Node
    inlined: Inlined


@dataclass(frozen=True)
class Match:
    """A call twice: `call` reads key and value from before their heads were repeated, `as_found` is as the model makes it."""

    call: AttentionCall
    as_found: AttentionCall


@dataclass(frozen=True)
class Found:
    """An attention of the model, called at `node`. `match` is there, or in the expansion of `node` if that is opaque. Where
    `match` is None, `node` is opaque and cannot be opened."""

    node: fx.Node
    pattern: str
    region: Region
    around: Surroundings
    match: Match | None = None
    opening: Opening | None = None
    closed: tuple[str, ...] = ()

    @property
    def around_all_calls(self) -> Surroundings:
        """`around`, with what surrounds any other call of the regions that it is in."""
        joined = self.around
        region: Region | None = self.region
        while region is not None:
            for other in region.calls_within:
                joined = joined.joined(other)
            region = region.within
        return joined


def collect(
    graph: fx.Graph,
    around: Surroundings,
    regions: list[Region],
    visited: dict[int, Region],
    owner: fx.GraphModule | None = None,
    within: Region | None = None,
) -> Iterator[Found]:
    """Every attention of `graph` in the order of its nodes.

    Those of a subgraph come where it is first referred to, with the surroundings there. Nothing is rewritten, but afterwards
    the expansions of opaque nodes stand in front of them. `regions` receives `graph` and all graphs below it; `visited` those
    below it, by the id of their module.
    """
    follow_in_place(graph)
    region = Region(graph, owner, Writes(graph), within=within)
    regions.append(region)
    if owner is not None:
        visited[id(owner)] = region
    for node in list(graph.nodes):
        around = enter(node, around)
        if around.transforms:
            region.transformed.add(node)
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and (called := visited.get(id(submodule_of(operand)))) is not None:
                called.calls_within.append(inside(operand, around))
        submodule = submodule_of(node)
        if submodule is not None:
            if id(submodule) not in visited:
                yield from collect(submodule.graph, inside(node, around), regions, visited, submodule, region)
            called = visited[id(submodule)]
            if node.op == "get_attr":
                called.callers.extend(node.users)
            else:
                called.callers.append(node)
                called.calls_within.append(inside(node, around))
            continue
        yield from _opened(node, region, around)
        match = _match(node, region.writes, around)
        if match is not None:
            yield Found(node, match.call.pattern, region, around, match)


def _opened(node: fx.Node, region: Region, around: Surroundings) -> Iterator[Found]:
    """The attentions inside `node` if that is opaque; one with `closed` reasons if it cannot be opened."""
    for opaque in OPAQUE:
        closed = opaque.closed_reasons(node)
        if closed:
            yield Found(node, opaque.name, region, around, closed=tuple(closed))
            return
        expansion = opaque.expand(node)
        if expansion is not None:
            opening = Opening(node, insert_expansion(node, expansion))
            region.openings.append(opening)
            for inner in opening.inlined.nodes:
                match = _match(inner, region.writes, around)
                if match is not None:
                    yield Found(node, opaque.name, region, around, match, opening)
            return


def _match(node: fx.Node, writes: Writes, around: Surroundings) -> Match | None:
    patterns = [pattern for pattern in ALL if pattern.under_transforms or not around.transforms]
    matches = (pattern.match(node) for pattern in patterns)
    found = next((call for call in matches if call is not None), None)
    if found is None:
        return None
    found = as_autocast_reads(found, around)
    candidates = (absorb_repeated_heads(found), found)
    call = next((call for call in candidates if not writes.overwrite(call)), None)
    return None if call is None else Match(call, found)
