"""The pass goes through a graph once: how often patterns are asked, and calls that read each other's values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_inductor import Config
from sage_inductor.patterns import ALL, OPAQUE
from sage_inductor.plan.plan import Plan
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, capture, relative_l2

REFERENCE = Config(kernel="reference")
pytestmark = pytest.mark.usefixtures("inference")


class Asked:
    """How often patterns of all kinds are asked, and about how many nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for pattern in ALL:
            monkeypatch.setattr(pattern, "match", self._counting(pattern.match))
        for opaque in OPAQUE:
            monkeypatch.setattr(opaque, "expand", self._counting(opaque.expand))

    def _counting(self, function: Any) -> Any:
        def counted(node: Any) -> Any:
            self.count += 1
            return function(node)

        return counted


def asked(monkeypatch: pytest.MonkeyPatch, function: Any, *inputs: Tensor, config: Config) -> int:
    graph = capture(function, *inputs).graph
    with monkeypatch.context() as patches:
        counter = Asked(patches)
        rewrite_graph(graph, config)
    return counter.count


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        return (x @ x.mT * 0.125).softmax(-1) @ x


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "encoder layer": (nn.TransformerEncoderLayer(64, 2, 96, batch_first=True), torch.randn(2, 16, 64)),
    "opaque encoder layer": (
        nn.TransformerEncoderLayer(64, 2, 96, batch_first=True).eval(),
        torch.randn(2, 16, 64),
    ),
    "by hand": (ByHand(), torch.randn(1, 2, 16, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_asks_patterns_no_more_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS[name]
    without = asked(monkeypatch, model, x, config=REFERENCE)
    plan = Plan("rel_l2", 0.1, ())
    assert asked(monkeypatch, model, x, config=dataclasses.replace(REFERENCE, plan=plan)) == without > 0


def test_each_node_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the graph and those of the expansion; a pattern that is asked after one that matched is not asked."""
    nodes: list[fx.Node] = []
    (pattern, *_) = ALL
    match = pattern.match
    monkeypatch.setattr(pattern, "match", lambda node: nodes.append(node) or match(node))
    model, x = MODELS["opaque encoder layer"]
    graph = capture(model, x).graph
    rewrite_graph(graph, REFERENCE)
    assert nodes and len(nodes) == len(set(nodes))


def run(model: Any, *inputs: Tensor, sites: int, config: Config = REFERENCE) -> tuple[fx.Graph, Tensor]:
    torch.compiler.reset()
    backend = RewritingBackend(config)
    out = torch.compile(model, backend=backend)(*inputs)
    assert [site.rewritten for site in backend.sites] == [not config.exclude] * sites
    (module,) = backend.graphs
    module.graph.lint()
    return module.graph, out


def test_a_call_may_read_the_value_of_another_in_any_form() -> None:
    """Matched before the other is rewritten: itself, transposed, with heads repeated, in a mask, in a sum with it."""
    x = torch.randn(1, 4, 16, 64)

    def chained(x: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(x, x, x)
        second = (first @ first.transpose(-2, -1) * 0.125).softmax(-1) @ first
        one_head = second[:, :2, None].expand(1, 2, 2, 16, 64).reshape(1, 4, 16, 64)
        third = F.scaled_dot_product_attention(first, one_head, one_head)
        bias = third[..., :16]
        return F.scaled_dot_product_attention(third + first, second, third, bias)

    _, out = run(chained, x, sites=4)
    exact = chained(x.double())
    assert relative_l2(out, exact) < 0.1


def test_opaque_layers_in_a_row_and_calls_between_them() -> None:
    layers = [nn.TransformerEncoderLayer(64, 2, 96, batch_first=True).eval() for _ in range(2)]
    mha = nn.MultiheadAttention(64, 2, batch_first=True).eval()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.mha = *layers, mha

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + F.scaled_dot_product_attention(x, x, x)
            x = self.second(x)
            out, weights = self.mha(x, x, x, need_weights=False)
            return F.scaled_dot_product_attention(out, x, out)

    model, x = Mixed(), torch.randn(2, 16, 64)
    graph, out = run(model, x, sites=5)
    assert not any("multi_head" in str(node.target) or "encoder" in str(node.target) for node in graph.nodes)
    expected = model(x)
    assert relative_l2(out, expected) < 0.1


def test_an_expansion_that_wins_nothing_leaves_no_node() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True).eval()

    def model(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(layer(x), x, x)

    x = torch.randn(2, 16, 64)
    before = [str(node.target) for node in capture(model, x).graph.nodes]
    graph, _ = run(model, x, sites=2, config=dataclasses.replace(REFERENCE, exclude=("*",)))
    assert [str(node.target) for node in graph.nodes] == before
