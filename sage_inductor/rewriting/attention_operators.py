"""Operators that compute attention by themselves, such as `vllm::…` or this package's own: listed in a report."""

from __future__ import annotations

import re

from torch import fx

from sage_inductor.graph.origin import source_code, source_line
from sage_inductor.graph.places import Places
from sage_inductor.graph.writes import submodule_of
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.report.site import AttentionOperator
from sage_inductor.torch_internals.operators import operator_name

# Names of operators: xformers::efficient_attention_forward_cutlass, vllm::unified_attention.
_ATTENTION = re.compile("attention|attn|fmha", re.IGNORECASE)


def attention_operators(graph: fx.Graph, places: Places | None = None) -> tuple[AttentionOperator, ...]:
    """Operators whose name says that they compute attention, in `graph` and the graphs of its submodules, without its sites.
    `graph` has been rewritten before."""
    places = Places() if places is None else places
    found: list[AttentionOperator] = []
    for node in graph.nodes:
        submodule = submodule_of(node)
        if submodule is not None:
            found += attention_operators(submodule.graph, places)
            continue
        name = operator_name(node.target)
        if name is not None and _ATTENTION.search(name) and not _is_site(node):
            where = places.of(node)[0].path
            found.append(AttentionOperator(where, source_line(node), name, source_code(node)))
    return tuple(found)


def _is_site(node: fx.Node) -> bool:
    """Whether the pass wrote `node`, or judges it as a site."""
    return (
        "sage_site" in node.meta
        or any(pattern.match(node) is not None for pattern in ALL)
        or any(opaque.closed_reasons(node) or opaque.expand(node) is not None for opaque in OPAQUE)
    )
