"""The ways into the pass: the named `torch.compile` backend, `enabled()`, `explain()` and
`rewrite_exported()`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sage_inductor.config import Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.plan.blocks import blocks_of
from sage_inductor.plan.plan import Plan
from sage_inductor.report.report import Report
from sage_inductor.report.site import AttentionOperator, Site, Unread, unique_names
from sage_inductor.rewriting.attention_operators import attention_operators
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.rewriting.exported import rewrite_program
from sage_inductor.rewriting.planned import planned_names
from sage_inductor.rewriting.selection import unmatched, unmatched_text
from sage_inductor.rewriting.unrecognised import unread
from sage_inductor.torch_internals.dynamo import compiled_one_by_one, surfaced
from sage_inductor.torch_internals.dynamo_entries import without_leaving_dynamo_entries
from sage_inductor.torch_internals.inductor import (
    compile_with_inductor,
    configured_pre_grad_pass,
    inductor_modes,
    pre_grad_pass,
)


def sage_inductor(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="sage_inductor", options={...})`.

    Options named "sage.<field>" make the Config. All others go to Inductor, which compiles the rewritten graph.
    `torch.compile` refuses `mode` beside `options`, so `options={"mode": ...}` means the same here.

    Raises:
        ValueError, TypeError: an option that is not valid, named, with what is.
        NotEligibleError: as from `rewrite_graph`.
    """
    try:
        config, inductor_options = Config.from_options(options)
        mode = _mode(mode, inductor_options)
        rewrite_graph(graph_module.graph, config, example_inputs)
    except (NotEligibleError, ValueError, TypeError) as error:
        raise surfaced(error) from None
    graph_module.recompile()
    return compile_with_inductor(graph_module, example_inputs, mode, inductor_options)


def _mode(mode: str | None, options: dict[str, Any]) -> str | None:
    """Inductor's mode, from the argument or taken out of `options`. Raises ValueError for both, and for an unknown mode."""
    if "mode" in options:
        option = options.pop("mode")
        if mode is not None:
            raise ValueError(f"mode={mode!r} and options={{'mode': {option!r}}}: give one")
        mode = option
    valid = inductor_modes()
    if mode is not None and mode not in valid:
        raise ValueError(f"mode={mode!r} (valid: {', '.join(valid)})")
    return mode


@contextmanager
def enabled(config: Config | None = None) -> Iterator[None]:
    """Inside, plain `torch.compile(model)` rewrites attention: graphs compiled while the context is active do, in whichever
    thread.

    The first call of the compiled model, which compiles it, must happen inside. A pass that is already
    configured in `torch._inductor.config.pre_grad_custom_pass` runs after ours. Warns, once, where nothing was compiled
    inside, and where code that was compiled inside is compiled again outside, for inputs of another shape.
    """
    from sage_inductor.rewriting.graph_pass import SageAttentionPass  # imports Inductor
    from sage_inductor.rewriting.scope import covering_all_threads

    graph_pass = SageAttentionPass(config).before(configured_pre_grad_pass())
    with pre_grad_pass(graph_pass), covering_all_threads(graph_pass):
        yield


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: Config | None = None,
    dynamic: bool | None = None,
    regional: bool | Sequence[str | type[nn.Module]] = False,
    **kwargs: Any,
) -> Report:
    """What `backend="sage_inductor"` would do with `model(*args, **kwargs)`, and why.

    Traces with Dynamo and runs the graphs as they are, eagerly. It compiles nothing. It leaves nothing in Dynamo's caches
    that another call would find, or that counts against the limit of recompiles. Other threads may run and compile models
    meanwhile; one call of `explain` or `calibrate` is under way at a time, others wait. With `tune="measure"`, the default,
    it measures as a compile would, and a later compile finds the results.

    Args:
        model: a module or function.
        args, kwargs: the arguments that it is called with.
        config: as for the backend.
        dynamic: as for `torch.compile`.
        regional: classes of blocks, by name or as types, to compile one by one, as regional compilation does; blocks then
            share a graph. True takes the classes that the model names itself in `_repeated_blocks`, as diffusers'
            `compile_repeated_blocks` does. False compiles the whole model.

    Raises:
        NotEligibleError: as from the backend.
        TypeError: a model that cannot be called, `dynamic` or `regional` of another type.
        ValueError: `regional` names no module of the model.
    """
    chosen = Config.of(config)
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__} (valid: a module, a function)")
    if dynamic not in (True, False, None):
        raise TypeError(f"dynamic={dynamic!r} (valid: True, False, None)")
    sites: list[Site] = []
    graphs = 0
    not_read: list[Unread] = []
    operators: list[AttentionOperator] = []

    def collect(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        judged = copy.deepcopy(graph_module)
        try:
            sites.extend(rewrite_graph(judged.graph, chosen, example_inputs))
            not_read.extend(unread(judged.graph))
            operators.extend(attention_operators(judged.graph))
        except NotEligibleError as error:
            raise surfaced(error) from None
        return graph_module.forward

    blocks = blocks_of(model, regional)
    with without_leaving_dynamo_entries(collect):
        if blocks:
            with compiled_one_by_one(blocks, backend=collect, dynamic=dynamic):
                model(*args, **kwargs)
        else:
            torch.compile(model, backend=collect, dynamic=dynamic)(*args, **kwargs)
    missing: tuple[str, ...] = ()
    if isinstance(chosen.plan, Plan):
        found = {name for site in sites for name in planned_names(chosen.plan, site)}
        known = {site.name for name in found for named in chosen.plan.sites_called(name) for site in named}
        missing = tuple(name for name in chosen.plan.decisions() if name not in known)
    left = unmatched(chosen, sites)
    return Report(
        unique_names(sites),
        graphs,
        missing,
        tuple(not_read),
        tuple(operators),
        unmatched_text(left, sites) if left else "",
    )


def rewrite_exported(
    exported_program: torch.export.ExportedProgram, config: Config | None = None
) -> torch.export.ExportedProgram:
    """A copy of `exported_program` with its eligible attention rewritten; the original is left as it is.

    The result runs, saves, loads and compiles with AOTInductor wherever `import sage_inductor` has registered the
    operators in the Python process; elsewhere torch says that it finds no schema of `sage_inductor::attention`.
    Raises NotEligibleError as the backend does.
    """
    chosen = Config.of(config)
    if not isinstance(exported_program, torch.export.ExportedProgram):
        raise TypeError(
            f"exported_program is a {type(exported_program).__name__} (valid: what torch.export.export returns)"
        )
    result = copy.deepcopy(exported_program)
    rewrite_program(result, chosen)
    return result
