"""The softmax written out: found and right, or left alone and exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_patterns import BOUND, CONFIG, padding, qkv, run
from test_written_out import Called, through_a_file
from torch import Tensor

from sage_inductor import rewrite_exported
from sage_inductor.testing import graph_text, max_error, relative_l2

pytestmark = pytest.mark.usefixtures("inference")


def normalised(exponential: Tensor) -> Tensor:
    return exponential / exponential.sum(dim=-1, keepdim=True)


def in_place(scores: Tensor) -> Tensor:
    scores -= scores.amax(-1, keepdim=True)
    scores.exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "minus amax": lambda s: normalised(torch.exp(s - s.amax(-1, keepdim=True))),
    "minus max's values": lambda s: normalised((s - s.max(-1, keepdim=True).values.detach()).exp()),
    "minus max[0], unsqueezed": lambda s: normalised((s - s.max(dim=-1)[0].unsqueeze(-1)).exp()),
    "no maximum": lambda s: normalised(s.exp()),
    "sum unsqueezed": lambda s: (e := s.exp()) / e.sum(-1).unsqueeze(-1),
    "sum indexed": lambda s: (e := s.exp()) / torch.sum(e, dim=-1)[..., None],
    "sum indexed, dims spelt out": lambda s: (e := s.exp()) / torch.sum(e, [3])[:, :, :, None],
    "torch.div": lambda s: torch.div(e := s.exp(), torch.sum(e, -1, True)),
    "cast of the exponential": lambda s: (e := s.half().exp().float()) / e.sum(-1, keepdim=True),
    "sum and a guard": lambda s: (
        (e := torch.exp(s - torch.amax(s, dim=-1, keepdim=True))) / (e.sum(-1, keepdim=True) + 1e-6)
    ),
    "logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)),
    "logsumexp, unsqueezed": lambda s: (s - s.logsumexp(3)[..., None]).exp(),
    "log_softmax": lambda s: F.log_softmax(s, dim=-1).exp(),
    "log_softmax, maximum, dtype": lambda s: torch.exp(
        torch.log_softmax(s - s.amax(-1, keepdim=True), -1, dtype=torch.float32)
    ),
    "special": lambda s: torch.special.log_softmax(s, -1).exp(),
}


def divided_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / 6
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


AFTERWARDS: dict[str, Callable[..., Tensor]] = {
    "matmul": divided_afterwards,
    "a guard": lambda q, k, v: (
        ((e := ((s := q @ k.mT) - s.amax(-1, keepdim=True)).exp()) @ v) / (e.sum(-1, keepdim=True) + 1e-6)
    ),
    "cast": lambda q, k, v: (
        ((e := (q @ k.mT / 6).float().exp()).to(v.dtype) @ v).float().div(e.sum(-1, keepdim=True))
    ),
    "no maximum": lambda q, k, v: ((e := (q @ k.mT / 6).exp()) @ v) / e.sum(-1).unsqueeze(-1),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", e := torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.2).exp(), v
    ).div(e.sum(-1, keepdim=True)),
    "causal": lambda q, k, v: (
        (
            (
                e := (q @ k.mT / 6)
                .masked_fill(torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool(), -math.inf)
                .exp()
            )
            @ v
        )
        / e.sum(-1, keepdim=True)
    ),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_divided_after_the_product(name: str) -> None:
    attend, inputs = AFTERWARDS[name], qkv()
    out, (site,) = run(attend, *inputs)
    assert (site.pattern, site.reasons) == ("softmax_matmul", ())
    assert site.mask == ("causal" if name == "causal" else "none")
    assert relative_l2(out, attend(*inputs)) < BOUND and out.stride() == attend(*inputs).stride()
    program = rewrite_exported(torch.export.export(Called(attend), inputs), CONFIG)
    text = graph_text(program.graph_module.graph)
    assert not any(word in text for word in ("exp(", "sum", "amax", "matmul", "div")), text


@pytest.mark.parametrize(
    "attend",
    [
        # Of other weights, of weights that somebody reads, along another dim, of the wrong shape.
        lambda q, k, v: ((q @ k.mT).exp() @ v) / (q @ k.mT / 6).exp().sum(-1, keepdim=True),
        lambda q, k, v: ((e := (q @ k.mT / 6).exp()) @ v) / e.sum(-1, keepdim=True) + e.sum(),
        lambda q, k, v: ((e := (q @ k.mT / 6).exp()) @ v) / e.sum(-2, keepdim=True).mT[..., : q.shape[-2], :],
        lambda q, k, v: ((e := (q @ k.mT / 6).exp()) @ v) / e.sum(-1, keepdim=True)[None],
        lambda q, k, v: (
            torch.einsum("bhqk,bhkd->bqhd", e := (q @ k.mT / 6).exp(), v) / e.sum(-1)[..., None].mT[..., :1]
        ),
    ],
)
def test_divided_by_something_else(attend: Callable[..., Tensor]) -> None:
    inputs = tuple(torch.randn(2, 4, 4, 32) for _ in range(3))
    out, sites = run(attend, *inputs)
    assert sites == [] or not any(site.rewritten for site in sites)
    torch.testing.assert_close(out, attend(*inputs))


def attention(softmax: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: softmax(q @ k.mT / 6) @ v


@pytest.mark.parametrize("name", FORMS)
def test_found(name: str) -> None:
    attend, inputs = attention(FORMS[name]), qkv()
    out, (site,) = run(attend, *inputs)
    expected = attend(*inputs)
    assert (site.pattern, site.mask, site.reasons) == ("softmax_matmul", "none", ())
    assert relative_l2(out, expected) < BOUND and max_error(out, expected) < 2 * BOUND


@pytest.mark.parametrize("name", FORMS)
def test_found_in_exported_programs_and_nothing_left_behind(name: str) -> None:
    attend, inputs = attention(FORMS[name]), qkv()
    program = rewrite_exported(torch.export.export(Called(attend), inputs), CONFIG)
    text = graph_text(program.graph_module.graph)
    assert text.count("sage_inductor.attention") == 1, text
    assert not any(word in text for word in ("exp(", "sum", "max", "matmul", "div")), text
    assert relative_l2(through_a_file(program)(*inputs), attend(*inputs)) < BOUND


def test_in_place() -> None:
    """What was written over was nobody else's; what is left of it is dead once the graph is functional."""
    attend, inputs = attention(in_place), qkv()
    out, (site,) = run(attend, *inputs)
    assert site.rewritten and relative_l2(out, attend(*inputs)) < BOUND
    program = rewrite_exported(torch.export.export(Called(attend), inputs), CONFIG).run_decompositions()
    text = graph_text(program.graph_module.graph)
    assert text.count("sage_inductor.attention") == 1 and "exp" not in text, text
    assert relative_l2(through_a_file(program)(*inputs), attend(*inputs)) < BOUND


