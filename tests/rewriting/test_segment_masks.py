"""Masks of packed sequences become ids: document masks in many spellings, transformers' packed positions, near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sage_inductor import Config
from sage_inductor.kernels import AttentionParams
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.testing import RewritingBackend, graph_text, relative_l2

SEQ = 24
CONFIG = Config(kernel="reference", precision="accurate")
pytestmark = pytest.mark.usefixtures("inference")

# The second row: an id comes back, and two documents share one.
IDS = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8, [5] * 6 + [-3] * 6 + [5] * 12])
POSITIONS = torch.cat([torch.arange(7), torch.arange(9), torch.arange(8)])[None].expand(2, SEQ).clone()
CAUSAL = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()


def attend(make_mask: Callable[..., Tensor], *extra: Tensor, dynamic: bool | None = None) -> str:
    """The kind of the mask that `make_mask(*extra)` builds in the graph; checks numbers, strides and the count of graphs."""
    q, k, v = (torch.randn(2, SEQ, 4, 32).transpose(1, 2) for _ in range(3))

    def model(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, make_mask(*extra))

    torch.compiler.reset()
    plain = CompileCounter()
    torch.compile(model, backend=plain, dynamic=dynamic)(q, k, v, *extra)
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(model, backend=backend, dynamic=dynamic)(q, k, v, *extra)
    mask = make_mask(*extra)
    expected, _ = float64_attention(q, k, v, mask.expand(2, 4, SEQ, SEQ), AttentionParams())
    assert relative_l2(out, expected) < 0.013
    assert out.stride() == model(q, k, v, *extra).stride()
    assert len(backend.graphs) == plain.frame_count
    (site,) = backend.sites
    assert site.rewritten
    return site.mask


def positions_to_ids(positions: Tensor) -> Tensor:
    """As transformers' `find_packed_sequence_indices`."""
    diff = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    return (diff != 1).cumsum(-1)


def indexed(ids: Tensor) -> Tensor:
    """As transformers' `packed_sequence_mask_function` joins causality."""
    batch, at = torch.arange(2)[:, None, None, None], torch.arange(SEQ)
    queries, keys = at[None, None, :, None], at[None, None, None, :]
    mask = queries.new_ones((), dtype=torch.bool) & (keys <= queries)
    mask = mask & (ids[batch, queries] == ids[batch, keys])
    return mask.expand(2, -1, SEQ, SEQ)


SPELLINGS: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], str]] = [
    ("None", lambda i: (i[:, :, None] == i[:, None, :])[:, None], (IDS,), "segments"),
    ("unsqueeze", lambda i: (i.unsqueeze(1).unsqueeze(-1) == i.unsqueeze(1).unsqueeze(-2)), (IDS,), "segments"),
    ("eq", lambda i: torch.eq(i[:, None, None, :], i[:, None, :, None]), (IDS,), "segments"),
    ("not ne", lambda i: ~(i[:, None, :, None] != i[:, None, None, :]), (IDS,), "segments"),
    ("a difference", lambda i: (i[:, None, :, None] - i[:, None, None, :]) == 0, (IDS,), "segments"),
    ("views", lambda i: i.view(2, 1, SEQ, 1).eq(i.view(2, 1, 1, SEQ)), (IDS,), "segments"),
    ("expanded", lambda i: (i[:, :, None].expand(2, SEQ, SEQ) == i[:, None].expand(2, SEQ, SEQ))[:, None].expand(2, 4, -1, -1), (IDS,), "segments"),
    ("int32", lambda i: (i[:, :, None] == i[:, None, :])[:, None], (IDS.int(),), "segments"),
    ("one row for all", lambda i: i[:, None] == i[None], (IDS[1],), "segments"),
    ("a batch of 1", lambda i: (i[:, :, None] == i[:, None, :])[:, None], (IDS[1:],), "segments"),
    ("causal", lambda i: (i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW(), (IDS,), "causal, segments"),
    ("causal, logical_and", lambda i: torch.logical_and(CAUSAL_NOW(), (i[:, :, None] == i[:, None, :])[:, None]), (IDS,), "causal, segments"),
    ("a window", lambda i: ((i[:, :, None] == i[:, None, :]) & CAUSAL_NOW() & ~torch.ones(SEQ, SEQ, dtype=torch.bool).tril(-5))[:, None], (IDS,), "sliding_window left=4 right=0, segments"),
    ("padding", lambda i, p: (i[:, None, :, None] == i[:, None, None, :]) & p[:, None, None, :], (IDS, torch.arange(SEQ) < torch.tensor([[20], [9]])), "key_padding, segments"),
    ("causal and padding", lambda i, p: (i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW() & p[:, None, None], (IDS, torch.arange(SEQ) < torch.tensor([[20], [9]])), "causal, key_padding, segments"),
    ("queries that see nothing", lambda i: ((i[:, :, None] == i[:, None, :]) & (i[:, :, None] > 0))[:, None], (IDS,), "segments"),
    ("-inf", lambda i: torch.zeros(2, 1, SEQ, SEQ).masked_fill((i[:, None, :, None] != i[:, None, None, :]), -torch.inf), (IDS,), "segments"),
    ("where -inf, causal", lambda i: torch.where((i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW(), 0.0, -torch.inf), (IDS,), "causal, segments"),
    ("positions", lambda p: (positions_to_ids(p)[:, :, None] == positions_to_ids(p)[:, None, :])[:, None] & CAUSAL_NOW(), (POSITIONS,), "causal, segments"),
    ("positions, a sequence at each 0", lambda p: ((p == 0).cumsum(-1)[:, :, None] == (p == 0).cumsum(-1)[:, None, :])[:, None], (POSITIONS,), "segments"),
    ("positions, indexed", lambda p: indexed(positions_to_ids(p)), (POSITIONS,), "causal, segments"),
    ("images", lambda e: (torch.bucketize(torch.arange(SEQ), e, right=True)[:, None] == torch.bucketize(torch.arange(SEQ), e, right=True)), (torch.tensor([3, 11, 17]),), "segments"),
]  # fmt: skip


def CAUSAL_NOW() -> Tensor:
    return torch.ones(SEQ, SEQ, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("make_mask", "extra", "kind"), [row[1:] for row in SPELLINGS], ids=[row[0] for row in SPELLINGS]
)
def test_spellings(make_mask: Callable[..., Tensor], extra: tuple[Tensor, ...], kind: str) -> None:
    assert attend(make_mask, *extra) == kind
