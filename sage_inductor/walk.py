"""The way through a graph: finds every attention in it, judges each, rewrites those that are eligible."""

from __future__ import annotations

import dataclasses
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from sage_inductor import kernels, masks, workarounds
from sage_inductor.aliasing import follow_in_place, is_overwritten, writes_in_place
from sage_inductor.call import AttentionCall, Expansion, Value, example_tensor
from sage_inductor.config import Config
from sage_inductor.eligibility import (
    Surroundings,
    gradient_reasons,
    ineligible_reasons,
    kernel_reasons,
    make_problem,
)
from sage_inductor.errors import NotEligibleError
from sage_inductor.gqa import absorb_repeated_heads
from sage_inductor.inductor import pinned_sdpa_backends
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.report import Site, TensorInfo, unique_names
from sage_inductor.rewrite import insert_expansion, rewrite

log = logging.getLogger(__name__)


def rewrite_graph(graph: fx.Graph, config: Config) -> tuple[Site, ...]:
    """Rewrite `graph` and the graphs of its submodules in place, as `config` says. Returns every site found.

    Raises NotEligibleError where a kernel that was asked for by name cannot run on this machine, and, with
    `fallback="error"`, where any site stays.
    """
    sites = unique_names(_walk(graph, config, Surroundings(_ambient_pin()), set()))
    for site in sites:
        log.debug("%s", site)
    rewritten = sum(site.rewritten for site in sites)
    if sites:
        log.info("%d of %d attention(s) rewritten (kernel=%s)", rewritten, len(sites), config.kernel)
    _fall_back([site for site in sites if not site.rewritten], config)
    return sites


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


def _walk(graph: fx.Graph, config: Config, around: Surroundings, visited: set[int]) -> Iterator[Site]:
    """Judge the nodes of `graph` in order; a subgraph where it is first referred to, in its surroundings
    there."""
    constants: dict[fx.Node, Tensor | None] = {}
    follow_in_place(graph)
    writers = [node for node in graph.nodes if writes_in_place(node)]
    for node in list(graph.nodes):
        around = _enter(node, around)
        submodule = _submodule(node)
        if submodule is not None and id(submodule) not in visited:
            visited.add(id(submodule))
            yield from _walk(submodule.graph, config, around, visited)
            submodule.recompile()
            continue
        for opaque in OPAQUE:
            closed = opaque.closed_reasons(node)
            if closed:
                yield _closed_site(node, opaque.name, closed, config)
                break
            expansion = opaque.expand(node)
            if expansion is not None:
                yield from _judge_expansion(node, opaque.name, expansion, config, around, constants, writers)
                break
        call = _match(node, writers, around)
        if call is not None:
            yield _judge(call, config, around, constants)
    workarounds.apply(graph)


def _closed_site(node: fx.Node, pattern: str, reasons: list[str], config: Config) -> Site:
    name = module_path(node)
    reasons = config.selection_reasons(name) + reasons
    return Site(
        name=name,
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
    )


def _match(node: fx.Node, writers: list[fx.Node], around: Surroundings) -> AttentionCall | None:
    patterns = [pattern for pattern in ALL if pattern.under_transforms or not around.transforms]
    matches = (pattern.match(node) for pattern in patterns)
    found = next((call for call in matches if call is not None), None)
    if found is None:
        return None
    candidates = (absorb_repeated_heads(found), found)
    return next((call for call in candidates if not is_overwritten(call, writers)), None)


def _judge(
    call: AttentionCall, config: Config, around: Surroundings, constants: dict[fx.Node, Tensor | None]
) -> Site:
    """The decision about `call`, carried out."""
    mask = masks.classify(call, constants)
    site = _decide(call, mask, config, around, module_path(call.node), source_line(call.node))
    if site.rewritten:
        assert site.kernel is not None
        rewrite(call, mask, site.kernel, config.precision)
    return site


