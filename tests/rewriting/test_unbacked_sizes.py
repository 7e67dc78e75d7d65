"""Sizes that only the data tell, and symbolic ones: nothing raises that plain torch does not, and no guard is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, explain, rewrite_exported
from sage_inductor.patterns import ALL
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
KEEP = torch.tensor([True, False, True, True, False, True])


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 4, 16).transpose(1, 2)


def masked(x: Tensor) -> Tensor:
    q = heads(x)
    length = x.shape[1]
    mask = (x[..., 0] > -1)[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2).reshape(x.shape)


def by_hand(x: Tensor) -> Tensor:
    q = heads(x)
    return (q @ q.mT * 0.25).softmax(-1) @ q


def by_hand_masked(x: Tensor) -> Tensor:
    q = heads(x)
    scores = (q @ q.mT * 0.25).masked_fill((x[..., 0] < -1)[:, None, None, :], -1e4)
    return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def three_dims(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, scale=0.1)


def grouped(x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True).transpose(1, 2)


def repeated(x: Tensor) -> Tensor:
    q = heads(x)
    k = q[:, :2].repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True)


def additive(x: Tensor) -> Tensor:
    q = heads(x)
    hidden = (x[..., 0] < -1)[:, None, None]
    bias = torch.zeros(x.shape[0], 1, 1, x.shape[1], dtype=x.dtype).masked_fill(
        hidden, torch.finfo(torch.float32).min
    )
    return F.scaled_dot_product_attention(q, q, q, bias)


BY_BATCH = (masked, by_hand, by_hand_masked, three_dims, grouped, repeated, additive)


class OfKept(nn.Module):
    """`function` of the kept part of the batch, or of the tokens."""

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int = 0) -> None:
        super().__init__()
        self.function, self.dim = function, dim
        self.layer = function if isinstance(function, nn.Module) else None

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.function(x.index_select(self.dim, keep.nonzero().squeeze(1)))


def inputs(dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 24, 64), KEEP if dim == 0 else torch.arange(24) % 4 != 1


def check(actual: Tensor, model: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    expected = model(*args)
    exact = model.double()(args[0].double(), args[1])
    assert actual.stride() == expected.stride() and actual.dtype == expected.dtype
    assert relative_l2(actual, exact) < 0.02 and max_error(actual, exact) < 0.06


CASES = [(function, 0) for function in BY_BATCH] + [
    (by_hand, 1),
    (three_dims, 1),
    (repeated, 1),
    (by_hand_masked, 1),
]


@pytest.mark.parametrize("function, dim", CASES, ids=lambda item: getattr(item, "__name__", item))
def test_exported(function: Callable[[Tensor], Tensor], dim: int) -> None:
    model, args = OfKept(function, dim).eval(), inputs(dim)
    with torch.no_grad():
        try:
            exported = torch.export.export(model, args)
        except Exception as error:  # what torch cannot trace is not ours
            pytest.skip(f"torch.export: {type(error).__name__}")
        rewritten = rewrite_exported(exported, CONFIG)
        assert any("sage_inductor" in str(node.target) for node in rewritten.graph.nodes)
        rewritten.run_decompositions()
        check(rewritten.module()(*args), model, args)
        other = (args[0], args[1].roll(1) & args[1])  # other data, another size
        check(rewritten.module()(*other), model.float(), other)


@pytest.mark.parametrize("function, dim", CASES, ids=lambda item: getattr(item, "__name__", item))
def test_compiled(function: Callable[[Tensor], Tensor], dim: int) -> None:
    model, args = OfKept(function, dim).eval(), inputs(dim)
    flags = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    backend = RewritingBackend(CONFIG)
    with torch.no_grad(), flags:
        torch.compiler.reset()
        try:
            torch.compile(model, backend="eager", fullgraph=True)(*args)
        except Exception as error:
            pytest.skip(f"torch.compile: {type(error).__name__}")
        torch.compiler.reset()
        actual = torch.compile(model, backend=backend, fullgraph=True)(*args)
        assert len(backend.graphs) == 1 and [site.rewritten for site in backend.sites] == [True]
        torch.compiler.reset()
        (site,) = explain(model, *args, config=CONFIG).sites
        assert site.rewritten and "u0" in str(site.query)
    check(actual, model, args)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_of_an_unbacked_batch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=norm_first).eval()
    model, args = OfKept(layer).eval(), inputs(0)
    with torch.no_grad():
        rewritten = rewrite_exported(torch.export.export(model, args), CONFIG)
        assert any("sage_inductor" in str(node.target) for node in rewritten.graph.nodes)
        check(rewritten.module()(*args), model, args)


def test_multi_head_attention_of_an_unbacked_batch() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model, args = OfKept(lambda x: attention(x, x, x, need_weights=False)[0]).eval(), inputs(0)
    model.attention = attention
    with torch.no_grad():
        exported = torch.export.export(model, args)
        rewritten = rewrite_exported(exported, CONFIG)
        assert any("sage_inductor" in str(node.target) for node in rewritten.graph.nodes)
        actual, plain = rewritten.module()(*args), exported.module()(*args)
    # Eager takes a way of its own, of which torch.export knows nothing.
    assert actual.stride() == plain.stride() and relative_l2(actual, plain) < 0.02


def _examples() -> list[Any]:
    return [(function, args) for pattern in ALL for function, args in pattern.examples()]


@pytest.mark.parametrize("dim", [0, -2, -3])
@pytest.mark.parametrize("at", range(len(_examples())))
def test_examples_of_patterns_with_an_unbacked_dim(at: int, dim: int) -> None:
    """Whatever dim the data decide, batch, heads or lengths: what torch traces, we do not break."""
    function, args = _examples()[at]
    if args[0].dim() < -dim:
        pytest.skip("fewer dims")

    def of_kept(keep: Tensor, *tensors: Tensor) -> Tensor:
        rows = keep.nonzero().squeeze(1)
        return function(*(tensor.index_select(dim, rows) for tensor in tensors))

    keep = torch.arange(args[0].shape[dim]) % 3 != 1
    flags = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with torch.no_grad(), flags:
        torch.compiler.reset()
        try:
            torch.compile(of_kept, backend="eager", fullgraph=True)(keep, *args)
        except Exception as error:
            pytest.skip(f"torch.compile: {type(error).__name__}")
        torch.compiler.reset()
        actual = torch.compile(of_kept, backend=RewritingBackend(CONFIG), fullgraph=True)(keep, *args)
        exact = of_kept(keep, *(tensor.double() for tensor in args))
    assert relative_l2(actual, exact) < 0.02


@pytest.mark.parametrize(
    "function", [F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v]
)
@pytest.mark.parametrize("first, second", [
    ((2, 4, 16, 16), (3, 4, 16, 16)), ((2, 4, 16, 16), (2, 5, 16, 16)), ((2, 4, 16, 16), (2, 4, 24, 16)),
    ((2, 4, 16, 16), (2, 4, 16, 24)), ((2, 3, 64, 64), (4, 5, 33, 48)),
])  # fmt: skip
def test_symbolic_sizes_take_no_more_graphs(function: Any, first: Any, second: Any) -> None:
    def graphs(backend: Any) -> int:
        torch.compiler.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager") if backend is None else backend
        compiled = torch.compile(function, backend=counter, dynamic=True)
        for shape in (first, second):
            q, k, v = (torch.randn(*shape) for _ in range(3))
            actual, exact = compiled(q, k, v), function(q.double(), k.double(), v.double())
            assert relative_l2(actual, exact) < 0.02
        return counter.frame_count if backend is None else len(backend.graphs)

    with torch.no_grad():
        rewriting = RewritingBackend(CONFIG)
        plain, ours = graphs(None), graphs(rewriting)
    assert ours == plain
    assert all(site.rewritten for site in rewriting.sites)


def test_a_head_dim_that_the_kernel_does_not_take_gets_exact_attention() -> None:
    """In a graph whose sizes may change; a call of the operator by itself says that it cannot."""
    backend = RewritingBackend(CONFIG)
    torch.compiler.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, backend=backend, dynamic=True)
    with torch.no_grad():
        for dim in (16, 1032):
            q, k, v = (torch.randn(1, 2, 8, dim) for _ in range(3))
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            assert relative_l2(compiled(q, k, v), exact) < (0.02 if dim == 16 else 1e-5)
    assert len(backend.graphs) == 1
