"""Tiny, randomly initialised models by family, for the model table: nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("transformers", "diffusers", "timm")


@dataclass(frozen=True)
class Entry:
    """One architecture. `build(implementation)` gives the model and its inputs; "eager" writes attention out, "sdpa"
    calls SDPA. `note` says what an attention that is not found is."""

    name: str
    build: Callable[[str], tuple[nn.Module, dict[str, Any]]]
    implementations: tuple[str, ...] = ("eager", "sdpa")
    note: str = ""


def entries(family: str) -> tuple[Entry, ...]:
    """All of `family`; ImportError where its package, or one that it needs, is not installed."""
    importlib.import_module(family)
    module = importlib.import_module(f"zoo_{family}")
    return tuple(module.ENTRIES)


def ids(*shape: int, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, shape)


def padding(batch: int, length: int, padded: int, left: bool = False) -> Tensor:
    """A tokenizer's mask `[batch, length]`; the last sequence begins or ends in `padded` padding tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(None, padded) if left else slice(length - padded, None)] = 0
    return mask