def test_masks_and_other_dims() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhkq", q, k) / 6
        scores = scores.masked_fill(~m[:, None, :, None], -math.inf)
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        weights = weights / weights.sum(2, keepdim=True)
        return torch.einsum("bhkq,bhkd->bhqd", weights, v)

    inputs = (*qkv(), padding())
    out, (site,) = run(attend, *inputs)
    assert (site.mask, site.reasons) == ("key_padding", ())
    assert relative_l2(out, attend(*inputs)) < BOUND


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "one more in the sum": lambda s: (e := s.exp()) / (1 + e.sum(-1, keepdim=True)),
    "a guard as large as the sum may be": lambda s: (e := s.exp()) / (e.sum(-1, keepdim=True) + 1e-6),
    "a guard that counts": lambda s: (
        (e := (s - s.amax(-1, keepdim=True)).exp()) / (e.sum(-1, keepdim=True) + 0.1)
    ),
    "sum over the queries": lambda s: (e := s.exp()) / e.sum(-2, keepdim=True),
    "sum of each row, along the columns": lambda s: (e := s.exp()) / e.sum(-1).unsqueeze(-2),
    "sum over all": lambda s: (e := s.exp()) / e.sum(),
    "sum over two dims": lambda s: (e := s.exp()) / e.sum((-2, -1), keepdim=True),
    "sum of the first batch": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True)[0],
    "sum of others": lambda s: s.exp() / s.sin().exp().sum(-1, keepdim=True),
    "mean": lambda s: (e := s.exp()) / e.mean(-1, keepdim=True),
    "minus the maximum of the columns": lambda s: normalised((s - s.amax(-2, keepdim=True)).exp()),
    "minus half the maximum": lambda s: normalised((s - s.amax(-1, keepdim=True) * k_dependent(s)).exp()),
    "logsumexp of the columns": lambda s: (s - s.logsumexp(-2, keepdim=True)).exp(),
    "logsumexp of others": lambda s: (s - (s * 2).logsumexp(-1, keepdim=True)).exp(),
    "twice the logsumexp": lambda s: torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=2).exp(),
    "log_softmax of the columns": lambda s: s.log_softmax(-2).exp(),
    "log_softmax": lambda s: s.log_softmax(-1),
    "floored quotient": lambda s: torch.div(
        e := s.exp(), e.sum(-1, keepdim=True), rounding_mode="floor"
    ),
    "exponentials read once more": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True) + e * 1e-3,
    "exp2": lambda s: (e := s.exp2()) / e.sum(-1, keepdim=True),
    "squared": lambda s: (e := s.square()) / e.sum(-1, keepdim=True),
}  # fmt: skip


def k_dependent(scores: Tensor) -> Tensor:
    return scores.sigmoid()


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes(name: str) -> None:
    attend, inputs = attention(LEFT[name]), qkv()
    out, sites = run(attend, *inputs)
    assert not sites and relative_l2(out, attend(*inputs)) < 1e-5


@pytest.mark.parametrize("reader", ["exponentials", "sum", "maximum", "logsumexp"])
def test_insides_that_are_read_elsewhere_have_to_exist(reader: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT / 6
        if reader == "logsumexp":
            total = scores.logsumexp(-1, keepdim=True)
            return torch.exp(scores - total) @ v, total
        maximum = scores.amax(-1, keepdim=True)
        exponentials = (scores - maximum).exp()
        total = exponentials.sum(-1, keepdim=True)
        read = {"exponentials": exponentials, "sum": total, "maximum": maximum}[reader]
        return exponentials / total @ v, read * 1.0

    inputs = qkv()
    out, sites = run(attend, *inputs)
    assert not sites
    for actual, exact in zip(out, attend(*inputs), strict=True):
        assert relative_l2(actual, exact) < 1e-5
