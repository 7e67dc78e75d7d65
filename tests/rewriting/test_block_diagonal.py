"""Masks of images and windows of a batch that are known while compiling: blocks along the diagonal become segments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sage_inductor import Config
from sage_inductor.kernels.reference.kernel import ReferenceKernel
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
SEQ, ENDS = 24, (0, 5, 14, 24)
pytestmark = pytest.mark.usefixtures("inference")


def blocks(*pairs: tuple[int, int]) -> Tensor:
    """Qwen2-VL's own loop over `cu_seqlens`."""
    mask = torch.zeros(1, SEQ, SEQ, dtype=torch.bool)
    for start, stop in pairs or zip(ENDS, ENDS[1:], strict=False):
        mask[..., start:stop, start:stop] = True
    return mask


def of_lowest() -> Tensor:
    """The same with the lowest number, as Qwen2.5-VL and Pixtral have it."""
    mask = torch.full([1, SEQ, SEQ], torch.finfo(torch.float32).min)
    for start, stop in zip(ENDS, ENDS[1:], strict=False):
        mask[..., start:stop, start:stop] = 0
    return mask


def block_diagonal() -> Tensor:
    """xformers' and torch's own."""
    return torch.block_diag(*[torch.ones(size, size) for size in (5, 9, 10)]).bool()


def causal_blocks() -> Tensor:
    return torch.block_diag(*[torch.ones(size, size).tril() for size in (5, 9, 10)]).bool()


def one_key_more() -> Tensor:
    mask = blocks()
    mask[..., 14, 13] = True
    return mask


def one_key_less() -> Tensor:
    mask = blocks()
    mask[..., 3, 3] = False
    return mask


def across() -> Tensor:
    mask = torch.zeros(SEQ, SEQ, dtype=torch.bool)
    mask[:10, 12:] = True
    mask[10:, :12] = True
    return mask


def lowest_with_a_block_missing() -> Tensor:
    """Queries that see no key attend to all alike."""
    return torch.zeros(SEQ, SEQ).masked_fill(~blocks((0, 5), (14, 24))[0], torch.finfo(torch.float32).min)


def chunks() -> Tensor:
    at = torch.arange(SEQ)
    return (at[:, None] // 8 == at // 8) & (at <= at[:, None])


SPELLINGS: list[tuple[Callable[[], Tensor], str]] = [
    (blocks, "segments"),
    (of_lowest, "segments"),
    (block_diagonal, "segments"),
    (lambda: torch.block_diag(*[torch.ones(8, 8)] * 3).bool(), "segments"),
    (lambda: blocks((0, 5), (14, 24)), "segments"),
    (causal_blocks, "causal + segments"),
    (chunks, "chunked_causal size=8"),
    (across, "segments"),
    # Near misses.
    (lambda: blocks((0, 6), (5, 14), (14, 24)), "bool"),
    (one_key_more, "bool"),
    (one_key_less, "bool"),
    (lowest_with_a_block_missing, "additive"),
]  # fmt: skip


def model(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    masks = [make() for make, _ in SPELLINGS]
    return [
        F.scaled_dot_product_attention(q, k, v, mask if mask.dtype == torch.bool else mask.to(q.dtype))
        for mask in masks
    ]


def test_spellings() -> None:
    inputs = [torch.randn(2, SEQ, 4, 32).transpose(1, 2) for _ in range(3)]
    torch.compiler.reset()
    plain, backend = CompileCounter(), RewritingBackend(CONFIG)
    torch.compile(model, backend=plain)(*inputs)
    torch.compiler.reset()
    outputs = torch.compile(model, backend=backend)(*inputs)
    assert [site.mask for site in backend.sites] == [kind for _, kind in SPELLINGS]
    assert len(backend.graphs) == plain.frame_count
    exact = model(*(item.double() for item in inputs))
    for out, expected, (make, _) in zip(outputs, exact, SPELLINGS, strict=True):
        assert relative_l2(out, expected) < 0.013 and max_error(out, expected) < 0.06, make
        assert out.stride() == expected.stride()


def test_kernels_without_segments_read_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceKernel, "takes_segments", False)
    inputs = [torch.randn(2, SEQ, 4, 32).transpose(1, 2) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, block_diagonal())

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(attend, backend=backend)(*inputs)
    assert relative_l2(out, attend(*inputs)) < 0.013
    (call,) = (node for node in backend.graphs[0].graph.nodes if "sage_inductor" in str(node.target))
    assert len(call.args) == 4 and "query_segments" not in call.kwargs
