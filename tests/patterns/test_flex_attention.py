"""FlexAttention: mask_mods that are bands or rows over keys, lists of blocks that fit them, and all that stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

from sage_inductor import Config, explain
from sage_inductor.report.site import Site
from sage_inductor.rewriting import decision
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, capture, graph_text, max_error, relative_l2
from sage_inductor.torch_internals.dispatch import outside_tracing
from sage_inductor.tuning import Choice, Comparison

CONFIG = Config(kernel="reference", precision="accurate")
LENGTH, BLOCK = 96, 32
SEEN = torch.arange(LENGTH) < torch.tensor([[LENGTH], [50]])
DOCUMENTS = torch.arange(LENGTH) // 40
pytestmark = pytest.mark.usefixtures("inference")


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k <= 40


def padding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return SEEN[b, k]


def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENTS[q] == DOCUMENTS[k]


def strictly(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q > k


def block_mask(mask_mod: Any, length: int = LENGTH) -> BlockMask:
    return create_block_mask(mask_mod, 2, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)


def qkv(heads: int = 4, kv_heads: int = 4, length: int = LENGTH) -> list[Tensor]:
    return [torch.randn(2, length, count, 32).transpose(1, 2) for count in (heads, kv_heads, kv_heads)]


def attend(blocks: BlockMask | None, **options: Any) -> Callable[..., Tensor]:
    """A model whose mask comes with each call, as an argument."""

    def model(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask | None) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks, **options).transpose(1, 2).flatten(2)

    return model


def site_of(blocks: BlockMask | None, *tensors: Tensor, **options: Any) -> Site:
    """The one site, its values checked against float64, its strides against eager."""
    torch.compiler.reset()
    backend, model = RewritingBackend(CONFIG), attend(blocks, **options)
    out = torch.compile(model, backend=backend)(*tensors, blocks)
    exact = model(*(tensor.double() for tensor in tensors), blocks)
    assert relative_l2(out, exact) < 0.02 and max_error(out, exact) < 0.06
    assert out.stride() == model(*tensors, blocks).stride()
    (site,) = backend.sites
    assert site.pattern == "flex_attention"
    return site


Case = tuple[Any, Any]  # a score_mod and what makes a block_mask, or None for either


def sites_of(cases: list[Case]) -> list[Site]:
    """The sites of one model that calls flex_attention so, in this order; values and strides checked as by `site_of`."""
    blocks = [None if make is None else make() for _, make in cases]

    def model(q: Tensor, k: Tensor, v: Tensor, blocks: list[BlockMask | None]) -> list[Tensor]:
        return [
            flex_attention(q, k, v, score_mod=score_mod, block_mask=block)
            for (score_mod, _), block in zip(cases, blocks, strict=True)
        ]

    torch.compiler.reset()
    backend, inputs = RewritingBackend(CONFIG), qkv()
    outputs = torch.compile(model, backend=backend)(*inputs, blocks)
    exact = model(*(tensor.double() for tensor in inputs), blocks)
    for out, expected in zip(outputs, exact, strict=True):
        assert relative_l2(out, expected) < 0.02 and max_error(out, expected) < 0.06
        assert out.stride() == expected.stride()
    assert len(backend.graphs) == 1
    return list(backend.sites)


@pytest.mark.parametrize(
    ("mask_mod", "kind"),
    [
        (causal, "causal"),
        (and_masks(causal, window), "sliding_window left=40 right=0"),
        (lambda b, h, q, k: (q - k).abs() <= 9, "band left=9 right=9"),
    ],
)
def test_bands_with_lists(mask_mod: Any, kind: str) -> None:
    site = site_of(block_mask(mask_mod), *qkv())
    assert site.rewritten and site.mask == kind


def test_without_a_mask_and_with_grouped_heads() -> None:
    assert site_of(None, *qkv()).mask == "none"
    site = site_of(block_mask(causal), *qkv(4, 2), enable_gqa=True, scale=0.3)
    assert site.rewritten and site.mask == "causal"


STARTS = torch.tensor([0, 40, 80, LENGTH])
OFFSET = torch.tensor(5)


def of_documents(mask_mod: Any, starts: Tensor = STARTS, shift: int = 0) -> Any:
    """A mask_mod of each document, whose positions start at 0, as attention-gym's `generate_doc_mask_mod` makes it."""

    def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = DOCUMENTS[q] == DOCUMENTS[k]
        return same & mask_mod(b, h, q - starts[DOCUMENTS[q]], k - starts[DOCUMENTS[k] + shift])

    return within


