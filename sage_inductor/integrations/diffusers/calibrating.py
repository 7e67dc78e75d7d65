"""`calibrate_pipeline`: a plan for each model that runs in a pipeline's steps, and what it costs the finished output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sage_inductor.calibration.calibrate import calibrate
from sage_inductor.config import Config
from sage_inductor.integrations.diffusers import dispatch, internals
from sage_inductor.integrations.diffusers.pipelines import denoisers, time_argument, uncompiled
from sage_inductor.integrations.diffusers.quality import OutputLoss, output_loss
from sage_inductor.measurement.progress import ProgressCallback
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.stepped import StepCounter, Stepping, stepped
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.torch_internals.dynamo import called_by

Samples = dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]


@dataclass(frozen=True)
class PipelineCalibration:
    """What `calibrate_pipeline` found. `compile(pipeline, plan=...)` takes it as it is."""

    plans: Mapping[str, Plan]
    """By the pipeline's name for the model, decisions for ranges of steps."""
    steps: Mapping[str, int]
    """The number of steps that each model ran."""
    loss: OutputLoss
    """What the finished images or videos lose with all of the plans applied."""

    @property
    def plan(self) -> Plan:
        """The plan, where one model runs in steps. Raises ValueError where there are several."""
        if len(self.plans) != 1:
            raise ValueError(f"plan of {len(self.plans)} models (valid: plans[...]: {', '.join(self.plans)})")
        return next(iter(self.plans.values()))

    def __str__(self) -> str:
        parts = [f"{name}, {self.steps[name]} steps\n{plan}" for name, plan in self.plans.items()]
        return "\n\n".join([*parts, f"the pipeline's output with all of it: {self.loss}"])


def calibrate_pipeline(
    pipeline: Any,
    *,
    tolerance: float | None = None,
    ranges: int = 4,
    metric: str = "rel_l2",
    effect: str = "none",
    config: Config | None = None,
    skip: bool = False,
    progress: ProgressCallback | None = None,
    **call_arguments: Any,
) -> PipelineCalibration:
    """Run `pipeline(**call_arguments)`, measure each precision at each attention of its steps, and give each the fastest one
    that holds `tolerance`; then run it again with what was decided, and compare the two outputs.

        found = calibrate_pipeline(pipeline, tolerance=0.05, prompt="a cat", num_inference_steps=28)
        print(found)
        compile(pipeline, plan=found)
        found.plan.save("plan.json")

    It takes two runs of the pipeline, and as many calls of the model as `ranges` has, three precisions in each. Both runs draw
    the same random numbers: a `generator` among the arguments is put back in between, and torch's own seed is 0. The pipeline
    is as it was afterwards. Models that are compiled are run as if they were not.

    Args:
        pipeline: a pipeline of diffusers, on the device and in the dtype in which it will run.
        tolerance, metric, effect, config, skip, progress: as for `sage_inductor.calibrate`. effect="none", the default, leaves out
            what each site does to the model's output, which takes a run of the model for each.
        ranges: how many ranges of steps decide by themselves. One step of each is measured, the first: of 28 steps and 4
            ranges 0, 7, 14 and 21.
        call_arguments: those of the pipeline. `output_type` is "np" unless it is given.

    Raises:
        TypeError, ValueError: an argument that is not valid; no model that runs in steps; a model that is set to an attention
            backend of `register`, or to one of diffusers' Sage backends, whose attention is not exact; a model with a cache of
            blocks enabled (`enable_cache`); an output without images.
        RuntimeError: no model was called in steps.
    """
    if isinstance(ranges, bool) or not isinstance(ranges, int) or ranges < 1:
        raise ValueError(f"ranges={ranges!r} (valid: an int from 1)")
    chosen = Config.of(config)
    models = {name: uncompiled(model) for name, model in denoisers(pipeline).items()}
    for name, model in models.items():
        used = internals.backends_in_use(model)
        inexact = [backend for backend in used if backend in dispatch.registered() or "sage" in backend]
        if inexact:
            raise ValueError(
                f"{name} has the attention backend {', '.join(inexact)} (valid: one that is exact; {name}.reset_attention_backend(), "
                "or leave diffusers.attention_backend(...))"
            )
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"{name} has a cache of blocks enabled (valid: none while it is calibrated, every block runs in each step; "
                f"{name}.disable_cache())"
            )
    if (
        "output_type" not in call_arguments
        and "output_type" in inspect.signature(pipeline.__call__).parameters
    ):
        call_arguments["output_type"] = "np"
    run = _Runs(pipeline, call_arguments)
    recorders = {name: _Recorder(model, time_argument(model)) for name, model in models.items()}
    with _in_place(pipeline, models), _as_if_uncompiled(models):
        with ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder.recording())
            exact = run()
        recorders = {name: recorder for name, recorder in recorders.items() if recorder.samples}
        if not recorders:
            raise RuntimeError(
                f"{type(pipeline).__name__} called none of {', '.join(models)}: nothing was measured"
            )
        plans = {
            name: calibrate(
                models[name], recorder.spread(ranges), tolerance=tolerance, metric=metric, effect=effect, config=config,
                skip=skip, progress=progress,
            )
            for name, recorder in recorders.items()
        }  # fmt: skip
        if chosen.kernel == "auto" and not any(recorder.on_gpu for recorder in recorders.values()):
            chosen = replace(
                chosen, kernel="reference"
            )  # what `calibrate` measures with where no kernel can run
        planned = {
            name: stepped(
                _Eager(models[name], plan, {}, {}, follow=time_argument(models[name]), config=chosen)
            )
            for name, plan in plans.items()
        }
        with _in_place(pipeline, planned):
            loss = output_loss(run(), exact)
    return PipelineCalibration(plans, {name: len(one.samples) for name, one in recorders.items()}, loss)


