"""What a model promises about its attention, by which it is known which masks it can work with."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sage_inductor.integrations.transformers.internals import takes_sdpa_masks

_answers: dict[type, bool] = {}
_loaded = [0]
"""How many modules were loaded when `_answers` were given. A package's models may be spread over files."""


def takes_bools(config: type) -> bool:
    """Whether all models with a `config` of this class promise to hand their masks on to the attention function alone: those
    that work with "sdpa", or with attention functions that transformers does not know. Others may add them to scores.

    False where no model is found. Warns, once, where models compute their attention by themselves.
    """
    answer = _takes_bools(config)
    if not answer and not torch.compiler.is_compiling():
        _warn_if_by_itself(config)
    return answer


def _takes_bools(config: type) -> bool:
    if _loaded[0] != len(sys.modules):
        _answers.clear()
        _loaded[0] = len(sys.modules)
    if config not in _answers:
        models = [model for module in _files(config) for model in _models(module, config)]
        _answers[config] = bool(models) and all(map(takes_sdpa_masks, models))
    return _answers[config]


# Dynamo calls it while tracing, and takes the answer for a constant.
_takes_bools._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _files(config: type) -> list[ModuleType]:
    """The loaded `modeling_*` beside `config`, or beside the class that it is derived from."""
    for cls in config.__mro__:
        prefix = cls.__module__.rpartition(".")[0] + ".modeling_"
        found = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
        if found:
            return found
    return []


def _models(module: ModuleType, config: type) -> list[Any]:
    from transformers import PreTrainedModel

    def serves(model: Any) -> bool:
        # A base class of several models may name none.
        return model.config_class is None or issubclass(config, model.config_class)

    classes = _own_classes(module, PreTrainedModel)
    return [model for model in classes if serves(model)]


def _own_classes(module: ModuleType, base: Any) -> list[Any]:
    """The classes that `module` defines, out of those derived from `base`."""
    found = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, base)]
    return [item for item in found if item.__module__ == module.__name__]


def _warn_if_by_itself(config: type) -> None:
    files = [module for module in _files(config) if not hasattr(module, "ALL_ATTENTION_FUNCTIONS")]
    classes = [cls.__name__ for module in files for cls in _own_classes(module, nn.Module)]
    attentions = [name for name in classes if "Attention" in name]
    if attentions:
        warnings.warn(
            f"{attentions[0]} computes attention by itself, and asks for no attention function: it stays as it is "
            '(torch.compile(model, backend="sage_inductor") finds attention by hand)',
            stacklevel=2,
        )
