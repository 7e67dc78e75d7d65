"""Masks of packed sequences become ids: document masks in many spellings, transformers' packed positions, near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
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
    ("causal", lambda i: (i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW(), (IDS,), "causal + segments"),
    ("causal, logical_and", lambda i: torch.logical_and(CAUSAL_NOW(), (i[:, :, None] == i[:, None, :])[:, None]), (IDS,), "causal + segments"),
    ("a window", lambda i: ((i[:, :, None] == i[:, None, :]) & CAUSAL_NOW() & ~torch.ones(SEQ, SEQ, dtype=torch.bool).tril(-5))[:, None], (IDS,), "sliding_window left=4 right=0 + segments"),
    ("padding", lambda i, p: (i[:, None, :, None] == i[:, None, None, :]) & p[:, None, None, :], (IDS, torch.arange(SEQ) < torch.tensor([[20], [9]])), "key_padding + segments"),
    ("causal and padding", lambda i, p: (i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW() & p[:, None, None], (IDS, torch.arange(SEQ) < torch.tensor([[20], [9]])), "causal + key_padding + segments"),
    ("queries that see nothing", lambda i: ((i[:, :, None] == i[:, None, :]) & (i[:, :, None] > 0))[:, None], (IDS,), "segments"),
    ("-inf", lambda i: torch.zeros(2, 1, SEQ, SEQ).masked_fill((i[:, None, :, None] != i[:, None, None, :]), -torch.inf), (IDS,), "segments"),
    ("where -inf, causal", lambda i: torch.where((i[:, None, :, None] == i[:, None, None, :]) & CAUSAL_NOW(), 0.0, -torch.inf), (IDS,), "causal + segments"),
    ("positions", lambda p: (positions_to_ids(p)[:, :, None] == positions_to_ids(p)[:, None, :])[:, None] & CAUSAL_NOW(), (POSITIONS,), "causal + segments"),
    ("positions, a sequence at each 0", lambda p: ((p == 0).cumsum(-1)[:, :, None] == (p == 0).cumsum(-1)[:, None, :])[:, None], (POSITIONS,), "segments"),
    ("positions, indexed", lambda p: indexed(positions_to_ids(p)), (POSITIONS,), "causal + segments"),
    ("positions that count down, indexed", lambda p: indexed((p.diff(prepend=p[:, :1] - 1) != 1).cumsum(-1)), (POSITIONS.flip(1),), "causal + segments"),
    ("positions, causal by positions", lambda p: within(positions_to_ids(p), p, torch.le), (POSITIONS,), "causal + segments"),
    ("positions, causal by positions, jumps", lambda p: within(positions_to_ids(p), p, torch.le), (POSITIONS + 3 * (POSITIONS > 4),), "causal + segments"),
    ("positions, a window by positions", lambda p: within(positions_to_ids(p), p, lambda k, q: (k <= q) & (k > q - 4)), (POSITIONS,), "sliding_window left=3 right=0 + segments"),
    ("positions, a window on both sides by positions", lambda p: within(positions_to_ids(p), p, lambda k, q: abs(q - k) <= 2), (POSITIONS,), "band left=2 right=2 + segments"),
    ("images", lambda e: (torch.bucketize(torch.arange(SEQ), e, right=True)[:, None] == torch.bucketize(torch.arange(SEQ), e, right=True)), (torch.tensor([3, 11, 17]),), "segments"),
]  # fmt: skip


def within(ids: Tensor, positions: Tensor, compared: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """As transformers' `remap_positions_for_packed_sequence` has causality and windows."""
    batch, at = torch.arange(2)[:, None, None, None], torch.arange(SEQ) + 0
    queries, keys = at[None, None, :, None], at[None, None, None, :]
    return (ids[batch, queries] == ids[batch, keys]) & compared(
        positions[batch, keys], positions[batch, queries]
    )


def CAUSAL_NOW() -> Tensor:
    return torch.ones(SEQ, SEQ, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("make_mask", "extra", "kind"), [row[1:] for row in SPELLINGS], ids=[row[0] for row in SPELLINGS]
)
def test_spellings(make_mask: Callable[..., Tensor], extra: tuple[Tensor, ...], kind: str) -> None:
    assert attend(make_mask, *extra) == kind


