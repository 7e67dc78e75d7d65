"""Windows whose bounds the graph computes: from a length, or of an int that changes from call to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sage_inductor import Config
from sage_inductor.operators import inference
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")


def qkv(length: int, gradients: bool = False) -> list[Tensor]:
    return [torch.randn(2, length, 2, 32, requires_grad=gradients).transpose(1, 2) for _ in range(3)]


def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return given(q, k, v, q.shape[2] // 2)


def given(q: Tensor, k: Tensor, v: Tensor, window: Any) -> Tensor:
    at = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, (at <= at[:, None]) & (at > at[:, None] - window))


def later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    return F.scaled_dot_product_attention(
        q, k, v, torch.ones(length, length, dtype=torch.bool).tril(length // 4)
    )


def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at, window = torch.arange(q.shape[2]), q.shape[2] // 4
    return F.scaled_dot_product_attention(q, k, v, (at - at[:, None]).abs() <= window)


def masks(model: Callable[..., Tensor], calls: Sequence[Sequence[Any]]) -> list[str]:
    """What is understood in each graph; as many as plainly, values checked against float64."""
    plain, backend = CompileCounter(), RewritingBackend(CONFIG)
    for compiler in (plain, backend):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=compiler)
        for args in calls:
            out = compiled(*args)
            if compiler is backend:
                exact = model(
                    *(item.double() if isinstance(item, Tensor) and item.dim() else item for item in args)
                )
                assert relative_l2(out, exact) < 0.013 and max_error(out, exact) < 0.06
                assert out.stride() == exact.stride()
    assert len(backend.graphs) == plain.frame_count
    return [site.mask for site in backend.sites]


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (half, "sliding_window left=computed right=0 (symbolic)"),
        (later, "band left=all right=computed (symbolic)"),
        (both, "band left=computed right=computed (symbolic)"),
    ],
)
def test_of_a_length(model: Callable[..., Tensor], kind: str) -> None:
    assert masks(model, [qkv(24), qkv(32), qkv(40)])[1:] == [kind]


@pytest.mark.usefixtures("inference")
def test_of_an_int_that_changes() -> None:
    inputs = qkv(24)
    found = masks(given, [(*inputs, window) for window in (5, 7, 30)])
    assert found == ["sliding_window left=4 right=0", "sliding_window left=computed right=0"]
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(given, backend=backend)
    for window in (5, 7, -3):
        out = compiled(*inputs, window)
    assert (
        not out.any() and len(backend.graphs) == 2
    )  # queries see no key, and nobody takes that for no bound


@pytest.mark.usefixtures("inference")
def test_of_a_tensor_it_is_read() -> None:
    inputs = qkv(24)
    assert masks(given, [(*inputs, torch.tensor(window)) for window in (5, 9)]) == ["bool"]


def test_where_gradients_are_wanted_the_mask_is_read() -> None:
    torch.compiler.reset()
    backend = RewritingBackend(Config(kernel="reference", precision="accurate", training=True))
    compiled = torch.compile(half, backend=backend)
    for length in (24, 32):
        inputs = qkv(length, gradients=True)
        assert relative_l2(compiled(*inputs), half(*inputs)) < 0.013
    assert backend.sites[-1].rewritten
    (call,) = (node for node in backend.graphs[-1].graph.nodes if "attention" in str(node.target))
    assert len(call.args) == 4 and "window_left" not in call.kwargs


def test_a_bound_that_is_negative() -> None:
    q, k, v = qkv(24)
    options = {"kernel_name": "reference", "precision": "accurate", "window_left": -2}
    whole = inference.attention(q, k, v, None, True, **options)
    out, lse = torch.ops.sage_inductor.attention_lse(q, k, v, None, True, left_is_bound=True, **options)
    assert whole.any() and not out.any() and out.stride() == whole.stride()
    assert torch.equal(lse, torch.full((2, 2, 24), -torch.inf))
