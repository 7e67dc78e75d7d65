"""Finite numbers that hide keys: queries that see no key attend to those that the highest number hides, as in eager."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sage_inductor.operators.inference as ops
from sage_inductor import Config
from sage_inductor.operators.schemas import EXACT
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
LENGTH = 48
LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("inference")
Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (scores, padding, bias) -> scores


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def padding() -> Tensor:
    """Of two sequences, the first padded left: under causality its first queries see nothing."""
    mask = torch.rand(2, 1, 1, LENGTH) > 0.3
    mask[0, ..., :17] = False
    return mask


def filled(pad: float, future: float) -> Step:
    return lambda s, p, b: s.masked_fill(~p, pad).masked_fill(~causal(), future)


STEPS: dict[str, Step] = {
    "-1e4, then -1e9": filled(-1e4, -1e9),
    "-1e9, then -1e4": filled(-1e9, -1e4),
    "-1e9 twice": filled(-1e9, -1e9),
    "-1e4 twice": filled(-1e4, -1e4),
    "lowest twice": filled(LOWEST, LOWEST),
    "lowest, then -1e9": filled(LOWEST, -1e9),
    "-1e9, then lowest": filled(-1e9, LOWEST),
    "-inf, then -1e4": filled(-math.inf, -1e4),
    "where": lambda s, p, b: torch.where(causal(), torch.where(p, s, -1e4), -1e9),
    "three": lambda s, p, b: filled(-1e4, -1e6)(s, p, b).masked_fill(torch.eye(LENGTH) > 0, -1e5),
    "scaled afterwards": lambda s, p, b: 0.5 * filled(-1e5, -3e4)(s, p, b),
    "scaled between": lambda s, p, b: (s.masked_fill(~p, -2e4) * 4).masked_fill(~causal(), -3e4),
    "floored": lambda s, p, b: torch.maximum(filled(-math.inf, -1e5)(s, p, b), torch.tensor(-1e6)),
    "biased before": lambda s, p, b: filled(-1e4, -1e9)(s + b, p, b),
    "biased between": lambda s, p, b: (s.masked_fill(~p, -1e9) + b).masked_fill(~causal(), -1e4),
    "biased afterwards": lambda s, p, b: filled(-1e9, LOWEST / 4)(s, p, b) + b,
    "-1e9 added, then -1e4": lambda s, p, b: (s + torch.where(p, 0.0, -1e9)).masked_fill(~causal(), -1e4),
    "lowest added, then lowest": lambda s, p, b: (s + torch.where(p, 0.0, LOWEST)).masked_fill(
        ~causal(), LOWEST
    ),
    "-1e9, then lowest added": lambda s, p, b: s.masked_fill(~p, -1e9) + torch.where(causal(), 0.0, LOWEST),
    "-1e4, then -1e4 added": lambda s, p, b: s.masked_fill(~causal(), -1e4) + torch.where(p, 0.0, -1e4),
    "-1e4, then biased": lambda s, p, b: filled(-1e4, -1e4)(s, p, b) + b,
}
STAY = ("-1e4, then -1e4 added", "-1e4, then biased")  # what is added tells keys apart that are hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", STEPS)
def test_queries_that_see_no_key(steps: str, dtype: torch.dtype) -> None:
    step = STEPS[steps]

    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor) -> Tensor:
        return step((q @ k.mT).float() / 6, p, b).softmax(-1).to(v.dtype) @ v

    q, k, v = (torch.randn(2, 4, LENGTH, 32, dtype=dtype) for _ in range(3))
    p, b = padding(), torch.randn(4, LENGTH, LENGTH)
    expected = step(q.float() @ k.float().mT / 6, p, b).double().softmax(-1) @ v.double()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(attend, backend=backend)(q, k, v, p, b)
    (site,) = backend.sites or (None,)
    assert (site is not None and site.rewritten) == (steps not in STAY)
    # By INT8 scores at these sizes; a row served wrongly is off by .2 of the whole, and by its own size.
    assert relative_l2(out, expected) < 0.02
    assert relative_l2(out[0, :, :17], expected[0, :, :17]) < 0.03
    assert max_error(out, expected) < 0.05 * float(expected.abs().max())
    if site is None or not site.rewritten:
        return
    exact = torch.fx.Interpreter(backend.graphs[0])
    for node in backend.graphs[0].graph.nodes:  # the exact way reads the same mask
        if node.target is ops.attention:
            node.kwargs = {**node.kwargs, "kernel_name": EXACT}
    (result,) = exact.run(*_in_order_of(backend, {"q": q, "k": k, "v": v, "p": p, "b": b}))
    bound = 1e-5 if dtype == torch.float32 else 0.006
    assert relative_l2(result, expected) < bound
    assert relative_l2(result[0, :, :17], expected[0, :, :17]) < bound


def _in_order_of(backend: RewritingBackend, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The inputs in the order of the graph's placeholders, which are called l_q_ and so on."""
    nodes = backend.graphs[0].graph.find_nodes(op="placeholder")
    return [inputs[node.name.removeprefix("l_").removesuffix("_")] for node in nodes]


def test_a_number_is_what_scores_of_its_dtype_hold() -> None:
    """-65504 is -65536 in bfloat16, where it is written as where it is added: neither hides more."""

    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float16).min
        future = torch.full((LENGTH, LENGTH), lowest, dtype=q.dtype).triu(1)
        scores = (q @ k.mT / 6).masked_fill(~p, lowest) + future
        return scores.softmax(-1) @ v

    inputs = (*(torch.randn(2, 4, LENGTH, 32, dtype=torch.bfloat16) for _ in range(3)), padding())
    backend = RewritingBackend(CONFIG)
    out, expected = torch.compile(attend, backend=backend)(*inputs), attend(*inputs)
    assert [site.rewritten for site in backend.sites] == [True]
    assert relative_l2(out[0, :, :17], expected[0, :, :17]) < 0.03


def test_one_number_is_seen_as_causality_and_padding() -> None:
    """Two masks that are filled with one number are one mask, whose parts are told apart."""

    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return filled(-1e9, -1e9)(q @ k.mT / 6, p, p).softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, LENGTH, 32) for _ in range(3))
    backend = RewritingBackend(CONFIG)
    torch.compile(attend, backend=backend)(q, k, v, padding())
    assert [site.mask for site in backend.sites] == ["causal + key_padding"]


def test_more_numbers_than_can_be_told_apart_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        scores = q @ k.mT / 6
        for power in range(10):
            scores = scores.masked_fill(~p.roll(power, -1), -1e4 * 2.0**power)
        return scores.softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, LENGTH, 32) for _ in range(3))
    backend, p = RewritingBackend(CONFIG), padding()
    out = torch.compile(attend, backend=backend)(q, k, v, p)
    assert not backend.sites and torch.equal(out, attend(q, k, v, p))
