"""Code that is traced knows whether a backend or a pass of this package is to see its graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import sage_inductor
from sage_inductor import Config, SageAttentionPass
from sage_inductor.integrations.transformers.compiling import is_compiled_by_our_pass
from sage_inductor.testing import RewritingBackend


def answer(x: Tensor) -> Tensor:
    return x + (1 if is_compiled_by_our_pass() else 2)


def chained() -> Any:
    """Our pass with another behind it."""

    class Other(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None: ...

        def uuid(self) -> str:
            return "other"

    return SageAttentionPass(Config(), then=Other())


WAYS: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "eager backend": (lambda: {"backend": "eager"}, False),
    "inductor": (dict, False),
    "ours": (lambda: {"backend": "sage_inductor"}, True),
    "ours, with options": (
        lambda: {"backend": "sage_inductor", "options": {"sage.kernel": "reference"}},
        True,
    ),
    "a backend for tests": (lambda: {"backend": RewritingBackend(Config())}, True),
    "our pass": (lambda: {"options": {"pre_grad_custom_pass": SageAttentionPass()}}, True),
    "our pass, chained": (lambda: {"options": {"pre_grad_custom_pass": chained()}}, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_who_compiles(way: str) -> None:
    options, ours = WAYS[way]
    assert torch.compile(answer, **options())(torch.zeros(1)) == (1 if ours else 2)


@pytest.mark.parametrize("inside", [True, False])
def test_enabled(inside: bool) -> None:
    scope: AbstractContextManager[None] = sage_inductor.enabled() if inside else nullcontext()
    with scope:
        assert torch.compile(answer)(torch.zeros(1)) == (1 if inside else 2)


def test_explain_and_eager_mode() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(answer(x))
        return seen[-1]

    assert model(torch.zeros(1)) == 2
    sage_inductor.explain(model, torch.zeros(1))
    assert seen[-1] == 1


def test_one_function_compiled_by_two() -> None:
    """Each backend gets a trace of its own."""
    x = torch.zeros(1)
    assert torch.compile(answer, backend="eager")(x) == 2
    assert torch.compile(answer, backend=RewritingBackend(Config()))(x) == 1
    assert torch.compile(answer, backend="eager")(x) == 2
