"""`compile`: all that runs in a pipeline's steps compiled with 8-bit attention, in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from typing import Any, TypeAlias, TypeVar

from sage_inductor.config import OPTION_PREFIX, Config
from sage_inductor.integrations.diffusers.calibrating import PipelineCalibration
from sage_inductor.integrations.diffusers.pipelines import denoisers, time_argument, uncompiled
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.stepped import compile_steps

log = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")
PlanLike: TypeAlias = "Plan | str | PathLike[str]"
OF_TORCH = ("dynamic", "fullgraph", "mode", "options")


def compile(
    pipeline: Pipeline,
    regional: bool = True,
    plan: PlanLike | Mapping[str, PlanLike] | PipelineCalibration | None = None,
    **options: Any,
) -> Pipeline:
    """Compile what runs in the steps of `pipeline` (transformer, unet, controlnet, ...) with 8-bit attention.

        compile(pipeline)
        compile(pipeline, precision="balanced", exclude=("*.attn2",))
        compile(pipeline, plan="plan.json", fullgraph=True)

    The pipeline is changed in place. Its models stay modules of their classes with their weights: it moves, offloads and saves
    them as before. With a plan that differs from step to step, they follow the scheduler's step by themselves.

    Args:
        pipeline: a pipeline of diffusers.
        regional: compile the blocks of a model one by one, as `compile_repeated_blocks` does: they share one graph, which
            takes a fraction of the time. A model that names no repeated blocks is compiled whole. False compiles all whole.
        plan: what `calibrate_pipeline` returned; or a plan, or the path of one, where one model runs in steps; or a dict of
            those by the pipeline's names for its models. A model that is not in it is compiled by `options`.
        options: fields of `sage_inductor.Config`, but plan; and dynamic, fullgraph, mode and options of `torch.compile`.

    Returns:
        `pipeline`.

    Raises:
        TypeError: an option that there is not, or no pipeline.
        ValueError: a value that is not valid, a plan for a model that the pipeline does not have, or no model that runs in
            steps.
    """
    models = {name: uncompiled(model) for name, model in denoisers(pipeline).items()}
    plans = _plans(plan, list(models))
    compile_args, inductor = _split(options)
    for name, model in models.items():
        in_blocks = regional and bool(getattr(model, "_repeated_blocks", None))
        if regional and not in_blocks:
            log.info("%s, a %s, names no repeated blocks: it is compiled whole", name, type(model).__name__)
        if name in plans and plans[name].ranges():
            stepped = compile_steps(
                model, plans[name], follow=time_argument(model), regional=in_blocks, options=inductor, **compile_args
            )  # fmt: skip
            setattr(pipeline, name, stepped)
            continue
        setattr(pipeline, name, model)
        chosen = {**inductor, OPTION_PREFIX + "plan": plans[name]} if name in plans else inductor
        arguments = {"backend": "sage_inductor", "options": chosen, **compile_args}
        if in_blocks:
            repeated: Any = model
            repeated.compile_repeated_blocks(**arguments)
        else:
            model.compile(**arguments)
    return pipeline


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of `torch.compile`, its options with ours among them). Checks values of ours."""
    own = {field.name: field for field in fields(Config) if field.name != "plan"}
    unknown = [name for name in options if name not in own and name not in OF_TORCH]
    if unknown:
        raise TypeError(f"{', '.join(unknown)} (valid: {', '.join([*own, *OF_TORCH])})")
    inductor = dict(options.get("options") or {})
    inductor.update({OPTION_PREFIX + name: value for name, value in options.items() if name in own})
    if options.get("mode") is not None:  # torch.compile takes one or the other
        inductor["mode"] = options["mode"]
    if OPTION_PREFIX + "plan" in inductor:
        raise ValueError("options['sage.plan'] (valid: none here; `plan` is one)")
    Config.from_options(inductor)
    return {name: options[name] for name in ("dynamic", "fullgraph") if name in options}, inductor


def _plans(plan: Any, names: list[str]) -> dict[str, Plan]:
    """The plan of each model that has one."""
    if plan is None:
        return {}
    if isinstance(plan, PipelineCalibration):
        plan = plan.plans
    if not isinstance(plan, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"one plan for {len(names)} models (valid: a dict of plans by {', '.join(names)})"
            )
        plan = {names[0]: plan}
    unknown = [name for name in plan if name not in names]
    if unknown:
        raise ValueError(f"plan for {', '.join(map(str, unknown))} (valid: {', '.join(names)})")
    result = {}
    for name, one in plan.items():
        if isinstance(one, (str, PathLike)):
            one = Plan.load(one)
        if not isinstance(one, Plan):
            raise TypeError(f"plan={one!r} (valid: a Plan, the path of one, a dict of those, None)")
        result[name] = one
    return result
