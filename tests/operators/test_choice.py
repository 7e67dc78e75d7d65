"""The kernel that is chosen while Dynamo traces: by what sizes were traced with, without a guard on them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sage_inductor import (
    NotEligibleError,
    attention_prequantized,
    kernels,
    quantize_key_value,
    sage_attention,
)
from sage_inductor.kernels.base import Kernel
from sage_inductor.operators.choice import QuantizationChoice, chosen

pytestmark = pytest.mark.usefixtures("inference")
OPTIONS = {"kernel": "reference", "precision": "accurate", "smoothing": "auto"}


def inputs(length: int) -> list[Tensor]:
    return [torch.randn(2, 2, length, 32) for _ in range(3)]


class Graphs:
    """A backend that counts its graphs."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph_module: Any, example_inputs: Any) -> Any:
        from torch._dynamo import lookup_backend

        self.compiled += 1
        return lookup_backend("aot_eager")(graph_module, example_inputs)


def test_it_keeps_its_contract() -> None:
    q, k, v = inputs(40)
    how = {"kernel_name": "reference", "precision": "fast", "smoothing": "auto"}
    torch.library.opcheck(torch.ops.sage_inductor.choice.default, (q, k, v), how)
    torch.library.opcheck(torch.ops.sage_inductor.choice.default, (None, k, v), {**how, "smoothing": "mean"})


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_it_is_that_of_eager_mode(kernel: str) -> None:
    """For each precision and smoothing."""
    given, found = inputs(40), []

    def ask(q: Tensor, k: Tensor, v: Tensor, precision: str, smoothing: str) -> Tensor:
        found.append(chosen(q, k, v, kernel=kernel, precision=precision, smoothing=smoothing))
        return q * 2

    for precision in kernels.PRECISIONS:
        for smoothing in kernels.SMOOTHINGS:
            torch.compiler.reset()
            torch.compile(ask, backend="eager")(*given, precision, smoothing)
            ask(*given, precision, smoothing)
            assert found[-2] == found[-1], found
            named = QuantizationChoice("reference", precision, "both" if smoothing == "auto" else smoothing)
            assert found[-1] == (named if kernel == "reference" else None)  # "auto" has none on a CPU


def test_lengths_count_as_they_were_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that "auto" takes from 100 keys on is kept below, in the graph that was traced above."""
    from sage_inductor.graph.sizes import size_hint

    reference = kernels.get("reference")

    def not_chosen_reasons(self: Kernel, problem: Any) -> list[str]:
        return [] if (size_hint(problem.key.shape[2]) or 0) >= 100 else ["short"]

    monkeypatch.setattr(type(reference), "not_chosen_reasons", not_chosen_reasons)
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("reference",))
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(type(reference), "only_by_name_reasons", lambda self: [])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        choice = chosen(q, k, v, kernel="auto", precision="fast", smoothing="mean")
        return q * 2 if choice is None else q * 3

    for first, factor in ((120, 3), (80, 2)):
        torch.compiler.reset()
        graphs = Graphs()
        fast = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=True)
        for length in (first, 120, 80, 50):
            given = inputs(length)
            assert torch.equal(fast(*given), given[0] * factor)
        assert graphs.compiled == 1


@pytest.mark.parametrize("dynamic", [True, None])
def test_the_halves_of_a_call_at_symbolic_sizes(dynamic: bool | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        found = quantize_key_value(k, v, q, **OPTIONS)
        return attention_prequantized(q, found, is_causal=True)

    graphs = Graphs()
    fast = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (64, 48, 200):
            given = inputs(length)
            assert torch.equal(fast(*given), sage_attention(*given, is_causal=True, **OPTIONS)), length
    assert graphs.compiled == (1 if dynamic else 2)
    assert not [str(warning.message) for warning in caught if "ynamo" in str(warning.message)]


def test_what_cannot_be_done_says_why() -> None:
    """Also where it is compiled: the call leaves the graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen(q, k, v, kernel="sageattention", precision="fast", smoothing="mean")
        return q * 2

    for call in (attend, torch.compile(attend, backend="eager")):
        with pytest.raises(NotEligibleError, match=r"kernel=sageattention \(supported: "):
            call(*inputs(40))