class _Runs:
    """Runs the pipeline, each time with the same random numbers."""

    def __init__(self, pipeline: Any, arguments: Mapping[str, Any]) -> None:
        self.pipeline = pipeline
        self.arguments = arguments
        given = arguments.get("generator")
        generators = given if isinstance(given, (list, tuple)) else [given]
        self.generators = [one for one in generators if isinstance(one, torch.Generator)]
        self.states = [generator.get_state() for generator in self.generators]

    def __call__(self) -> Any:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return self.pipeline(**self.arguments)


class _Recorder:
    """Keeps the arguments of each call of a model, by step."""

    def __init__(self, model: nn.Module, time: str) -> None:
        self.model = model
        self.samples: Samples = {}
        self._counter = StepCounter(model, time)
        self.on_gpu = False
        self._kept: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._counter.advance(args, kwargs)
            self.samples.setdefault(self._counter.step, []).append((self._copy(args), self._copy(kwargs)))

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def spread(self, ranges: int) -> dict[int, list[Any]]:
        """The samples of the first step of each range, in the form that `calibrate` takes."""
        count = len(self.samples)
        chosen = sorted({index * count // ranges for index in range(min(ranges, count))})
        return {step: [_call_of(self.model, *sample) for sample in self.samples[step]] for step in chosen}

    def _copy(self, value: Any) -> Any:
        """A copy that later steps do not change. What is the same in each step, such as the embedded prompt, is kept once."""
        if isinstance(value, Tensor):
            for kept in self._kept:
                if kept.shape == value.shape and kept.dtype == value.dtype and torch.equal(kept, value):
                    return kept
            self.on_gpu |= value.is_cuda
            self._kept = [*self._kept[-31:], value.detach().clone()]
            return self._kept[-1]
        if isinstance(value, dict):
            return {name: self._copy(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return value


def _call_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments, all by name."""
    bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
    names = list(bound.arguments.items())[1:]
    return {key: item for name, value in names for key, item in _by_name(bound.signature, name, value)}


def _by_name(signature: inspect.Signature, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
        yield from value.items()
    else:
        yield name, value


@dataclass(eq=False)
class _Eager(Stepping):
    """The model's versions, rewritten and run eagerly: attention as it was decided, all else as it is without a compiler."""

    config: Config = Config()

    def compile(self, plan: Plan) -> Callable[..., Any]:
        chosen = replace(self.config, plan=plan)

        def rewritten(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            rewrite_graph(graph_module.graph, chosen)
            graph_module.recompile()
            return graph_module.forward

        return torch.compile(self.model, backend=rewritten, dynamic=False)


@contextmanager
def _in_place(pipeline: Any, models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, `pipeline` has these models."""
    before = {name: getattr(pipeline, name) for name in models}
    try:
        for name, model in models.items():
            setattr(pipeline, name, model)
        yield
    finally:
        for name, model in before.items():
            setattr(pipeline, name, model)


@contextmanager
def _as_if_uncompiled(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, calls of these models and of what they hold run no compiled code."""
    modules = [module for model in models.values() for module in model.modules()]
    with called_by(modules, [None] * len(modules)):
        yield
