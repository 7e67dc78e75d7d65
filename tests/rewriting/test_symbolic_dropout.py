"""dropout_p as a float argument of a model that is compiled for dynamic shapes, where it is a symbol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sage_inductor import Config, NotEligibleError, explain
from sage_inductor.testing import RewritingBackend, relative_l2

STRICT = Config(kernel="reference", precision="accurate", fallback="error")
pytestmark = pytest.mark.usefixtures("inference")


def with_default(x: Tensor, dropout_p: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)


def passed_on(x: Tensor, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
    """As diffusers' dispatcher for Flux does."""

    def inner(query: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query, None, dropout_p, is_causal)

    return inner(x, dropout_p, is_causal)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout_p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return with_default(x, self.dropout_p)


def scaled(x: Tensor, dropout_p: float = 0.0, scale: float = 0.2) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p, scale=scale)


FUNCTIONS: list[Any] = [with_default, passed_on, Module(), scaled]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_zero_is_known_for_one(function: Any) -> None:
    x = torch.randn(2, 3, 24, 32)
    backend = RewritingBackend(STRICT)
    out = torch.compile(function, backend=backend, dynamic=True)(x)
    assert all(site.rewritten for site in backend.sites) and backend.sites
    assert relative_l2(out, function(x)) < 0.02


@pytest.mark.parametrize("function", FUNCTIONS)
def test_as_many_graphs_as_plain_over_several_lengths(function: Any) -> None:
    counts = []
    for backend in (RewritingBackend(STRICT), "eager"):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager") if backend == "eager" else backend
        compiled = torch.compile(function, backend=counter, dynamic=True)
        for length in (24, 40, 56):
            compiled(torch.randn(2, 3, length, 32))
        counts.append(len(counter.graphs))
    assert counts[0] == counts[1] == 1


@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_is_still_refused_with_its_number(dropout_p: float) -> None:
    x = torch.randn(2, 3, 24, 32)
    backend = RewritingBackend(Config(kernel="reference"))
    torch.compile(with_default, backend=backend, dynamic=True)(x, dropout_p)
    reasons = [reason for site in backend.sites for reason in site.reasons]
    assert f"dropout_p={dropout_p} (supported: 0.0)" in reasons
    with pytest.raises(NotEligibleError, match=f"dropout_p={dropout_p}"):
        explain(with_default, x, dropout_p, config=STRICT, dynamic=True)
