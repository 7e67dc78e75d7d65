"""Rarer ways of writing attention out: found and right, or left alone and exact."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_patterns import BOUND, CONFIG, padding, qkv, run
from torch import Tensor, nn

from sage_inductor import Config, rewrite_exported
from sage_inductor.testing import RewritingBackend, graph_text, max_error, relative_l2

LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("inference")


def in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT / 6
    scores.masked_fill_(~m[:, None, None], LOWEST)
    scores += 1.0
    return scores.softmax(-1) @ v


def multiplied(value: float, dtype: torch.dtype, subtracted: bool = False) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        kept = m[:, None, None].to(dtype)
        hidden = (1 - kept) * -value if subtracted else value * (1 - kept)
        scores = (q @ k.mT / 6) * kept
        return (scores - hidden if subtracted else scores + hidden).softmax(-1) @ v

    return attend


def floored(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """XGLM's: folded heads, an additive mask, no less than the lowest number."""
    scores = (q.flatten(0, 1) @ k.flatten(0, 1).mT / 6).view(2, 4, 24, 24)
    scores = scores + torch.where(m[:, None, None], 0.0, LOWEST)
    scores = torch.max(scores, torch.tensor(LOWEST)).view(8, 24, 24)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(2, 4, 24, 32)


def cosine(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """Swin v2's: a learned temperature of each head, a bias of each position."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * temperature.exp()
    return (scores + bias).softmax(-1) @ v


def windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Swin's: 6 windows of 3 kinds, each kind with its mask."""
    scores = q @ k.mT / 6 + bias
    scores = (scores.view(2, 3, 4, 24, 24) + mask[None, :, None]).view(6, 4, 24, 24)
    return scores.softmax(-1) @ v


def decomposed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Segment Anything's and ViTDet's relative positions, of a grid of 4 by 6 tokens."""
    scores = (q * 0.2) @ k.mT
    grid = q.reshape(8, 4, 6, 32)
    height = torch.einsum("bhwc,hkc->bhwk", grid, rows)
    width = torch.einsum("bhwc,wkc->bhwk", grid, columns)
    scores = scores.view(8, 4, 6, 4, 6) + height[..., None] + width[..., None, :]
    return scores.view(8, 24, 24).softmax(-1) @ v


FORMS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "logits masked in place": (in_place, (*qkv(), padding()), "key_padding"),
    "mask multiplied in": (multiplied(-1e4, torch.float32), (*qkv(), padding()), "key_padding"),
    "mask multiplied in, subtracted": (
        multiplied(-1e9, torch.float32, subtracted=True),
        (*qkv(), padding()),
        "key_padding",
    ),
    "floored at the lowest number": (floored, (*qkv(), padding()), "key_padding"),
    "clamped from below": (
        lambda q, k, v, m: (
            (q @ k.mT / 6).masked_fill(~m[:, None, None], -math.inf).clamp(min=LOWEST).softmax(-1) @ v
        ),
        (*qkv(), padding()),
        "key_padding",
    ),
    "added and hidden by -inf": (
        lambda q, k, v, b, m: (q @ k.mT / 6 + b).masked_fill(~m[:, None, None], -math.inf).softmax(-1) @ v,
        (*qkv(), torch.randn(2, 4, 24, 1), padding()),
        "additive",
    ),
    "minus a mask": (
        lambda q, k, v, m: (q @ k.mT / 6 - m).softmax(-1) @ v,
        (*qkv(), torch.rand(24, 24)),
        "additive",
    ),
    "plus a product that is the same for all heads": (
        lambda q, k, v, m: (q @ k.mT / 6 - m[:, None, :, None] @ m[:, None, None] * 1e9).softmax(-1) @ v,
        (*qkv(), (~padding()).float()),
        "additive",
    ),
    "a product that is the same for all heads, plus scores": (
        lambda q, k, v, m: (torch.bmm(m.mT, m)[:, None] * 4 + q @ k.mT / 6).softmax(-1) @ v,
        (*qkv(), torch.rand(2, 1, 24)),
        "additive",
    ),
    "plus a number": (lambda q, k, v: (q @ k.mT / 6 + 2.0).softmax(-1) @ v, qkv(), "none"),
    "integer mask": (
        lambda q, k, v, m: (q @ k.mT / 6 + m).softmax(-1) @ v,
        (*qkv(), torch.randint(-3, 3, (24, 24))),
        "additive",
    ),
    "temperature of each head": (
        lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v,
        (*qkv(), torch.rand(4, 1, 1) / 4),
        "none",
    ),
    "one temperature, dividing scores and bias": (
        lambda q, k, v, m, t: ((q @ k.mT + m) / t).softmax(-1) @ v,
        (*qkv(), torch.randn(24, 24), torch.tensor(7.0)),
        "additive",
    ),
    "cosine attention": (cosine, (*qkv(), torch.rand(4, 1, 1), torch.randn(4, 24, 24)), "additive"),
    "windows with masks": (windows, (*qkv(batch=6), torch.randn(4, 24, 24), torch.randn(3, 24, 24)), "additive"),
    "decomposed relative positions": (
        decomposed,
        (*(tensor.reshape(8, 24, 32) for tensor in qkv()), torch.randn(4, 4, 32) / 6, torch.randn(6, 6, 32) / 6),
        "additive",
    ),
    "six dims": (
        lambda q, k, v: (q @ k.mT / 6).softmax(-1) @ v,
        tuple(torch.randn(2, 2, 3, 2, 24, 32) for _ in range(3)),
        "none",
    ),
    "five dims, key padding": (
        lambda q, k, v, m: (q @ k.mT / 6).masked_fill(~m[:, None, None, None], -math.inf).softmax(-1) @ v,
        (*(torch.randn(2, 2, 3, 24, 32) for _ in range(3)), padding()),
        "key_padding",
    ),
    "two dims": (lambda q, k, v: (q @ k.T / 6).softmax(-1) @ v, tuple(torch.randn(3, 24, 32)), "none"),
    "einsum with dots": (
        lambda q, k, v: torch.einsum(
            "...qk,...kd->...qd", (torch.einsum("...qd,...kd->...qk", q, k) / 6).softmax(-1), v
        ),
        qkv(),
        "none",
    ),
    "einsum, key first": (
        lambda q, k, v: torch.einsum(
            "bhjd,bhij->bhid", v, (torch.einsum("bhjd,bhid->bhij", k, q) / 6).softmax(-1)
        ),
        qkv(),
        "none",
    ),
    "channels first, weights on the right": (
        lambda q, k, v: (v.mT @ ((q * 0.2) @ k.mT).softmax(-1).transpose(-2, -1)).reshape(2, 128, 24),
        qkv(),
        "none",
    ),
    "non-local block": (
        lambda q, k, v: torch.bmm(v.mT, torch.softmax(torch.bmm(q, k.mT) / 6, -1).permute(0, 2, 1)),
        [tensor[0] for tensor in qkv()],
        "none",
    ),
    "einsum, channels first": (  # guided diffusion's
        lambda q, k, v: torch.einsum("bts,bcs->bct", torch.einsum("bct,bcs->bts", q, k * 0.2).softmax(-1), v),
        [tensor[0].mT.contiguous() for tensor in qkv()],
        "none",
    ),
    "einsum, channels before heads": (  # SuperGlue's
        lambda q, k, v: torch.einsum(
            "bhnm,bdhm->bdhn", (torch.einsum("bdhn,bdhm->bhnm", q, k) / 6).softmax(-1), v
        ),
        [tensor.permute(0, 3, 1, 2).contiguous() for tensor in qkv()],
        "none",
    ),
    "einsum, rows of a grid": (
        lambda q, k, v, b: torch.einsum(
            "bxhyz,bxzhd->bxyhd", (torch.einsum("bxyhd,bxzhd->bxhyz", q * 0.2, k) + b[:, None]).softmax(-1), v
        ),
        (*(torch.randn(2, 3, 24, 4, 32) for _ in range(3)), torch.randn(2, 4, 24, 24)),
        "additive",
    ),
    "einsum, one key head": (  # Imagen's and PaLM's in PyTorch
        lambda q, k, v, b: torch.einsum(
            "bhij,bjd->bhid", (torch.einsum("bhid,bjd->bhij", q * 0.2, k) + b).softmax(-1), v
        ),
        (torch.randn(2, 4, 24, 32), torch.randn(2, 24, 32), torch.randn(2, 24, 32), torch.randn(4, 24, 24)),
        "additive",
    ),
    "einsum, one key head, heads behind the queries": (
        lambda q, k, v: torch.einsum(
            "bhqk,bkd->bqhd", (torch.einsum("bqhd,bkd->bhqk", q, k) / 6).softmax(-1), v
        ),
        (torch.randn(2, 24, 4, 32), torch.randn(2, 24, 32), torch.randn(2, 24, 32)),
        "none",
    ),
    "minus the maximum of each row": (
        lambda q, k, v: ((s := q @ k.mT / 6) - s.amax(dim=-1, keepdim=True).detach()).softmax(-1) @ v,
        qkv(),
        "none",
    ),
    "minus the maximum, masked": (
        lambda q, k, v, m: (
            (s := (q @ k.mT / 6).masked_fill(~m[:, None, None], -math.inf)) - s.max(-1, keepdim=True).values
        ).softmax(-1) @ v,
        (*qkv(), padding()),
        "key_padding",
    ),
    "hidden keys set to zero once more": (  # ESPnet's
        lambda q, k, v, m: (
            (q @ k.mT / 6).masked_fill(h := m[:, None, None].eq(0), LOWEST).softmax(-1).masked_fill(h, 0.0) @ v
        ),
        (*qkv(), padding()),
        "key_padding",
    ),
    "hidden keys set to zero once more, and a bias": (
        lambda q, k, v, m, b: (
            (q @ k.mT / 6 + b).masked_fill(h := ~m[:, None, None], -math.inf).softmax(-1).masked_fill(h, 0.0) @ v
        ),
        (*qkv(), padding(), torch.randn(24, 24)),
        "additive",
    ),
    "mm": (
        lambda q, k, v: torch.mm(torch.mm(q, k.t()).div(6).softmax(1), v), tuple(torch.randn(3, 24, 32)), "none"
    ),
    "causal in the dtype of the query": (
        lambda q, k, v: (
            q @ k.mT / 6 + torch.full((24, 24), -math.inf, device=q.device).triu(1).type_as(q)
        ).softmax(-1) @ v,
        qkv(),
        "causal",
    ),
    "causal made from the query": (
        lambda q, k, v: (q @ k.mT / 6).masked_fill(q.new_ones(24, 24).tril() == 0, -1e9).softmax(-1) @ v,
        qkv(),
        "causal",
    ),
    "where, a filled tensor": (
        lambda q, k, v, m: torch.where(m[:, None, None], s := q @ k.mT / 6, torch.full_like(s, -1e9)).softmax(-1) @ v,
        (*qkv(), padding()),
        "key_padding",
    ),
    "where, ones times a number": (
        lambda q, k, v, m: (
            torch.where(~m[:, None, None], -9e15 * torch.ones_like(s := q @ k.mT / 6), s).softmax(-1) @ v
        ),
        (*qkv(), padding()),
        "key_padding",
    ),
    "causal made from the scores": (
        lambda q, k, v: (s := q @ k.mT / 6).masked_fill(s.new_ones(24, 24).triu(1).bool(), -1e9).softmax(-1) @ v,
        qkv(),
        "causal",
    ),
    "safe softmax": (
        lambda q, k, v: torch.ops.aten._safe_softmax.default(q @ k.mT / 6, -1) @ v,
        qkv(),
        "none",
    ),
}  # fmt: skip


# torch.export puts the number, a tensor of it, into the program's state.
NOT_EXPORTED = ("floored at the lowest number", "one temperature, dividing scores and bias")


@pytest.mark.parametrize("name", FORMS)
def test_rarer_forms(name: str) -> None:
    function, inputs, mask = FORMS[name]
    expected = function(*(tensor.clone() for tensor in inputs))
    out, sites = run(function, *(tensor.clone() for tensor in inputs))
    assert [(site.pattern, site.mask, site.reasons) for site in sites] == [("softmax_matmul", mask, ())]
    assert relative_l2(out, expected) < BOUND and max_error(out, expected) < 2 * BOUND
    assert out.shape == expected.shape and out.stride() == expected.stride()


class Called(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def through_a_file(program: torch.export.ExportedProgram) -> Any:
    """`program`, checked and written by torch.export, read again, as a module."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("name", [name for name in FORMS if name not in NOT_EXPORTED])
def test_rarer_forms_exported(name: str) -> None:
    """As aten's operators."""
    function, inputs, _ = FORMS[name]
    expected = function(*(tensor.clone() for tensor in inputs))
    program = torch.export.export(Called(function), tuple(tensor.clone() for tensor in inputs))
    rewritten = rewrite_exported(program, CONFIG)
    text = graph_text(rewritten.graph_module.graph)
    assert text.count("sage_inductor.attention") == 1 and "softmax" not in text, text
    assert relative_l2(through_a_file(rewritten)(*inputs), expected) < BOUND


@pytest.mark.parametrize("upcast", ["softmax", "scores", "type_as"])
def test_casts_of_exported_programs(upcast: str) -> None:
    """Beside each cast torch.export puts a check of what is cast, which reads no values and goes with it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 6
        if upcast == "softmax":
            weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            return F.dropout(weights, 0.1, training=False) @ v
        weights = scores.float().softmax(-1)
        return (weights.type_as(scores) if upcast == "type_as" else weights.to(q.dtype)) @ v

    inputs = tuple(tensor.bfloat16() for tensor in qkv())
    program = rewrite_exported(torch.export.export(Called(attend), inputs), CONFIG)
    text = graph_text(program.graph_module.graph)
    assert text.count("sage_inductor.attention") == 1 and "softmax" not in text and "assert" not in text, text
    assert relative_l2(through_a_file(program)(*inputs), attend(*inputs)) < BOUND


def test_five_dims_with_a_dynamic_batch() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT / 6 + bias).softmax(-1) @ v

    inputs = [torch.randn(3, 3, 2, 24, 32) for _ in range(3)]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    for shape, found in (((24, 24), True), ((1, 1, 24, 24), True), ((3, 1, 24, 24), False)):
        # The last is of the windows, and must not be taken for one of the batch, which is as large.
        bias = torch.randn(shape)
        out, sites = run(attend, *inputs, bias)
        assert [site.rewritten for site in sites] == [True] * found
        assert relative_l2(out, attend(*inputs, bias)) < BOUND


def test_five_symbolic_dims_are_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 6).softmax(-1) @ v

    inputs = [torch.randn(2, 3, 4, 24, 32) for _ in range(3)]
    backend = RewritingBackend(CONFIG)
    out = torch.compile(attend, backend=backend, dynamic=True)(*inputs)
    assert not backend.sites and relative_l2(out, attend(*inputs)) < 1e-5


def test_a_query_whose_keys_are_all_set_to_zero_gets_zero() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (q @ k.mT / 6).masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0) @ v

    inputs, hidden = qkv(), torch.rand(2, 1, 24, 24) > 0.5
    hidden[1, :, 3:7] = True
    out, (site,) = run(attend, *inputs, hidden)
    assert site.rewritten and not out[1, :, 3:7].any()
    assert relative_l2(out, attend(*inputs, hidden)) < BOUND


# What modules keep for a caller who does not ask for it: Dynamo's graph holds it, and nobody reads it.
KEPT: dict[str, Callable[..., Any]] = {
    "a copy of the scores": lambda q, k, v: (s := q @ k.mT / 6, s.clone(), s.softmax(-1) @ v)[2],
    "logits before and after a mask": lambda q, k, v: (
        s := q @ k.mT / 6,
        s.detach().clone(),
        t := s.masked_fill(k[:, :, None, :, 0] > 2, -1e9),
        t.clone(),
        t.softmax(-1) @ v,
    )[4],
    "mean weights of the heads": lambda q, k, v: (
        w := (q @ k.mT / 6).softmax(-1, dtype=torch.float32),
        w.view(2, 4, 24, 24).type_as(q).transpose(0, 1).mean(dim=0),
        F.dropout(w.type_as(w.type_as(q)), 0.1, training=False) @ v,
    )[2],
    "a sum of scores and a copy": lambda q, k, v: (
        s := q @ k.mT / 6,
        s + s.clone(),
        s.softmax(-1) @ v,
    )[2],
    "weights of all layers": lambda q, k, v: (
        w := (q @ k.mT / 6).softmax(-1),
        torch.stack([w, w]),
        w @ v,
    )[2],
    "a copy whose shape is asked for": lambda q, k, v: (
        (s := q @ k.mT / 6).softmax(-1) @ v + s.clone().shape[-1] * 1e-3
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_nobody_reads_is_no_reader(name: str) -> None:
    inputs = qkv()
    out, sites = run(KEPT[name], *inputs)
    assert [site.rewritten for site in sites] == [True]
    assert relative_l2(out, KEPT[name](*inputs)) < BOUND


@torch._dynamo.allow_in_graph
def log(scores: Tensor) -> Tensor:
    return scores.mean()


def test_a_function_of_the_user_is_a_reader_whatever_its_name() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 6
        log(scores)
        return scores.softmax(-1) @ v

    inputs = qkv()
    out, sites = run(attend, *inputs)
    assert sites == [] and torch.equal(out, attend(*inputs))


def overwritten(tensor: int) -> Callable[..., Tensor]:
    """An operand changes between its use and the last product."""

    def attend(*inputs: Tensor) -> Tensor:
        q, k, v = (item * 1.0 for item in inputs)
        scores = q @ k.mT / 6
        (q, k, v)[tensor].mul_(3)
        return scores.softmax(-1) @ v

    return attend


LEFT: dict[str, Callable[..., Any]] = {
    "where, a filled tensor that is written to": lambda q, k, v: (
        (s := q @ k.mT / 6),
        (low := torch.full_like(s, -1e9)),
        low[:, :, 3].zero_(),
        torch.where(k[:, :, None, :, 0] > 0, s, low).softmax(-1) @ v,
    )[3],
    "where, a filled tensor that competes": lambda q, k, v: (
        torch.where(k[:, :, None, :, 0] > 0, s := q @ k.mT / 6, torch.full_like(s, -2.0)).softmax(-1) @ v
    ),
    "where, random numbers": lambda q, k, v: (
        torch.where(
            k[:, :, None, :, 0] > 0, s := q @ k.mT / 6, -1e9 * torch.ones_like(s) * v[..., :24]
        ).softmax(-1)
        @ v
    ),
    "query overwritten before the last product": overwritten(0),
    "key overwritten before the last product": overwritten(1),
    "view of the key overwritten": lambda q, k, v: (
        (s := q @ (c := k * 1.0).mT / 6),
        c[:, :, 3].zero_(),
        s.softmax(-1) @ v,
    )[2],
    "logits read before they are masked": lambda q, k, v: (
        (s := q @ k.mT / 6),
        (total := s.sum()),
        s.masked_fill_(q[..., :1] > 0, -1e9),
        s.softmax(-1) @ v + total,
    )[3],
    "a copy of the scores that is read": lambda q, k, v: (
        s := q @ k.mT / 6,
        c := s.clone(),
        s.softmax(-1) @ v + c.mean(),
    )[2],
    "a copy that random numbers are drawn for": lambda q, k, v: (
        w := (q @ k.mT / 6).softmax(-1),
        F.dropout(w, 0.5, training=True),
        w @ v,
    )[2],
    "mask multiplied in and nothing added": lambda q, k, v: (
        ((q @ k.mT / 6) * (q[..., :24] > 0).float()).softmax(-1) @ v
    ),
    "mask multiplied in, another one added": lambda q, k, v: (
        (
            (q @ k.mT / 6) * (k[..., 0] > 0).float()[:, :, None]
            + -1e9 * (1 - (k[..., 1] > 0).float()[:, :, None])
        ).softmax(-1)
        @ v
    ),
    "weights from data multiplied in": lambda q, k, v: (
        ((q @ k.mT / 6) * (w := k[..., 0].sigmoid()[:, :, None]) + -1e9 * (1 - w)).softmax(-1) @ v
    ),
    "a number that swallows the scores": lambda q, k, v: (q @ k.mT / 6 + 1e9).softmax(-1) @ v,
    "factor of each key": lambda q, k, v: (q @ k.mT * k[..., :1].mT).softmax(-1) @ v,
    "floor among the scores": lambda q, k, v: (q @ k.mT / 6).clamp(min=-1.0).softmax(-1) @ v,
    "scores of half the heads": lambda q, k, v: (
        (q @ k.mT / 6).view(2, 4, 48, 12).softmax(-1).view(2, 4, 24, 24) @ v
    ),
    "minus the maximum of each row, which is returned": lambda q, k, v: (
        (s := q @ k.mT / 6),
        (top := s.amax(-1, keepdim=True)),
        (s - top).softmax(-1) @ v + top,
    )[2],
    "minus the maximum of each column": lambda q, k, v: (
        ((s := q @ k.mT / 6) - s.amax(-2, keepdim=True)).softmax(-1) @ v
    ),
    "minus the maximum of other scores": lambda q, k, v: (
        ((s := q @ k.mT / 6).sin() - s.amax(-1, keepdim=True)).softmax(-1) @ v
    ),
    "einsum over the queries": lambda q, k, v: torch.einsum("bhst,bhsd->bhtd", (q @ k.mT / 6).softmax(-1), v),
    "other weights set to zero": lambda q, k, v: (
        (q @ k.mT / 6)
        .masked_fill(k[:, :, None, :, 0] > 0, -math.inf)
        .softmax(-1)
        .masked_fill(q[..., :1] > 0, 0.0)
        @ v
    ),
    "keys hidden by finite numbers, some set to zero": lambda q, k, v: (
        (h := k[:, :, None, :, 0] > 0),
        (q @ k.mT / 6)
        .masked_fill(h, -1e9)
        .masked_fill(k[:, :, None, :, 1] > 0, -1e9)
        .softmax(-1)
        .masked_fill(h, 0.0)
        @ v,
    )[1],
    "weights set to zero in place": lambda q, k, v: (
        (w := (q @ k.mT / 6).softmax(-1)),
        w.masked_fill_(q[..., :1] > 0, 0.0),
        w @ v,
    )[2],
}


@pytest.mark.parametrize("name", LEFT)
def test_more_look_alikes(name: str) -> None:
    function, inputs = LEFT[name], qkv()
    expected = function(*inputs)
    out, sites = run(function, *inputs)
    assert not sites and relative_l2(out, expected) < 1e-5


def test_an_overwritten_key_that_was_repeated_before_is_not_read_again() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        few = k[:, :2] * 1.0
        repeated = few.repeat_interleave(2, 1)
        few.zero_()
        return F.scaled_dot_product_attention(q, repeated, v[:, :2].repeat_interleave(2, 1))

    inputs = qkv()
    out, (site,) = run(attend, *inputs)
    assert site.rewritten and site.key is not None and site.key.shape[1] == 4
    assert relative_l2(out, attend(*inputs)) < BOUND


def test_nothing_of_the_scores_is_left_behind() -> None:
    """Neither the product nor what was done to it in place."""
    backend = RewritingBackend(CONFIG)
    torch.compile(in_place, backend=backend)(*qkv(), padding())
    text = graph_text(backend.graphs[0].graph)
    assert not any(word in text for word in ("matmul", "masked_fill_", "iadd", "softmax")), text


def layout(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """The `memory_order` of the one operator, and the output's numbers and strides checked."""
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(function, backend=backend)(*inputs)
    expected = function(*inputs)
    pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
    for actual, exact in pairs:
        assert relative_l2(actual, exact) < BOUND and actual.stride() == exact.stride()
    (node,) = (node for node in backend.graphs[0].graph.nodes if "sage_inductor" in str(node.target))
    return node.kwargs.get("memory_order")


def test_an_output_that_is_transposed_and_copied_is_laid_out_so() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 6).softmax(-1) @ v

    nhd = [0, 2, 1, 3]
    assert layout(lambda *x: attend(*x).transpose(1, 2).contiguous().view(2, 24, -1), *qkv()) == nhd
    assert layout(lambda *x: attend(*x).permute(0, 2, 1, 3).reshape(2, 24, -1), *qkv()) == nhd
    assert layout(lambda *x: F.scaled_dot_product_attention(*x).transpose(1, 2).flatten(2), *qkv()) == nhd
    # Someone who sees the strides, or reads the output as it is: nothing changes.
    assert layout(lambda *x: attend(*x).transpose(1, 2), *qkv()) is None
    assert layout(lambda *x: ((out := attend(*x)).transpose(1, 2).flatten(2), out), *qkv()) is None
    assert layout(lambda *x: attend(*x).transpose(1, 3).flatten(2), *qkv()) is None


def test_gradients_pass_an_output_that_is_laid_out_for_its_copy() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT / 6).softmax(-1) @ v).transpose(1, 2).flatten(2).square().sum()

    inputs = [tensor.requires_grad_() for tensor in qkv()]
    backend = RewritingBackend(Config(kernel="reference", precision="accurate", training=True))
    with torch.enable_grad():
        attend(*inputs).backward()
        expected = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        torch.compile(attend, backend=backend)(*inputs).backward()
    assert [site.rewritten for site in backend.sites] == [True]
    for tensor, exact in zip(inputs, expected, strict=True):
        assert tensor.grad is not None and exact is not None and relative_l2(tensor.grad, exact) < BOUND
