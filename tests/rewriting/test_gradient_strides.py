"""Gradients have the strides that SDPA's backward gives: `torch.cond` compares those of its branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor import Config
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import relative_l2

CONFIG = Config(kernel="reference", precision="accurate", training=True)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rewriting:
    """The pass, and then AOTAutograd without Inductor."""

    def __init__(self) -> None:
        self.rewritten = 0

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.rewritten += sum(site.rewritten for site in rewrite_graph(graph_module.graph, CONFIG))
        graph_module.recompile()
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)


def expanded(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 1, 17, 16).expand(*sizes)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "expanded heads": expanded(-1, 3, -1, -1),
    "expanded batch": lambda: torch.randn(1, 3, 17, 16).expand(2, -1, -1, -1),
    "dense": lambda: torch.randn(2, 3, 17, 16),
    "NHD": lambda: torch.randn(2, 17, 3, 16).transpose(1, 2),
    "sequence first": lambda: torch.randn(17, 2, 3, 16).permute(1, 2, 0, 3),
    "sliced": lambda: torch.randn(2, 3, 17, 40)[..., :16],
    "3-D": lambda: torch.randn(3, 17, 16),
}

BRANCHES: dict[str, Attend] = {
    "sdpa": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "inputs computed": lambda q, k, v: F.scaled_dot_product_attention(q * 1.5, k.sin(), v + 1),
    "not rewritten": lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()).to(
        q.dtype
    ),
    "copied": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).contiguous() * 2,
}


def strides_of(function: Callable[..., Tensor], backend: Any, inputs: list[Tensor]) -> Any:
    """(strides of the output and the gradients, the gradients), or the kind of error that compiling raises."""
    torch._dynamo.reset()
    try:
        out = torch.compile(function, backend=backend)(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs[-3:])
    except Exception as error:
        return repr(error), []
    return [out.stride(), *(grad.stride() for grad in grads)], grads


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, torch.float32) for layout in LAYOUTS),
        ("dense", torch.bfloat16),
        *(
            pytest.param(layout, torch.bfloat16, marks=pytest.mark.slow)
            for layout in LAYOUTS
            if layout != "dense"
        ),
    ],
)
def test_strides_outside_of_branches(layout: str, dtype: torch.dtype) -> None:
    inputs = [LAYOUTS[layout]().to(dtype).requires_grad_() for _ in range(3)]
    for name in ("sdpa", "inputs computed"):
        backend = Rewriting()
        plain, right = strides_of(BRANCHES[name], "aot_eager", inputs)
        strides, grads = strides_of(BRANCHES[name], backend, inputs)
        assert backend.rewritten == 1 and strides == plain
        for one, other in zip(grads, right, strict=True):
            assert relative_l2(one, other) < 0.05


PAIRS = (
    ("sdpa", "inputs computed"),
    ("inputs computed", "causal"),
    ("sdpa", "not rewritten"),
    ("copied", "inputs computed"),
)


# The first pair in each layout, the others in one; all of both are slow.
@pytest.mark.parametrize(
    ("first", "second", "layout"),
    [
        pytest.param(*pair, layout, marks=[] if number in (0, place + 1) else [pytest.mark.slow])
        for number, pair in enumerate(PAIRS)
        for place, layout in enumerate(("expanded heads", "dense", "3-D"))
    ],
)
def test_branches_that_plain_torch_compile_takes(first: str, second: str, layout: str) -> None:
    def attend(chosen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(chosen, BRANCHES[first], BRANCHES[second], (q, k, v))  # type: ignore[no-any-return]

    inputs = [torch.tensor(first == "sdpa"), *(LAYOUTS[layout]().requires_grad_() for _ in range(3))]
    backend = Rewriting()
    plain, right = strides_of(attend, "aot_eager", inputs)
    strides, grads = strides_of(attend, backend, inputs)
    assert backend.rewritten and strides == plain
    for one, other in zip(grads, right, strict=True):
        assert relative_l2(one, other) < 0.05


@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_grouped_heads_and_masks(mask: str) -> None:
    bias = torch.rand(17, 17) > 0.3 if mask == "bool" else torch.randn(17, 17)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)

    inputs = [torch.randn(2, heads, 17, 16).requires_grad_() for heads in (4, 2, 2)]
    backend = Rewriting()
    plain, right = strides_of(attend, "aot_eager", inputs)
    strides, grads = strides_of(attend, backend, inputs)
    assert backend.rewritten == 1 and strides == plain
    for one, other in zip(grads, right, strict=True):
        assert relative_l2(one, other) < 0.05


def test_under_autocast() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v)

    inputs = [LAYOUTS["expanded heads"]().requires_grad_() for _ in range(3)]
    backend = Rewriting()
    assert strides_of(attend, backend, inputs)[0] == strides_of(attend, "aot_eager", inputs)[0]
    assert backend.rewritten == 1


@pytest.mark.parametrize("function", ["sdpa", "causal", "inputs computed"])
def test_under_anomaly_detection(function: str) -> None:
    """It looks for NaN in gradients, and those that tell the strides hold no numbers."""
    backend, attend = Rewriting(), BRANCHES[function]
    q, k, v = (torch.randn(1, 2, 17, 16, requires_grad=True) for _ in range(3))
    torch._dynamo.reset()
    with torch.autograd.detect_anomaly():
        out = torch.compile(attend, backend=backend, fullgraph=True)(q, k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert backend.rewritten == 1
    expected = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    assert all(relative_l2(grad, other) < 1e-5 for grad, other in zip(grads, expected, strict=True))
    assert torch.is_anomaly_enabled() is False