BESIDE_BANDS: list[tuple[Any, str]] = [
    (document, "segments"),
    (and_masks(causal, window, document), "sliding_window left=40 right=0 + segments"),
    (of_documents(causal), "causal + segments"),
    (of_documents(and_masks(causal, lambda b, h, q, k: q - k <= 9)), "sliding_window left=9 right=0 + segments"),
    (and_masks(causal, padding), "causal + key_padding"),
    (and_masks(causal, padding, document), "causal + key_padding + segments"),
    (lambda b, h, q, k: causal(b, h, q + 5, k), "band left=all right=5"),
]  # fmt: skip


def test_lists_beside_segments_and_rows() -> None:
    sites = sites_of([(None, partial(block_mask, mask_mod)) for mask_mod, _ in BESIDE_BANDS])
    assert [site.mask for site in sites] == [kind for _, kind in BESIDE_BANDS]
    assert all(site.rewritten for site in sites)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """What `auto` would have measured."""
    seen: list[Comparison] = []

    def choose(comparison: Comparison, *_: Any) -> Choice:
        seen.append(comparison)
        return Choice(None, ("only looked at",))

    monkeypatch.setattr(decision, "choose", choose)
    return seen


def under_auto(blocks: BlockMask, *tensors: Tensor, **options: Any) -> Site:
    torch.compiler.reset()
    backend = RewritingBackend(dataclasses.replace(CONFIG, kernel="auto"))
    torch.compile(attend(blocks, **options), backend=backend)(*tensors, blocks)
    (site,) = backend.sites
    return site


@pytest.mark.parametrize(
    ("mask_mod", "left", "right"),
    [
        (and_masks(causal, window), 40, 0),
        pytest.param(lambda b, h, q, k: (q - k).abs() <= 9, 9, 9, marks=pytest.mark.slow),
    ],
)
def test_what_a_kernel_has_to_be_faster_than_is_flex_attention(
    compared: list[Comparison], mask_mod: Any, left: int, right: int
) -> None:
    """Not SDPA with the mask as a tensor. It is compiled while a model is."""
    tensors = qkv(4, 2)
    under_auto(block_mask(mask_mod), *tensors, enable_gqa=True, scale=0.3)
    standing = compared[0].sdpa.standing
    assert standing is not None and (standing.name, compared[0].sdpa.attn_mask) == ("flex_attention", None)
    nested = []

    def measuring(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with outside_tracing():
            nested.append(standing.run(*tensors))
        return module

    assert torch.equal(torch.compile(lambda x: x + 1, backend=measuring)(tensors[0]), tensors[0] + 1)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(item.double() for item in tensors), (i - j <= left) & (j - i <= right), enable_gqa=True, scale=0.3
    )
    assert relative_l2(nested[0], expected) < 1e-5


def test_documents_stay_under_auto(compared: list[Comparison]) -> None:
    """What the graph computes for their ids is in no measurement."""
    for mask_mod, mask in ((document, "segments"), (of_documents(causal), "causal + segments")):
        site = under_auto(block_mask(mask_mod), *qkv())
        assert (site.rewritten, site.mask) == (False, mask)
        assert (
            'flex_attention with segments (supported: a kernel by name; "auto" has no measurement against it)'
            in site.reasons
        )


def test_a_mask_that_reads_more_is_compared_as_before(compared: list[Comparison]) -> None:
    for mask_mod in (and_masks(causal, padding), causal):
        site = under_auto(block_mask(mask_mod), *qkv())
        assert site.reasons == ("only looked at",)
    assert [comparison.sdpa.standing for comparison in compared] == [None, None]
    assert compared[0].sdpa.attn_mask is not None and compared[1].sdpa.is_causal


