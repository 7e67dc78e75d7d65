"""A model that runs in steps (diffusion), compiled once for each set of decisions in its plan."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sage_inductor.plan.blocks import blocks_of
from sage_inductor.plan.plan import Plan
from sage_inductor.torch_internals.dynamo import called_by, compiled_calls


@dataclass(eq=False)
class StepCounter:
    """Counts the steps of a model by an argument that it is called with."""

    model: Callable[..., Any]
    follow: str | None
    step: int = 0
    last: float | None = None
    """The value of the followed argument at the last call."""
    falls: bool | None = None
    """Whether the followed argument goes down from step to step; None during the first step."""

    def reset(self) -> None:
        self.step, self.last, self.falls = 0, None, None

    def advance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Set the step that this call belongs to."""
        value = _value_of(self.model, str(self.follow), args, kwargs)
        if self.last is None:
            self.last = value
        elif value != self.last:
            falls = value < self.last
            if self.falls is None or falls == self.falls:
                self.step, self.falls = self.step + 1, falls
            else:  # it turned back: another run
                self.reset()
            self.last = value


@dataclass(eq=False)
class Stepping:
    """The compiled versions of a model, and its present step."""

    model: Callable[..., Any]
    plan: Plan
    options: dict[str, Any]
    compile_args: dict[str, Any]
    steps: int | None = None
    follow: str | None = None
    regional: bool = False
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    of_step: dict[int, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counter = StepCounter(self.model, self.follow)

    def of(self, model: Callable[..., Any]) -> Stepping:
        """The same for another model, at its first step."""
        return replace(
            self,
            model=model,
            options=dict(self.options),
            compile_args=dict(self.compile_args),
            compiled={},
            of_step={},
        )

    def callable_now(self) -> Callable[..., Any]:
        step = self.counter.step
        if step not in self.of_step:
            plan = self.plan.at(step)
            decisions = tuple((site.name, site.fingerprint, site.decision) for site in plan.sites)
            if decisions not in self.compiled:
                self.compiled[decisions] = self.compile(plan)
            self.of_step[step] = self.compiled[decisions]
        return self.of_step[step]

    def compile(self, plan: Plan) -> Callable[..., Any]:
        """The model compiled with the decisions of a plan that does not depend on the step."""
        arguments: dict[str, Any] = {
            "backend": "sage_inductor",
            "options": {**self.options, "sage.plan": plan},
            **self.compile_args,
        }
        if not self.regional:
            return torch.compile(self.model, **arguments)
        blocks = blocks_of(self.model, True)
        calls = compiled_calls(blocks, **arguments)

        def call(*args: Any, **kwargs: Any) -> Any:
            with called_by(blocks, calls):
                return self.model(*args, **kwargs)

        return call


class SteppedModel(nn.Module):
    """The model that `compile_steps` was given. A call runs the version compiled for the present `step`.

    For a module it is a second object with the same state, and an instance of the module's class. Parameters, submodules,
    hooks, attributes and methods are the module's own, so `pipe.to(...)`, offloading and `save_pretrained` work on it as on
    the module. A call raises ValueError for a step that the plan has no decisions for.
    """

    __slots__ = ("_steps",)  # not in the state that is shared
    _steps: Stepping

    @property
    def step(self) -> int:
        """The step that the next call belongs to, from 0. Set it before each call, e.g. in a pipeline's callback, unless
        an argument is followed. With `steps=n`, step n is step 0 of the next run. Setting it raises ValueError for anything
        but an int from 0, and where an argument is followed."""
        return self._steps.counter.step

    @step.setter
    def step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step={step!r} (valid: an int from 0)")
        if self._steps.follow is not None:
            raise ValueError(
                f"step={step} (valid: not to be set, it is counted by {self._steps.follow!r}; reset() begins anew)"
            )
        self._steps.counter.step = step if self._steps.steps is None else step % self._steps.steps

    @property
    def uncompiled(self) -> Callable[..., Any]:
        """The model itself."""
        return self._steps.model

    def reset(self) -> None:
        """Begin a run: the next call is of step 0."""
        self._steps.counter.reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        steps = self._steps
        if steps.follow is not None:
            steps.counter.advance(args, kwargs)
        return steps.callable_now()(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SteppedModel:
        return stepped(self._steps.of(copy.deepcopy(self._steps.model, memo)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        steps = self._steps
        return _rebuilt, (
            steps.model,
            steps.plan,
            steps.options,
            steps.compile_args,
            steps.steps,
            steps.follow,
            steps.regional,
        )


class _SteppedFunction(SteppedModel):
    """The same for a function. Its attributes are the function's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._steps.model, name)


def compile_steps(
    model: Callable[..., Any],
    plan: Plan,
    *,
    steps: int | None = None,
    follow: str | None = None,
    regional: bool = False,
    options: Mapping[str, Any] | None = None,
    **compile_args: Any,
) -> SteppedModel:
    """`torch.compile(model, backend="sage_inductor")` with the decisions that `plan` holds for each step.

    Ranges that decide alike share one compiled model. Dynamo keeps at most 8 versions of one model, dynamic shapes
    and these counted together (`torch._dynamo.config.recompile_limit`).

        plan = sage_inductor.calibrate(transformer, {0: early_inputs, 10: late_inputs})
        pipe.transformer = sage_inductor.compile_steps(pipe.transformer, plan, follow="timestep")
        pipe(prompt)                                # counts steps by the timestep that the model is called with

        stepped = sage_inductor.compile_steps(transformer, plan)
        for step, timestep in enumerate(timesteps):
            stepped.step = step                     # or told from outside
            noise = stepped(latents, timestep, prompt)

    Args:
        model: the module or function that was calibrated. It stays as it is.
        plan: a plan with ranges of steps. One without decides alike at every step.
        steps: the number of steps of a run. Setting `step` to this number begins the next run at 0, so that a callback at
            the end of each step may set the number of the next.
        follow: the parameter of `model` that tells the steps apart, "timestep" in most models of diffusers. It is a number
            or a tensor; of a tensor the largest element counts (read on the host, which waits for the device). The first
            call is of step 0. A call with another value is of the next step; one with the same value, such as a second
            call for guidance, of the same step. A value that turns back, up where it went down or down where it went up,
            begins a new run at 0. Call `reset()` after a run that was cut short.
        regional: compile the blocks that the model names in `_repeated_blocks` one by one, as diffusers'
            `compile_repeated_blocks` does, not the whole model.
        options: those of `torch.compile(backend="sage_inductor")`, without "sage.plan".
        compile_args: further arguments of `torch.compile`.

    Raises:
        ValueError: an argument that is not valid, named, with what is.
    """
    options = {} if options is None else options
    if "sage.plan" in options:
        raise ValueError("options['sage.plan'] (valid: none here; `plan` is one)")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r} (valid: an int from 1, None)")
    if steps is not None and follow is not None:
        raise ValueError(f"steps={steps} and follow={follow!r} (valid: one of them)")
    if follow is not None and follow not in (names := list(_signature(model).parameters)):
        raise ValueError(f"follow={follow!r} (valid: a parameter of the model: {', '.join(names)})")
    blocks_of(model, regional)
    return _rebuilt(model, plan, dict(options), compile_args, steps, follow, regional)


def _rebuilt(
    model: Callable[..., Any],
    plan: Plan,
    options: dict[str, Any],
    compile_args: dict[str, Any],
    steps: int | None,
    follow: str | None,
    regional: bool = False,
) -> SteppedModel:
    return stepped(Stepping(model, plan, options, compile_args, steps, follow, regional))


def stepped(steps: Stepping) -> SteppedModel:
    """The module that stands for `steps.model`."""
    model = steps.model
    if not isinstance(model, nn.Module):
        function = _SteppedFunction()
        object.__setattr__(function, "_steps", steps)
        return function
    cls = type(model)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # The class has the same name, because pipelines write down the class of each of their models.
    made: SteppedModel = object.__new__(type(cls.__name__, (SteppedModel, cls), {**names, "__slots__": ()}))
    object.__setattr__(made, "__dict__", model.__dict__)
    object.__setattr__(made, "_steps", steps)
    return made


def _signature(model: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)


def _value_of(
    model: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float:
    """The argument `name` of a call, as a number."""
    value = kwargs.get(name)
    if value is None:
        value = _signature(model).bind_partial(*args, **kwargs).arguments.get(name)
    if isinstance(value, Tensor) and value.numel():
        return float(value.detach().max())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} (valid: a number or a tensor: the steps are counted by it)")
    return float(value)
