"""FlexAttention: mask_mods that are bands or rows over keys, lists of blocks that fit them, and all that stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
)

from sage_inductor import Config, explain
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, capture, graph_text, max_error, relative_l2

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


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (lambda: block_mask(document), "block_mask=lists beside segments"),
        (lambda: block_mask(strictly), "mask_mod=neither a band nor a row"),
        (lambda: block_mask(padding), "block_mask=lists beside key_padding"),
        (lambda: block_mask(and_masks(causal, padding)), "block_mask=lists beside causal + key_padding"),
        (lambda: sparse(noop_mask), "block_mask=lists that differ from the mask_mod"),
        (lambda: sparse(causal), "block_mask=lists that differ from the mask_mod"),
    ],
)
def test_what_stays(blocks: Callable[[], BlockMask], reason: str) -> None:
    site = site_of(blocks(), *qkv())
    assert not site.rewritten and any(reason in text for text in site.reasons), site.reasons


def sparse(mask_mod: Any) -> BlockMask:
    """Two blocks of keys for each block of queries, whatever mask_mod allows."""
    counts = torch.full((1, 1, LENGTH // BLOCK), 2, dtype=torch.int32)
    indices = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1]], dtype=torch.int32)[None, None]
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


def test_scores_that_are_changed_stay() -> None:
    slopes = torch.rand(4)
    for score_mod, text in (
        (lambda s, b, h, q, k: s + slopes[h] * (k - q), "score_mod=getitem, sub, mul, add"),
        (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), "score_mod=truediv, tanh, mul"),
    ):
        site = site_of(None, *qkv(), score_mod=score_mod)
        assert not site.rewritten and any(text in reason for reason in site.reasons), site.reasons


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