def _judge_expansion(
    node: fx.Node,
    pattern: str,
    expansion: Expansion,
    config: Config,
    around: Surroundings,
    constants: dict[fx.Node, Tensor | None],
    writers: list[fx.Node],
) -> Iterator[Site]:
    """The attention inside an opaque node. The node gives way to its expansion only where that wins something."""
    name, source = module_path(node), source_line(node)
    gradients = gradient_reasons(node, config)
    inlined = insert_expansion(node, expansion)
    decided = []
    matches = [_match(inner, writers, around) for inner in inlined.nodes]
    for call in [call for call in matches if call is not None]:
        call = dataclasses.replace(call, pattern=pattern)
        mask = masks.classify(call, constants)
        decided.append((call, mask, _decide(call, mask, config, around, name, source, gradients)))
    if any(site.rewritten for _, _, site in decided):
        inlined.replace(node)
    else:
        inlined.remove()
    for call, mask, site in decided:
        if site.rewritten and site.kernel is not None:
            rewrite(call, mask, site.kernel, config.precision)
        yield site


def _decide(
    call: AttentionCall,
    mask: masks.Mask,
    config: Config,
    around: Surroundings,
    name: str,
    source: str,
    reasons: Sequence[str] = (),
) -> Site:
    reasons = [
        *config.selection_reasons(name),
        *reasons,
        *ineligible_reasons(call, mask, config, around),
    ]
    problem = make_problem(call, mask, config)
    kernel: str | None = None
    if problem is not None:
        if config.kernel != "auto":
            missing = kernels.get(config.kernel).unavailable_reasons(problem.query.device)
            if missing:
                raise NotEligibleError(f"kernel={config.kernel}", missing)
        kernel, against = kernel_reasons(problem, config)
        reasons += against
    return Site(
        name=name,
        source=source,
        pattern=call.pattern,
        query=_info(call.query),
        key=_info(call.key),
        value=_info(call.value),
        mask=str(mask),
        kernel=None if reasons else kernel,
        precision=config.precision,
        rewritten=not reasons,
        reasons=tuple(dict.fromkeys(reasons)),
    )


def _info(node: Value) -> TensorInfo | None:
    tensor = example_tensor(node)
    return None if tensor is None else TensorInfo.of(tensor)


def _submodule(node: fx.Node) -> fx.GraphModule | None:
    if node.op not in ("get_attr", "call_module"):
        return None
    owner = node.graph.owning_module
    try:
        target = None if owner is None else operator.attrgetter(str(node.target))(owner)
    except AttributeError:
        return None
    return target if isinstance(target, fx.GraphModule) else None


def _ambient_pin() -> tuple[str, ...] | None:
    """The SDPA backends a surrounding `sdpa_kernel(...)` leaves, None when nothing is pinned. The math
    backend serves everything, so only an explicit choice ever excludes it, or leaves it alone."""
    enabled = pinned_sdpa_backends()
    return None if "MATH" in enabled and len(enabled) > 1 else enabled


def _enter(node: fx.Node, around: Surroundings) -> Surroundings:
    """The surroundings behind `node`, which may open or close a transform or an `sdpa_kernel` region."""
    if node.op != "call_function":
        return around
    name = getattr(node.target, "__name__", "")
    if name.endswith("_increment_nesting"):
        transform = name.removeprefix("_").removesuffix("_increment_nesting")
        return Surroundings(around.pinned, (*around.transforms, transform))
    if name.endswith("_decrement_nesting"):
        return Surroundings(around.pinned, around.transforms[:-1])
    if name == "_sdpa_kernel":
        backends = tuple(_backend_name(item) for item in node.args[0])  # type: ignore[union-attr]
        everything = set(backends) >= set(pinned_sdpa_backends())
        return Surroundings(_ambient_pin() if everything else backends, around.transforms)
    return around


def _backend_name(item: Any) -> str:
    """Dynamo writes a backend as a node that makes it from its name."""
    return str(item.args[0]) if isinstance(item, fx.Node) else str(getattr(item, "name", item))


def module_path(node: fx.Node) -> str:
    """ "blocks.0.attn1" from the metadata of Dynamo or export; "<root>" outside any submodule."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "<root>"
    path = str(list(stack.values())[-1][0])
    # Dynamo reaches the children of a module that has a __getattr__ of its own through its __dict__.
    path = path.replace(".__dict__['_modules']", "").replace("._modules", "")
    if path.startswith(("L[", "G[")):  # the local or global variable that holds the model
        path = path.partition("]")[2]
    return (
        path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").lstrip(".") or "<root>"
    )


def source_line(node: fx.Node) -> str:
    """ "file.py:123", the innermost frame of user code that made the call."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line]
    if not frames:
        return "?"
    file, _, rest = frames[-1].removeprefix('File "').partition('", line ')
    return f"{Path(file).name}:{rest.partition(',')[0]}"
