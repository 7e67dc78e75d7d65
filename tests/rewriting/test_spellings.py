"""Masks and repeated heads, spelled in ways that only one of the former lists of names knew; and what no list may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.operators import inference
from sage_inductor.report.site import Site
from sage_inductor.testing import RewritingBackend, relative_l2

pytestmark = pytest.mark.usefixtures("inference")

BOUND = 0.03  # INT8 scores and FP16 values
B, H, S, D = 2, 4, 32, 64
PADDING = (torch.arange(S) < torch.tensor([20, 27])[:, None])[:, None, None]  # [B, 1, 1, S]
LOWEST = torch.finfo(torch.float32).min


def rewritten(function: Callable[..., Any], *inputs: Tensor) -> RewritingBackend:
    """The one site of `function` is rewritten and gives what eager gives."""
    torch.compiler.reset()
    backend = RewritingBackend(Config(kernel="reference", precision="accurate"))
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (site,) = backend.sites
    assert site.rewritten, site
    expected = function(*inputs)
    assert relative_l2(out, expected) < BOUND, site
    assert out.stride() == expected.stride() and out.dtype == expected.dtype
    return backend


def site_of(function: Callable[..., Any], *inputs: Tensor) -> Site:
    return rewritten(function, *inputs).sites[0]


def with_mask(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, padding: F.scaled_dot_product_attention(x, x, x, mask(padding))


def additive(padding: Tensor) -> Tensor:
    return torch.zeros(padding.shape).masked_fill(~padding, -torch.inf)


X = torch.randn(B, H, S, D)

# Each gives `additive(p)`.
SAME_MASK: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda p: additive(p).view(B, 1, S)[:, None],
    "view of what lies otherwise": lambda p: additive(p.view(B, S).mT.contiguous().mT).view(B, 1, 1, S),
    "reshape": lambda p: additive(p[:, 0, 0]).reshape(B, 1, 1, S),
    "transpose": lambda p: additive(p.view(B, 1, S, 1)).transpose(-1, -2),
    "permute": lambda p: additive(p[:, 0]).unsqueeze(0).permute(1, 0, 2, 3),
    "flatten": lambda p: additive(p).flatten(1)[:, None, None],
    "squeeze": lambda p: additive(p).squeeze()[:, None, None],
    "detach": lambda p: additive(p).detach(),
    "select": lambda p: additive(p[None]).select(0, 0),
    "_to_copy": lambda p: torch.ops.aten._to_copy(additive(p), dtype=torch.float32),
    "filled": lambda p: torch.where(p, torch.full((B, 1, 1, S), 0.0), -torch.inf),
}


@pytest.mark.parametrize("name", SAME_MASK)
def test_a_kernel_reads_the_bools_behind_views_of_an_additive_mask(name: str) -> None:
    backend = rewritten(with_mask(SAME_MASK[name]), X, PADDING)
    (call,) = (node for node in backend.graphs[0].graph.nodes if node.target is inference.attention)
    assert call.args[3].meta["example_value"].dtype == torch.bool
    assert backend.sites[0].mask == "key_padding"


OTHER_MASK: dict[str, Callable[[Tensor], Tensor]] = {
    "elements named by a list": lambda p: additive(p)[[1, 0]],
    "batch and heads swapped": lambda p: additive(p[:, :, 0].expand(B, B, S)).transpose(0, 1)[:, :1, None],
    "read backwards": lambda p: additive(p)[:, :, :, torch.arange(S - 1, -1, -1)],
}


@pytest.mark.parametrize("name", OTHER_MASK)
def test_a_mask_of_the_same_shape_in_another_order_is_another(name: str) -> None:
    site_of(with_mask(OTHER_MASK[name]), X, PADDING)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.contiguous().float(),
        lambda m: m.flatten(1)[:, None, None].float(),
        lambda m: m.double().to(torch.float32),
        lambda m: m.int().float().clone(),
        lambda m: m.float().broadcast_to(B, 1, S, S),
    ],
)
def test_a_mask_that_multiplies_is_made_of_bools_in_any_spelling(cast: Callable[[Tensor], Tensor]) -> None:
    def attention(x: Tensor, padding: Tensor) -> Tensor:
        mask = cast(padding)
        scores = x @ x.mT * D**-0.5
        return (scores * mask + -1e9 * (1 - mask)).softmax(-1) @ x

    assert site_of(attention, X, PADDING).pattern == "softmax_matmul"


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x[:, :, None].expand(B, 2, 2, S, D).flatten(1, 2),
    "broadcast_to": lambda x: x[:, :, None].broadcast_to(B, 2, 2, S, D).reshape(B, H, S, D),
    "clone": lambda x: torch.clone(x[:, :, None].expand(B, 2, 2, S, D)).view(B, H, S, D),
    "expand_as": lambda x: x.unsqueeze(2).expand_as(torch.empty(B, 2, 2, S, D)).reshape(B, H, S, D),
    "operator": lambda x: torch.ops.aten.repeat_interleave.self_int(x, 2, 1),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_seen_through_in_any_spelling(name: str) -> None:
    def attention(x: Tensor, kv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, REPEATS[name](kv), REPEATS[name](kv))

    site = site_of(attention, X, X[:, :2].contiguous())
    assert site.key is not None and site.key.shape == (B, 2, S, D)


def test_scores_written_over_in_any_spelling() -> None:
    def attention(x: Tensor) -> Tensor:
        scores = (x @ x.mT).multiply_(D**-0.5)
        scores.subtract_(1.0).clamp_min_(torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ x

    assert site_of(attention, X).pattern == "softmax_matmul"


def test_a_mask_that_a_function_of_the_users_draws_is_not_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, while compiling, and frozen: a call later it would be another."""
    drawn = torch._dynamo.allow_in_graph(lambda: torch.ones(S, S).tril() + torch.rand(()).round() > 0)

    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, drawn())

    backend = RewritingBackend(Config(kernel="reference"))
    compiled = torch.compile(attention, backend=backend)
    assert len({float(compiled(X).sum()) for _ in range(20)}) == 2
    assert [site.mask for site in backend.sites] == ["bool"]


def test_a_constant_mask_from_sizes_of_the_input_is_worked_out() -> None:
    def attention(x: Tensor) -> Tensor:
        q_len = x.shape[2]
        mask = torch.full((q_len, q_len), -torch.inf, dtype=x.dtype).triu(1)
        return F.scaled_dot_product_attention(x, x, x, mask)

    assert site_of(attention, X).mask == "causal"
