"""Judging a site adds no guard: as many graphs as plain torch.compile makes, over several lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_inductor import Config
from sage_inductor.kernels import sageattention, triton
from sage_inductor.testing import RewritingBackend

LENGTHS = (24, 40, 72, 520)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with one GPU of compute capability 8.9 on which the Triton kernel and sageattention 1.0.6 run."""
    monkeypatch.setattr(triton.TritonKernel, "unavailable_reasons", lambda self, device=None: [])
    monkeypatch.setattr(triton, "capability", lambda index: (8, 9))
    monkeypatch.setattr(triton, "has_gpu", lambda: True)
    monkeypatch.setattr(sageattention, "installed_version", lambda: "1.0.6")
    monkeypatch.setattr(
        sageattention.SageAttentionKernel, "unavailable_reasons", lambda self, device=None: []
    )
    yield


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.mT * 0.2).softmax(-1) @ x


def crossed(x: Tensor) -> Tensor:
    y = x.unflatten(2, (-1, 2)).mean(3)
    return (y @ x.mT * 0.2).softmax(-1) @ x


def biased(x: Tensor) -> Tensor:
    bias = torch.zeros(x.shape[2], x.shape[2], dtype=x.dtype, device=x.device)
    return (x @ x.mT * 0.2 + bias).softmax(-1) @ x


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def graphs(function: Any, backend: Any, device: str, marked: bool) -> int:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=None if marked else True)
    for length in LENGTHS:
        x = torch.empty(2, 3, length, 32, device=device, dtype=torch.bfloat16)
        if marked:
            torch._dynamo.mark_dynamic(x, 2)
        compiled(x)
    return len(backend.graphs)


# Each function with each way of choosing, and each of both with lengths that are marked and with such as are not.
@pytest.mark.parametrize(
    ("tune", "function", "marked"),
    [
        pytest.param(tune, function, marked, marks=[pytest.mark.slow] * ((row + column + marked) % 2))
        for row, tune in enumerate(("table", "off", "measure"))
        for column, function in enumerate((by_hand, crossed, biased))
        for marked in (False, True)
    ],
)
def test_auto_on_a_gpu(ada: None, tune: Any, function: Any, marked: bool) -> None:
    with FakeTensorMode():
        plain = graphs(function, CompileCounterWithBackend("eager"), "cuda", marked)
        backend = RewritingBackend(Config(tune=tune))
        assert graphs(function, backend, "cuda", marked) == plain == 1
    assert len(backend.sites) == 1


# Slow: lengths that are marked, where no kernel is asked about them.
@pytest.mark.parametrize(
    ("kernel", "marked"),
    [("auto", False), ("reference", False), ("reference", True)]
    + [pytest.param("auto", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("function", [by_hand, crossed, biased, sdpa, causal])
def test_on_a_cpu(function: Any, kernel: Any, marked: bool) -> None:
    plain = graphs(function, CompileCounterWithBackend("eager"), "cpu", marked)
    backend = RewritingBackend(Config(kernel=kernel))
    assert graphs(function, backend, "cpu", marked) == plain == 1
    assert all(site.rewritten == (kernel == "reference") for site in backend.sites)
