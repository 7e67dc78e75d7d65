"""A model that runs in steps (diffusion), compiled once for each set of decisions that its plan holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sage_inductor.plan.plan import Plan


class SteppedModel:
    """Runs the compiled model of the present `step`; every other attribute is the model's own.

    Set `step` before each call, e.g. in a pipeline's callback. Raises ValueError for a step outside the plan.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        plan: Plan,
        options: Mapping[str, Any],
        compile_args: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._plan = plan
        self._options = dict(options)
        self._compile_args = dict(compile_args)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._of_step: dict[int, Callable[..., Any]] = {}
        self.step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.step not in self._of_step:
            self._of_step[self.step] = self._compiled_for(self.step)
        return self._of_step[self.step](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not there yet: while unpickling or copying
            raise AttributeError(name)
        return getattr(self._model, name)

    def _compiled_for(self, step: int) -> Callable[..., Any]:
        plan = self._plan.at(step)
        decisions = tuple((site.name, site.fingerprint, site.decision) for site in plan.sites)
        if decisions not in self._compiled:
            options = {**self._options, "sage.plan": plan}
            self._compiled[decisions] = torch.compile(
                self._model, backend="sage_inductor", options=options, **self._compile_args
            )
        return self._compiled[decisions]


def compile_steps(
    model: Callable[..., Any],
    plan: Plan,
    *,
    options: Mapping[str, Any] | None = None,
    **compile_args: Any,
) -> SteppedModel:
    """`torch.compile(model, backend="sage_inductor")` with the decisions that `plan` holds for each step.

    Ranges that decide alike share one compiled model. Dynamo keeps at most 8 versions of one model, dynamic shapes
    and these counted together (`torch._dynamo.config.recompile_limit`).

        plan = sage_inductor.calibrate(transformer, {0: early_inputs, 10: late_inputs})
        stepped = sage_inductor.compile_steps(transformer, plan)
        for step, timestep in enumerate(timesteps):
            stepped.step = step
            noise = stepped(latents, timestep, prompt)

    Args:
        model: the module or function that was calibrated.
        plan: one with ranges of steps; one without decides alike at every step.
        options: as for `torch.compile(backend="sage_inductor")`, without "sage.plan".
        compile_args: further arguments of `torch.compile`.
    """
    options = {} if options is None else options
    if "sage.plan" in options:
        raise ValueError("options['sage.plan'] (valid: none here; `plan` is one)")
    return SteppedModel(model, plan, options, compile_args)
