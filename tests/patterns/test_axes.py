"""Scores whose dims stand in any order, and grouped heads in a dim of their own: found and right, or left alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_patterns import BOUND, CONFIG, run
from test_written_out import Called, through_a_file
from torch import Tensor

from sage_inductor import rewrite_exported
from sage_inductor.testing import graph_text, max_error, relative_l2

BATCH, KV_HEADS, GROUP, QUERIES, KEYS, DIM = 2, 2, 3, 24, 40, 32
pytestmark = pytest.mark.usefixtures("inference")


def sizes(letters: str) -> tuple[int, ...]:
    """b batch, k key heads, g group, h all heads, q queries, t keys, d dim."""
    table = {"b": BATCH, "k": KV_HEADS, "g": GROUP, "h": KV_HEADS * GROUP, "q": QUERIES, "t": KEYS, "d": DIM}
    return tuple(table[letter] for letter in letters)


def inputs(*layouts: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(sizes(letters)) for letters in layouts)


def einsums(scores: str, weighted: str, dim: int = -1) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = torch.einsum(scores, q, k) / math.sqrt(DIM)
        return torch.einsum(weighted, (logits if bias is None else logits + bias).softmax(dim), v)

    return attend


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(*sizes("bkgqd"))
    scores = torch.matmul(q, k.unsqueeze(2).transpose(-1, -2)) / 6
    return torch.matmul(scores.softmax(-1), v.unsqueeze(2)).reshape(*sizes("bhqd"))


def grouped_and_expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (item[:, :, None].expand(-1, -1, GROUP, -1, -1) for item in (k, v))
    return ((q.view(*sizes("bkgqd")) @ k.mT / 6).softmax(-1) @ v).view(*sizes("bhqd"))


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (item[:, :, None] for item in (k, v))
    return F.scaled_dot_product_attention(q.view(*sizes("bkgqd")), k, v).view(*sizes("bhqd"))


def grouped_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma's in JAX ports: [batch, seq, key heads, group, dim], a constant causal mask."""
    scores = torch.einsum("bqkgd,btkd->bkgqt", q * DIM**-0.5, k)
    visible = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    scores = torch.where(visible[None, None, None], scores, -2.3819763e38)
    return torch.einsum("bkgqt,btkd->bqkgd", scores.softmax(-1), v).reshape(BATCH, QUERIES, -1)