def natten(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Neighbours in a picture of 12 columns."""
    return ((q // 12 - k // 12).abs() <= 2) & ((q % 12 - k % 12).abs() <= 2)


STAYS: list[tuple[Any, str]] = [
    (lambda: block_mask(strictly), "mask_mod=neither a band nor a row"),
    (lambda: block_mask(natten), "mask_mod=neither a band nor a row"),
    (lambda: block_mask(or_masks(causal, lambda b, h, q, k: k < 20)), "mask_mod=prefix"),
    (lambda: block_mask(of_documents(causal, shift=1)), "mask_mod=neither a band nor a row"),
    (lambda: block_mask(or_masks(causal, document)), "mask_mod=neither a band nor a row"),
    (lambda: block_mask(lambda b, h, q, k: q // 16 % 3 == k // 16 % 3), "segments in several pieces"),
    (lambda: sparse(causal), "block_mask=lists that differ from the mask_mod"),
    (lambda: sparse(document), "block_mask=lists that differ from the mask_mod"),
    (lambda: sparse(padding), "block_mask=lists that differ from the mask_mod"),
]


def test_what_stays() -> None:
    sites = sites_of([(None, blocks) for blocks, _ in STAYS])
    for site, (_, reason) in zip(sites, STAYS, strict=True):
        assert not site.rewritten and any(reason in text for text in site.reasons), (reason, site.reasons)


def sparse(mask_mod: Any) -> BlockMask:
    """One or two blocks of keys for each block of queries, whatever mask_mod allows."""
    counts = torch.tensor([[[2, 1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1]], dtype=torch.int32)[None, None]
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


SLOPES = torch.exp2(-torch.arange(1, 5) * 2.0)
BIAS = torch.randn(2, 4, LENGTH + 8, LENGTH + 8)
KEPT = torch.randn(LENGTH)


def alibi(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + SLOPES[h] * (k - q)


ADDED: list[tuple[Any, Any, str | None]] = [
    (alibi, None, "key_padding"),
    (alibi, causal, "causal + key_bias"),
    (lambda s, b, h, q, k: s - (q - k) * torch.exp2(-((h + 1) * 2.0)), causal, "causal + key_bias"),
    (lambda s, b, h, q, k: torch.where(q >= k, alibi(s, b, h, q, k), -float("inf")), None, "causal + key_bias"),
    (lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), None, "causal"),
    (lambda s, b, h, q, k: s + KEPT[k] - (q + 1) / SLOPES[h], None, "key_padding"),
    (lambda s, b, h, q, k: s + BIAS[b, h, q, k], None, "additive"),
    (lambda s, b, h, q, k: s + BIAS[0][h, q, k], None, None),
]  # fmt: skip


def test_scores_to_which_is_added() -> None:
    sites = sites_of(
        [
            (score_mod, None if mask_mod is None else partial(block_mask, mask_mod))
            for score_mod, mask_mod, _ in ADDED
        ]
    )
    assert [site.mask if site.rewritten else None for site in sites] == [kind for *_, kind in ADDED]


def test_a_bias_is_read_where_it_lies() -> None:
    """No copy of it is made, nor of a part."""

    def model(q: Tensor, bias: Tensor) -> Tensor:
        return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + bias[h, i, j])

    graph = capture(model, torch.randn(1, 2, 64, 32), torch.randn(2, 70, 64)).graph
    rewrite_graph(graph, CONFIG)
    (call,) = (node for node in graph.nodes if "attention" in str(node.target))
    read = call.args[3]
    while read.op != "placeholder":
        assert read.target.name() == "aten::narrow"
        read = read.args[0]


CHANGED: list[tuple[Any, Any, str]] = [
    (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), None, "score_mod=truediv, tanh, mul"),
    (lambda s, b, h, q, k: s + KEPT[(q - k).abs()], None, "score_mod=sub, abs, getitem, add"),
    (lambda s, b, h, q, k: s + SLOPES[h] * (k - q).abs(), None, "score_mod=getitem, sub, abs, mul, add"),
    (lambda s, b, h, q, k: s + BIAS[b, h, k, q], None, "score_mod=getitem, add"),
    # What may be -inf hides a query.
    (lambda s, b, h, q, k: s + torch.where(q > 3, 0.0, -float("inf")), None, "score_mod=gt, where, add"),
    (lambda s, b, h, q, k: s + KEPT[k] + KEPT[q], None, "score_mod=getitem, add"),
    (lambda s, b, h, q, k: s + (k - torch.log(q + 1.0)), None, "score_mod=add, log, sub"),
    (lambda s, b, h, q, k: s + BIAS[b, h, q, k], causal, "score_mod=a tensor beside a mask"),
    (lambda s, b, h, q, k: torch.where(s > 0, s, -float("inf")), None, "score_mod=gt, where"),
    (alibi, document, "mask_mod=additive"),
]  # fmt: skip


def test_scores_that_are_changed_stay() -> None:
    sites = sites_of(
        [
            (score_mod, None if mask_mod is None else partial(block_mask, mask_mod))
            for score_mod, mask_mod, _ in CHANGED
        ]
    )
    for site, (*_, text) in zip(sites, CHANGED, strict=True):
        assert not site.rewritten and any(text in reason for reason in site.reasons), (text, site.reasons)


def test_the_log_sum_exp_stays() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, return_lse=True)

    backend = RewritingBackend(CONFIG)
    torch.compile(model, backend=backend)(*qkv())
    (site,) = backend.sites
    assert not site.rewritten and "log-sum-exp" in site.reasons[0]


def test_lists_that_come_later_are_looked_at() -> None:
    """The graph is compiled for one block_mask. Another may come: of the same mask_mod, or one that hides more."""
    backend = RewritingBackend(CONFIG)
    model, inputs = attend(None), qkv()
    compiled = torch.compile(model, backend=backend)
    whole, again = block_mask(causal), block_mask(causal)
    compiled(*inputs, whole)
    compiled(*inputs, again)
    assert len(backend.graphs) == 1
    assert whole.kv_num_blocks.max() > 0
    again.full_kv_num_blocks.zero_()  # keys of whole blocks would be left out
    with pytest.raises(RuntimeError, match="leave out keys that its mask_mod allows"):
        compiled(*inputs, again)
    compiled(*inputs, whole)


def test_lists_of_documents_that_come_later_are_looked_at() -> None:
    def blocks(length: int) -> BlockMask:
        ids = torch.arange(LENGTH) // length
        return block_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k))

    torch.compiler.reset()
    backend, model, inputs = RewritingBackend(CONFIG), attend(None), qkv()
    compiled = torch.compile(model, backend=backend)
    compiled(*inputs, blocks(40))
    other = blocks(17)
    exact = model(*(tensor.double() for tensor in inputs), other)
    assert relative_l2(compiled(*inputs, other), exact) < 0.02
    assert len(backend.graphs) == 1
    other.kv_num_blocks.sub_(1)  # the diagonal blocks have one partial block at least
    with pytest.raises(RuntimeError, match="leave out keys that its mask_mod allows"):
        compiled(*inputs, other)


def test_explain_and_symbolic_lengths() -> None:
    report = explain(attend(None), *qkv(), block_mask(causal), config=CONFIG)
    assert [site.mask for site in report.sites] == ["causal"] and report.graphs == 1
    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(attend(None), backend=backend)
    for length in (LENGTH, LENGTH + 64, LENGTH + 96):
        inputs = qkv(length=length)
        out = compiled(*inputs, block_mask(causal, length))
        exact = attend(None)(*(tensor.double() for tensor in inputs), block_mask(causal, length))
        assert relative_l2(out, exact) < 0.02
    assert [site.mask for site in backend.sites][:1] == ["causal"]


def test_documents_of_symbolic_lengths() -> None:
    backend, plain = RewritingBackend(CONFIG), CompileCounter()
    for compiler in (plain, backend):
        torch.compiler.reset()
        compiled = torch.compile(attend(None), backend=compiler)
        for length in (64, 96, 160):
            ids = torch.arange(length) // 40
            blocks = block_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), length)  # noqa: B023
            inputs = qkv(length=length)
            out = compiled(*inputs, blocks)
            if compiler is backend:
                exact = attend(None)(*(tensor.double() for tensor in inputs), blocks)
                assert relative_l2(out, exact) < 0.02
    assert len(backend.graphs) == plain.frame_count
    assert {site.mask for site in backend.sites} == {"causal + segments", "causal (symbolic) + segments"}


def test_the_operator_takes_its_place() -> None:
    def model(q: Tensor) -> Tensor:
        return flex_attention(q, q, q)

    graph = capture(model, torch.randn(1, 2, 64, 32)).graph
    rewrite_graph(graph, CONFIG)
    lines = [line.partition(" = ")[2] for line in graph_text(graph).splitlines()]
    calls = [line for line in lines if "attention" in line]
    assert calls == [
        "sage_inductor.attention(a, a, a, scale=0.17677669529663687, kernel_name='reference', "
        "precision='accurate'): 1x2x64x32"
    ]
