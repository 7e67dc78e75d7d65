"""Which models of a pipeline run in steps, and by which argument their steps are told apart."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from sage_inductor.plan.stepped import SteppedModel
from sage_inductor.torch_internals.dynamo import inside_compiled

# What the models of diffusers call it. The value changes with each step.
TIMES = ("timestep", "timesteps", "timestep_ratio", "t")


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The models of `pipeline` that run once or more in each step, by the names that the pipeline has for them: transformer,
    transformer_2, unet, controlnet, ...

    Raises:
        TypeError: `pipeline` has no `components`.
        ValueError: none of them takes a timestep. Names the models that there are.
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipeline is a {type(pipeline).__name__} (valid: a pipeline of diffusers)")
    models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    found = {name: model for name, model in models.items() if _time_of(uncompiled(model)) is not None}
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no model that takes a timestep (valid: one of {', '.join(TIMES)} among the "
            f"parameters of its forward; the models: {', '.join(models) or 'none'})"
        )
    return found


def time_argument(model: nn.Module) -> str:
    """The parameter of a denoiser, not compiled, that tells its steps apart."""
    name = _time_of(model)
    assert name is not None
    return name


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` or `compile_steps` was given, or `model` itself."""
    model = inside_compiled(model)
    if not isinstance(model, SteppedModel):
        return model
    assert isinstance(model.uncompiled, nn.Module)
    return model.uncompiled


def _time_of(model: nn.Module) -> str | None:
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in TIMES if name in parameters), None)