def masked_behind(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Scores [batch, queries, keys, heads], as in protein models."""
    scores = torch.einsum("bqhd,bthd->bqth", q, k) / 6
    scores = scores.masked_fill(hidden[:, None, :, None] > 1.0, -math.inf)
    return torch.einsum("bqth,bthd->bqhd", scores.softmax(2), v)


def temperature_behind(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """A temperature of each head, the heads behind the keys; a bias that goes through it."""
    scores = (torch.einsum("bqhd,bthd->bqth", q, k) / 6 + bias[..., None]) * temperature
    return torch.einsum("bqth,bthd->bqhd", scores.softmax(2), v)


def folded_and_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys times queries, heads folded into the batch for the products and unfolded for the softmax."""
    scores = torch.bmm(k.flatten(0, 1), q.flatten(0, 1).mT).view(*sizes("bhtq")) / 6
    weights = scores.softmax(-2).view(-1, KEYS, QUERIES).transpose(1, 2)
    return torch.bmm(weights, v.flatten(0, 1)).view(*sizes("bhqd"))


def reshaped_to_all_heads(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Gemma's: queries of all heads, scores of groups, masked as those of all heads, weights of groups."""
    q = q.view(*sizes("bqkgd"))
    scores = torch.einsum("BTKGH,BSKH->BTKGS", q, k).reshape(*sizes("bqht")) * DIM**-0.5
    weights = torch.where(allowed[:, :, None] > -0.5, scores, -2.3819763e38).softmax(-1).view(*sizes("bqkgt"))
    return torch.einsum("BTKGS,BSKH->BTKGH", weights, v).reshape(*sizes("bqhd"))


def positions_of_a_grid(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys times queries, keys as a grid where terms of its rows and columns are added."""
    scores = (k @ q.mT / 6).view(2, 6, 5, 8, q.shape[2]) + rows + columns
    return torch.einsum("bhtq,bhtd->bhqd", scores.view(2, 6, KEYS, q.shape[2]).softmax(2), v)


NHD = ("bqhd", "bthd", "bthd")
HND = ("bhqd", "bhtd", "bhtd")
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str, int]] = {
    # name: function, inputs, kind of mask, heads of key and value
    "grouped, matmul": (grouped, inputs("bhqd", "bktd", "bktd"), "none", KV_HEADS),
    "grouped, expanded": (grouped_and_expanded, inputs("bhqd", "bktd", "bktd"), "none", KV_HEADS),
    "grouped, SDPA": (grouped_sdpa, inputs("bhqd", "bktd", "bktd"), "none", KV_HEADS),
    "grouped, einsum": (
        einsums("bkgqd,bktd->bkgqt", "bkgqt,bktd->bkgqd"),
        inputs("bkgqd", "bktd", "bktd"),
        "none",
        KV_HEADS,
    ),
    "grouped, einsum NHD": (
        einsums("bqkgd,btkd->bkgqt", "bkgqt,btkd->bqkgd"),
        inputs("bqkgd", "btkd", "btkd"),
        "none",
        KV_HEADS,
    ),
    "grouped, group before the key heads": (
        einsums("bgkqd,bktd->bgkqt", "bgkqt,bktd->bgkqd"),
        inputs("bgkqd", "bktd", "bktd"),
        "none",
        KV_HEADS,
    ),
    "grouped, a bias of each head": (
        einsums("bgkqd,bktd->bgkqt", "bgkqt,bktd->bgkqd"),
        inputs("bgkqd", "bktd", "bktd", "gkqt"),
        "additive",
        KV_HEADS,
    ),
    "grouped, causal": (grouped_masked, inputs("bqkgd", "btkd", "btkd"), "causal", KV_HEADS),
    "grouped, masked as all heads": (
        reshaped_to_all_heads, inputs("bqhd", "btkd", "btkd", "bqt"), "additive", KV_HEADS
    ),
    "one key head": (
        einsums("bqhd,btd->bqht", "bqht,btd->bqhd"), inputs("bqhd", "btd", "btd"), "none", 1
    ),
    "heads behind queries": (einsums("bqhd,bthd->bqht", "bqht,bthd->bqhd"), inputs(*NHD), "none", 6),
    "heads behind keys": (einsums("bqhd,bthd->bqth", "bqth,bthd->bqhd", 2), inputs(*NHD), "none", 6),
    "heads before the batch": (einsums("bqhd,bthd->hbqt", "hbqt,bthd->bqhd"), inputs(*NHD), "none", 6),
    "batch behind, as XLNet": (
        einsums("qbhd,tbhd->qtbh", "qtbh,tbhd->qbhd", 1), inputs("qbhd", "tbhd", "tbhd"), "none", 6
    ),
    "keys before queries": (einsums("bqhd,bthd->bhtq", "bhtq,bthd->bqhd", -2), inputs(*NHD), "none", 6),
    "a bias of each head behind": (
        einsums("bqhd,bthd->bqth", "bqth,bthd->bqhd", 2), inputs(*NHD, "qth"), "additive", 6
    ),
    "keys hidden, heads behind": (masked_behind, inputs(*NHD, "bt"), "key_padding", 6),
    "temperature of each head, heads behind": (
        temperature_behind, (*inputs(*NHD), torch.rand(6) + 0.5, torch.randn(QUERIES, KEYS)), "additive", 6
    ),
    "transposed weights": (lambda q, k, v: (k @ q.mT / 6).softmax(-2).mT @ v, inputs(*HND), "none", 6),
    "transposed scores": (lambda q, k, v: (k @ q.mT / 6).mT.softmax(-1) @ v, inputs(*HND), "none", 6),
    "adjoint scores": (lambda q, k, v: (k @ q.mH / 6).mH.softmax(-1) @ v, inputs(*HND), "none", 6),
    "channels first": (lambda q, k, v: v.mT @ (k @ q.mT / 6).softmax(-2), inputs(*HND), "none", 6),
    "what are keys to one are queries to the other": (
        lambda q, k, v: (k @ q.mT / 6).mT.softmax(-2).permute(0, 1, 3, 2) @ q * v.mean(), inputs(*HND), "none", 6
    ),
    "folded and swapped": (folded_and_swapped, inputs(*HND), "none", 6),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_any_order_of_dims(name: str) -> None:
    function, tensors, mask, kv_heads = FORMS[name]
    expected = function(*tensors)
    out, (site,) = run(function, *tensors)
    assert (site.mask, site.reasons) == (mask, ())
    assert site.key is not None and site.value is not None
    assert site.key.shape[1] == site.value.shape[1] == kv_heads
    assert relative_l2(out, expected) < BOUND and max_error(out, expected) < 2 * BOUND
    assert out.shape == expected.shape and out.stride() == expected.stride()


@pytest.mark.parametrize("name", FORMS)
def test_any_order_of_dims_exported(name: str) -> None:
    function, tensors, _, _ = FORMS[name]
    program = rewrite_exported(torch.export.export(Called(function), tensors), CONFIG)
    text = graph_text(program.graph_module.graph)
    assert text.count("sage_inductor.attention") == 1 and "softmax" not in text, text
    assert relative_l2(through_a_file(program)(*tensors), function(*tensors)) < BOUND


@pytest.mark.parametrize("single", ["b", "k", "g", "h", "d"])
@pytest.mark.parametrize(
    "layouts", [("bqkgd", "btkd", "bkgqt"), ("bkgqd", "bktd", "bkgqt"), ("bqhd", "bthd", "bqth")]
)
def test_a_dim_of_one_hides_nothing(layouts: tuple[str, str, str], single: str) -> None:
    query, key, scores = layouts
    tensors = tuple(
        torch.randn([1 if letter == single else sizes(letter)[0] for letter in letters])
        for letters in (query, key, key)
    )
    attend = einsums(f"{query},{key}->{scores}", f"{scores},{key}->{query}", scores.index("t"))
    out, (site,) = run(attend, *tensors)
    expected = attend(*tensors)
    assert site.rewritten and relative_l2(out, expected) < BOUND
    # The stride of a dim of one says nothing.
    assert [s for s, n in zip(out.stride(), out.shape, strict=True) if n > 1] == [
        s for s, n in zip(expected.stride(), out.shape, strict=True) if n > 1
    ]


def shuffled(rng: random.Random, letters: str) -> str:
    return "".join(rng.sample(letters, len(letters)))


@pytest.mark.parametrize("seed", range(60))
def test_random_orders(seed: int) -> None:
    """Every dim of every tensor anywhere, a softmax over any of them, hidden keys, a bias of some dims: found where the
    softmax is over the keys, and right either way."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shared = rng.choice(["h", "k", ""])
    query = "bqd" + shared + ("g" if shared == "k" else "")
    key = "btd" + shared
    scores = shuffled(rng, "bqt" + query[3:])
    layouts = [shuffled(rng, letters) for letters in (query, key, key)]
    output = shuffled(rng, query)
    over = rng.choice([scores.index("t"), scores.index("t"), rng.randrange(len(scores))])
    bias = torch.randn([size if rng.random() < 0.5 else 1 for size in sizes(scores)])
    hidden = torch.rand(
        [size if letter in "bt" else 1 for letter, size in zip(scores, sizes(scores), strict=True)]
    )
    biased, masked = rng.random() < 0.5, rng.random() < 0.5
    lowest = rng.choice([-1e9, -math.inf])
    first = f"{layouts[0]},{layouts[1]}->{scores}"
    second = f"{scores},{layouts[2]}->{output}"
    if rng.random() < 0.5:
        second = f"{layouts[2]},{scores}->{output}"

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        logits = torch.einsum(first, q, k) / 6
        logits = logits + bias if biased else logits
        logits = logits.masked_fill(hidden > 0.8, lowest) if masked else logits
        weights = logits.softmax(over)
        return torch.einsum(second, *((weights, v) if second.startswith(scores) else (v, weights)))

    tensors = (*inputs(*layouts), bias, hidden)
    expected = attend(*tensors)
    out, sites = run(attend, *tensors)
    assert out.stride() == expected.stride()
    if over != scores.index("t"):
        assert not sites
        assert relative_l2(out.nan_to_num(), expected.nan_to_num()) < 1e-5
        return
    assert len(sites) == 1, (first, second)
    assert relative_l2(out, expected) < BOUND, (first, second)


LEFT: dict[str, Callable[..., Any]] = {
    "softmax over queries": einsums("bqhd,bthd->bhqt", "bhqt,bthd->bqhd", 2),
    "softmax over heads": einsums("bqhd,bthd->bqth", "bqth,bthd->bqhd", 3),
    "softmax over the batch": einsums("bqhd,bthd->bqth", "bqth,bthd->bqhd", 0),
    "softmax over what is not summed": einsums("bqhd,bthd->bhqt", "bhtq,bthd->bqhd", -1),
    "keys summed in the scores": lambda q, k, v: torch.einsum(
        "bqh,bthd->bqhd", torch.einsum("bqhd,bthd->bqh", q, k).softmax(-1), v
    ),
    "keys of one channel": lambda q, k, v: einsums("bqhd,bthd->bhqt", "bhqt,bthd->bqhd")(q, k[..., :1], v),
    "one key, many values": lambda q, k, v: einsums("bqhd,bthd->bhqt", "bhqt,bthd->bqhd")(q, k[:, :1], v),
    "heads mixed": lambda q, k, v: torch.einsum(
        "bgqt,bthd->bqhd", torch.einsum("bqhd,btgd->bgqt", q, k).softmax(-1), v
    ),
    "transposed weights read twice": lambda q, k, v: (
        (w := torch.einsum("bqhd,bthd->bhtq", q, k).softmax(-2)),
        torch.einsum("bhtq,bthd->bqhd", w, v) + w.sum(),
    )[1],
    "temperature of each key": lambda q, k, v: torch.einsum(
        "bqth,bthd->bqhd", (torch.einsum("bqhd,bthd->bqth", q, k) * k[:, None, :, :, 0]).softmax(2), v
    ),
    "queries split": lambda q, k, v: (
        (torch.einsum("bqhd,bthd->bhtq", q, k).view(2, 4, KEYS, 4, 10) + v[0, 0, 0, :4, None])
        .softmax(2)
        .flatten(3)
        .mT
        @ v.transpose(1, 2)
    ),
    "heads merged with queries": lambda q, k, v: torch.einsum(
        "bqht,bthd->bqhd",
        (torch.einsum("bqhd,bthd->bqht", q, k).reshape(2, 4 * KEYS, KEYS) + v[0, 0, 0])
        .view(2, KEYS, 4, KEYS)
        .softmax(-1),
        v,
    ),
    "heads and queries exchanged by a view": lambda q, k, v: torch.einsum(
        "bqht,bthd->bqhd",
        torch.einsum("bqhd,bthd->bqht", q, k).reshape(2, 4, KEYS, KEYS).softmax(-1).reshape(2, KEYS, 4, KEYS),
        v,
    ),
    "zeroed in another order": lambda q, k, v: torch.einsum(
        "bhqt,bthd->bqhd",
        torch.einsum("bqhd,bthd->bhtq", q, k)
        .masked_fill(h := (v[0, 0, 0, :KEYS, None] > 0).expand(KEYS, KEYS), -math.inf)
        .softmax(-2)
        .transpose(-1, -2)
        .masked_fill(h, 0.0),
        v,
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_look_alikes(name: str) -> None:
    tensors = tuple(torch.randn(2, KEYS, 4, KEYS) for _ in range(3))
    out, sites = run(LEFT[name], *tensors)
    expected = LEFT[name](*tensors)
    assert not sites and relative_l2(out.nan_to_num(), expected.nan_to_num()) < 1e-5


@pytest.mark.parametrize("queries", [QUERIES, KEYS])
def test_terms_of_a_view_that_splits_the_keys_are_not_taken_for_others(queries: int) -> None:
    tensors = (torch.randn(2, 6, queries, DIM), *inputs("bhtd", "bhtd"))
    tensors = (*tensors, torch.randn(5, 1, queries), torch.randn(8, queries))
    out, sites = run(positions_of_a_grid, *tensors)
    assert relative_l2(out, positions_of_a_grid(*tensors)) < (BOUND if sites else 1e-5)


def test_another_reader_of_grouped_scores_keeps_them() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (torch.einsum("bkgqd,bktd->bkgqt", q, k) / 6).softmax(-1)
        return torch.einsum("bkgqt,bktd->bkgqd", weights, v), weights

    tensors = inputs("bkgqd", "bktd", "bktd")
    out, sites = run(attend, *tensors)
    assert not sites and torch.allclose(out[1], attend(*tensors)[1])
