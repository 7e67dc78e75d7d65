"""The forms of attention that Inductor's own fusion knows (`_sfdp_pattern_1` to `_30` of torch 2.13), and what its tests
say it must not fuse: each found and right here, or left alone, as docs/patterns.md lists them.

`python tests/patterns/test_inductor_forms.py` prints the table for docs/patterns.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
# INT8 scores at these sizes give relative errors below .02; a wrong scale, mask or head order gives above .2.
BOUND = 0.03
DOC = Path(__file__).parents[2] / "docs" / "patterns.md"
BATCH, LENGTH, HEADS, DIM = 4, 24, 2, 32


@dataclass(frozen=True)
class Form:
    """`attend(q, k, v, *extra, p)`: q, k, v are `layout`; p is None where there is no dropout, else its probability,
    0 in inference. `mask` is what ours says the mask is, None where no site is found."""

    number: str
    says: str
    attend: Callable[..., Any]
    layout: str = "HND"
    extra: tuple[Tensor, ...] = ()
    mask: str | None = "none"
    dtype: torch.dtype = torch.float32
    dropout: bool = False
    comment: str = ""

    def inputs(self) -> list[Tensor]:
        shape = {
            "HND": (BATCH, HEADS, LENGTH, DIM),
            "NHD": (BATCH, LENGTH, HEADS, DIM),
            "3-D": (BATCH, LENGTH, 16),
        }[self.layout]
        torch.manual_seed(0)
        return [torch.randn(shape, dtype=self.dtype) for _ in range(3)] + list(self.extra)


def heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor.permute(0, 2, 1, 3) for tensor in tensors]


def drop(weights: Tensor, p: float | None) -> Tensor:
    return weights if p is None else F.dropout(weights, p, training=p > 0)


def divided(q: Tensor, k: Tensor, v: Tensor, p: float | None = None) -> Tensor:
    return drop(torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(DIM)).softmax(dim=-1), p).matmul(v)


def multiplied(q: Tensor, k: Tensor, v: Tensor, p: float | None = None) -> Tensor:
    return drop((q @ k.transpose(-2, -1)).mul(0.2).softmax(dim=-1), p).matmul(v)


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float | None = None) -> Tensor:
    return drop(torch.softmax(q @ k.transpose(-2, -1) / 5.0 + mask, dim=-1), p) @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor, p: float | None = None, scaled_query: bool = False) -> Tensor:
    q, k, v = heads(q, k, v)
    scores = (q / 6.0) @ k.transpose(-2, -1) if scaled_query else q @ k.transpose(-2, -1) / 6.0
    return drop(torch.softmax(scores.to(torch.float32), dim=-1), p).to(torch.float16) @ v


def permuted(inner: Callable[..., Tensor], *inputs: Tensor, p: float | None = None) -> Tensor:
    return inner(*heads(*inputs[:3]), *inputs[3:], p=p)


def of_sequences(q: Tensor, k: Tensor, v: Tensor, p: float | None = None) -> Tensor:
    return torch.bmm(drop(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), p), v)


def distilbert(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, p: float | None = None, scaled_query: bool = False
) -> Tensor:
    q, k, v = heads(q, k, v)
    scores = (q.div(5.0) @ k.transpose(-2, -1)) if scaled_query else (q @ k.transpose(-2, -1)).div(5.0)
    lowest = torch.full((), -math.inf, dtype=q.dtype)
    hidden = (kept == 0).view(q.shape[0], 1, 1, LENGTH).expand_as(scores)
    return drop(torch.softmax(scores.masked_fill(hidden, lowest), dim=-1), p) @ v


def gpt2(q: Tensor, k: Tensor, v: Tensor, causal: Tensor, *mask: Tensor, p: float | None = None) -> Tensor:
    scores = (q @ k.permute(0, 1, 3, 2)).div(torch.full([], math.sqrt(DIM), dtype=q.dtype))
    lowest = torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype)
    scores = torch.where(causal, scores, lowest)
    for term in mask:
        scores = scores + term
    return drop(scores.softmax(dim=-1).type(v.dtype), p).matmul(v)


def t5(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, p: float | None = None, returns: bool = False) -> Any:
    q, k, v = heads(q, k, v)
    scores = torch.matmul(q * 0.2, k.permute(0, 1, 3, 2))
    for term in bias:
        scores += term
    out = drop(scores.float().softmax(dim=-1).type_as(q), p).matmul(v)
    return (out, k, v) if returns else out


def bart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    size = q.shape[0]
    q, k, v = (tensor.reshape(size * HEADS, LENGTH, DIM) for tensor in (q * 0.2, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(size, HEADS, LENGTH, -1) + mask
    weights = F.softmax(scores.view(size * HEADS, LENGTH, -1), dim=-1)
    return torch.bmm(weights, v).view(size, HEADS, LENGTH, DIM)


def math_path(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    scores = torch.ops.aten.mul.Scalar(q, 0.4) @ torch.ops.aten.mul.Scalar(k.transpose(-2, -1), 0.4)
    for term in mask:
        scores = scores + term
    return torch.ops.aten._safe_softmax.default(scores, -1) @ v


def tensor_factor(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, divides: bool = False) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores.div(factor) if divides else scores.mul(factor)).softmax(dim=-1).matmul(v)


def reused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.matmul(q, k.transpose(-2, -1)).div(6.0).softmax(dim=-1)
    return weights.matmul(v), weights


torch.manual_seed(1)
FULL = torch.randn(LENGTH, LENGTH)
ROW = torch.randn(BATCH, 1, 1, LENGTH)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
KEPT = torch.ones(BATCH, LENGTH, dtype=torch.long).tril()
FP16 = torch.float16
FORMS = (
    Form("1", "divided", divided),
    Form("2", "multiplied", multiplied),
    Form("3", "divided, dropout", divided, dropout=True),
    Form("4", "multiplied, dropout", multiplied, dropout=True),
    Form("5", "divided, additive mask", added, extra=(FULL,), mask="additive"),
    Form("5", "divided, bool added as a number", added, extra=(CAUSAL,), mask="additive"),
    Form("6", "divided, additive mask, dropout", added, extra=(FULL,), mask="additive", dropout=True),
    Form("7", "NHD, softmax in float32, dropout", in_float32, "NHD", dtype=FP16, dropout=True),
    Form("8", "NHD, softmax in float32", in_float32, "NHD", dtype=FP16),
    Form(
        "9", "NHD, divided query, softmax in float32, dropout",
        lambda *args, p=None: in_float32(*args, p=p, scaled_query=True), "NHD", dtype=FP16, dropout=True,
    ),
    Form(
        "10", "NHD, divided query, softmax in float32",
        lambda *args: in_float32(*args, scaled_query=True), "NHD", dtype=FP16,
    ),
    Form("11", "NHD, divided", lambda *args: permuted(divided, *args), "NHD"),
    Form("12", "NHD, divided, dropout", lambda *args, p=None: permuted(divided, *args, p=p), "NHD", dropout=True),
    Form("13", "3-D bmm, no scale, dropout", of_sequences, "3-D", dropout=True),
    Form("14", "NHD, divided, additive mask (BERT)", lambda *args: permuted(added, *args), "NHD", (FULL,), "additive"),
    Form("15", "NHD, masked_fill of padding (DistilBERT)", distilbert, "NHD", (KEPT,), "key_padding"),
    Form(
        "16", "NHD, divided, additive mask, dropout (BERT)",
        lambda *args, p=None: permuted(added, *args, p=p), "NHD", (FULL,), "additive", dropout=True,
    ),
    Form(
        "17", "NHD, masked_fill of padding, dropout (DistilBERT)",
        distilbert, "NHD", (KEPT,), "key_padding", dropout=True,
    ),
    Form(
        "18", "NHD, where with a minimum, dropout, key and value returned (GPT-2)",
        lambda q, k, v, m, p=None: (permuted(gpt2, q, k, v, m, p=p), *heads(k, v)),
        "NHD", (CAUSAL,), "additive", dropout=True,
    ),
    Form("19", "where with a minimum, additive mask (GPT-2)", gpt2, "HND", (CAUSAL, ROW), "additive"),
    Form(
        "20", "NHD, divided query, masked_fill of padding, dropout (DistilBERT)",
        lambda *args, p=None: distilbert(*args, p=p, scaled_query=True),
        "NHD", (KEPT,), "key_padding", dropout=True,
    ),
    Form("21", "NHD, bias added in place (T5)", t5, "NHD", (FULL,), "additive"),
    Form(
        "22", "NHD, bias added in place, key and value returned (T5)",
        lambda *args: t5(*args, returns=True), "NHD", (FULL,), "additive",
    ),
    Form("23", "NHD, no bias, key and value returned (T5)", lambda *args: t5(*args, returns=True), "NHD"),
    Form("24", "heads folded for bmm, mask unfolded (BART)", bart, "HND", (FULL,), "additive"),
    Form("25", "NHD, bias, dropout (T5)", t5, "NHD", (FULL,), "additive", dropout=True),
    Form(
        "26", "NHD, bias, dropout, key and value returned (T5)",
        lambda *args, p=None: t5(*args, p=p, returns=True), "NHD", (FULL,), "additive", dropout=True,
    ),
    Form(
        "27", "NHD, no bias, dropout, key and value returned (T5)",
        lambda *args, p=None: t5(*args, p=p, returns=True), "NHD", dropout=True,
    ),
    Form(
        "28", "multiplied, inputs not contiguous, dropout (Visformer)",
        lambda *args, p=None: permuted(multiplied, *args, p=p), "NHD", dropout=True,
    ),
    Form("29", "SDPA's own mathematics, additive mask", math_path, "NHD", (FULL,), "additive"),
    Form("30", "SDPA's own mathematics", math_path, "NHD"),
    Form("none", "times a tensor of each head", tensor_factor, extra=(torch.rand(HEADS, 1, 1),)),
    Form(
        "none", "divided by a tensor of each head",
        lambda *args: tensor_factor(*args, divides=True), extra=(torch.rand(HEADS, 1, 1) + 2,),
    ),
    Form("none", "integer mask added", added, extra=(torch.randint(-3, 3, (LENGTH, LENGTH)),), mask="additive"),
    Form("none", "number added", lambda q, k, v: added(q, k, v, 2.0)),  # type: ignore[arg-type]
    Form(
        "none", "weights used twice", reused, mask=None, comment="left alone: the weights have to exist",
    ),
)  # fmt: skip


def table() -> str:
    lines = ["| Inductor's | written as | here |", "|---|---|---|"]
    for form in FORMS:
        found = f"found, mask: {form.mask}" + ("; refused while dropout is active" if form.dropout else "")
        lines.append(f"| {form.number} | {form.says} | {form.comment or found} |")
    return "\n".join(lines)


def compiled(form: Form, *inputs: Any, **kwargs: Any) -> tuple[Any, RewritingBackend]:
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    with torch.no_grad():
        return torch.compile(form.attend, backend=backend, fullgraph=True)(*inputs, **kwargs), backend


IDS = [f"{form.number} {form.says}".replace(" ", "_") for form in FORMS]


# Slow: with a symbolic batch, what has the same form without dropout beside it.
@pytest.mark.parametrize(
    ("form", "dynamic"),
    [
        pytest.param(
            form,
            dynamic,
            id=f"{name}-{'dynamic' if dynamic else 'static'}",
            marks=[pytest.mark.slow] if dynamic and form.dropout else [],
        )
        for form, name in zip(FORMS, IDS, strict=True)
        for dynamic in (False, True)
    ],
)
def test_forms(form: Form, dynamic: bool) -> None:
    inputs = form.inputs()
    off = {"p": 0.0} if form.dropout else {}
    expected = form.attend(*(tensor.clone() for tensor in inputs), **off)
    if dynamic:
        for tensor in inputs[:3]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    out, backend = compiled(form, *inputs, **off)
    if form.mask is None:
        assert not backend.sites
        bound = 1e-5
    else:
        (site,) = backend.sites
        # 3-D inputs whose first dim is a symbol have a symbolic number of heads.
        assert site.rewritten and site.mask == form.mask, site
        bound = BOUND
    pairs = zip(out, expected, strict=True) if isinstance(expected, tuple) else [(out, expected)]
    for actual, exact in pairs:
        assert relative_l2(actual, exact) < bound and max_error(actual, exact) < 2 * bound
        assert actual.stride() == exact.stride() and actual.dtype == exact.dtype


@pytest.mark.parametrize("form", [form for form in FORMS if form.dropout], ids=lambda form: form.number)
def test_active_dropout_is_refused(form: Form) -> None:
    _, backend = compiled(form, *form.inputs(), p=0.3)
    assert [site.reasons for site in backend.sites] == [("dropout_p=0.3 (supported: 0.0)",)]


def test_the_document_has_the_table() -> None:
    assert table() in DOC.read_text()


if __name__ == "__main__":
    print(table())