BIG = torch.tensor([[2**32] * 9 + [0] * 9 + [2**32 + 1] * 6, [-1] * 12 + [2**32 - 1] * 12])


def test_ids_of_64_bits_that_would_be_one_in_32() -> None:
    assert attend(lambda i: (i[:, :, None] == i[:, None, :])[:, None], BIG) == "segments"
    # Ids of queries that no key has.
    assert attend(lambda a, b: (a[:, :, None] == b[:, None, :])[:, None], BIG, BIG.clamp(min=0)) == "segments"


@pytest.mark.parametrize(
    ("make_mask", "extra", "kind"),
    [
        (lambda i: (i[:, :, None] >= i[:, None, :])[:, None], (IDS,), "bool"),
        (lambda i: (i[:, :, None] != i[:, None, :])[:, None] | CAUSAL_NOW(), (IDS,), "bool"),
        (lambda i: (i[:, :, None] == i[:, None, :])[:, None] | CAUSAL_NOW(), (IDS,), "bool"),
        (lambda i: (i[:, :, None] == i[:, None, :] + 1)[:, None], (IDS,), "segments"),
        (lambda i: (i[:, :, None] - i[:, None, :] == 1)[:, None], (IDS,), "bool"),
        (lambda i: (i[:, :, None].float() == i[:, None, :].float())[:, None], (IDS,), "bool"),
        (lambda i: (i[:, None, None, :] == 0), (IDS,), "key_padding"),
        (lambda i: i[:, None, :, None] == i.flip(1)[:, None, None, :], (IDS,), "segments"),
        # Heads have ids of their own; a further mask of the model that differs from query to query.
        (lambda i: i[:, :, None] == i[:, None, :], (IDS.repeat(2, 1),), "bool"),
        (lambda i, m: (i[:, None, :, None] == i[:, None, None, :]) & m, (IDS, torch.rand(SEQ, SEQ) > 0.5), "bool"),
        # Causality by positions, almost.
        (lambda p: within(positions_to_ids(p), p, torch.lt), (POSITIONS,), "bool"),
        (lambda p: within(positions_to_ids(p), p, torch.ge), (POSITIONS,), "band left=0 right=all + segments"),
        (lambda p: within(positions_to_ids(p), p, lambda k, q: (q + k) <= 9), (POSITIONS,), "bool"),
        (lambda p: within(positions_to_ids(p), p, lambda k, q: k // 4 == q // 4), (POSITIONS,), "bool"),
        (lambda p, o: within(positions_to_ids(p), o, torch.le), (POSITIONS, POSITIONS.flip(1)), "bool"),
        (lambda p: within((p == 0).cumsum(-1), p, torch.le), (POSITIONS,), "bool"),
        (lambda p: within((p.diff(prepend=p[:, :1] - 1) != 2).cumsum(-1), p, torch.le), (POSITIONS,), "bool"),
        (lambda p: within((p.diff(prepend=p[:, :1] - 1) != 1).cumsum(0), p, torch.le), (POSITIONS,), "bool"),
        # Nothing but constants: a band, and chunks.
        (lambda: torch.arange(SEQ)[:, None] == torch.arange(SEQ), (), "sliding_window left=0 right=0"),
        (lambda: (torch.arange(SEQ)[:, None] // 8 == torch.arange(SEQ) // 8) & CAUSAL_NOW(), (), "chunked_causal size=8"),
        (lambda: torch.arange(SEQ)[:, None] // 7 == torch.arange(SEQ) // 7, (), "segments"),
        # Beside a finite number a query without keys attends to all alike.
        (lambda i: torch.zeros(2, 1, SEQ, SEQ).masked_fill(i[:, None, :, None] != i[:, None, None, :], -1e38 * 3), (IDS,), "additive"),
    ],
)  # fmt: skip
def test_near_misses(make_mask: Callable[..., Tensor], extra: tuple[Tensor, ...], kind: str) -> None:
    assert attend(make_mask, *extra) == kind


def test_ids_that_are_written_to_later_are_read_as_the_mask_was_made() -> None:
    def mask(ids: Tensor) -> Tensor:
        own = ids.clone()
        made = (own[:, :, None] == own[:, None, :])[:, None]
        own.zero_()
        return made

    assert attend(mask, IDS) == "bool"


@pytest.mark.parametrize(
    ("compare", "kind"),
    [
        (lambda at: at <= at[:, None], "causal (symbolic) + segments"),
        (lambda at: at[:, None] >= at, "causal (symbolic) + segments"),
        (lambda at: at < at[:, None], "bool"),
        (lambda at: at[:, None] <= at, "band left=0 right=all (symbolic) + segments"),
        (lambda at: at <= at[:, None] + 1, "band left=all right=1 (symbolic) + segments"),
        (lambda at: at - 1 <= at[:, None], "band left=all right=1 (symbolic) + segments"),
    ],
)
def test_causality_of_symbolic_lengths(compare: Callable[[Tensor], Tensor], kind: str) -> None:
    def model(q: Tensor, ids: Tensor) -> Tensor:
        mask = (ids[:, :, None] == ids[:, None, :]) & compare(torch.arange(q.shape[2]))
        return F.scaled_dot_product_attention(q, q, q, mask[:, None])

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, seq in ((3, 24), (4, 40)):
        q, ids = torch.randn(batch, 2, seq, 32), torch.randint(-1, 3, (batch, seq))
        assert relative_l2(compiled(q, ids), model(q, ids)) < 0.013
    assert len(backend.graphs) == 1 and backend.sites[0].mask == kind


def test_layers_share_the_ids_and_nobody_makes_the_mask() -> None:
    def model(q: Tensor, ids: Tensor) -> Tensor:
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, q, q, mask)
        return q

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    torch.compile(model, backend=backend)(torch.randn(2, 2, SEQ, 32), IDS.int())
    assert_expected_inline(
        graph_text(backend.graphs[0].graph),
        """\
a = input: 2x24
b = input: 2x2x24x32
c = getitem(a, (:, :, None)): 2x24x1
d = .unsqueeze(c, 1): 2x1x24x1
e = .select(d, 3, 0): 2x1x24
f = .select(e, 1, 0): 2x24
g = getitem(a, (:, None, :)): 2x1x24
h = .unsqueeze(g, 1): 2x1x1x24
i = .select(h, 2, 0): 2x1x24
j = .select(i, 1, 0): 2x24
k = sage_inductor.attention(b, b, b, kernel_name='reference', precision='accurate', query_segments=f, key_segments=j): 2x2x24x32
l = sage_inductor.attention(k, k, k, kernel_name='reference', precision='accurate', query_segments=f, key_segments=j): 2x2x24x32
return (l)""",
    )


def test_kernels_without_segments_read_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do those that "auto" takes by the shipped measurements, of which there are none for segments."""
    from sage_inductor.kernels.reference.kernel import ReferenceKernel

    monkeypatch.setattr(ReferenceKernel, "takes_segments", False)
    q, ids = torch.randn(2, 2, SEQ, 32), IDS

    def model(q: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, (ids[:, :, None] == ids[:, None, :])[:, None])

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(model, backend=backend)(q, ids)
    assert relative_l2(out, model(q, ids)) < 0.013
    assert backend.sites[0].rewritten and "query_segments" not in graph_text(backend.graphs[0].graph)


def test_training() -> None:
    ids = IDS

    def model(q: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, (ids[:, :, None] == ids[:, None, :])[:, None])

    torch.compiler.reset()
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.randn(2, 2, SEQ, 32, requires_grad=True)
        backend = RewritingBackend(Config(kernel="reference", training=True))
        out = torch.compile(model, backend=backend)(q, ids)
        (found,) = torch.autograd.grad(out.square().sum(), q)
        (expected,) = torch.autograd.grad(model(q, ids).square().sum(), q)
    assert backend.sites[0].rewritten and "query_segments" in graph_text(backend.graphs[0].graph)
    assert relative_l2(found, expected) < 0.05


def test_packed_positions_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    tokens, positions = torch.randint(64, (1, SEQ)), POSITIONS[:1]

    def run(tokens: Tensor, positions: Tensor) -> Any:
        return model(tokens, position_ids=positions).last_hidden_state

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(run, backend=backend)(tokens, positions)
    alone = [run(part, at) for part, at in zip(tokens.split([7, 9, 8], 1), positions.split([7, 9, 8], 1), strict=True)]  # fmt: skip
    assert relative_l2(out, torch.cat(alone, 1)) < 0.03
    assert [site.mask for site in backend.sites] == ["causal + segments"] * 2
