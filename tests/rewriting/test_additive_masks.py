"""Additive masks of causality and padding taken apart, exact also for queries that see no key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
LOWEST = torch.finfo(torch.float32).min
LENGTH = 24
pytestmark = pytest.mark.usefixtures("inference")


def band(low: int, high: int, q_len: int = LENGTH) -> Tensor:
    distance = torch.arange(LENGTH) - torch.arange(q_len)[:, None]
    return (distance >= low) & (distance <= high)


def padding() -> Tensor:
    """Of two sequences, the first padded left: under causality its first queries see nothing."""
    mask = torch.rand(2, LENGTH) > 0.4
    mask[0, :9] = False
    return mask


def qkv(layout: str = "HND") -> list[Tensor]:
    if layout == "NHD":
        return [torch.randn(2, LENGTH, 4, 32).transpose(1, 2) for _ in range(3)]
    return [torch.randn(2, 4, LENGTH, 32) for _ in range(3)]


def mask_of(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None) -> str:
    """What the mask of the one site is taken for; checks numbers and strides. float32's rounding in the softmax of
    eager is far below the bound, INT8 scores give .008 at these sizes, a query that is served wrongly .15."""
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    expected = function(*inputs)
    assert relative_l2(out, expected) < 0.02 and out.stride() == expected.stride()
    (site,) = backend.sites
    assert site.rewritten
    return site.mask


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 6 + mask).softmax(-1) @ v


WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda allowed, p: torch.where(allowed & p[:, None, None], 0.0, LOWEST),
    "where, hidden first": lambda allowed, p: torch.where(~(allowed & p[:, None, None]), LOWEST, 0.0),
    "masked_fill of zeros": lambda allowed, p: torch.zeros(2, 1, *allowed.shape).masked_fill(
        ~allowed | ~p[:, None, None], LOWEST
    ),
    "a slice of all": lambda allowed, p: torch.where(allowed & p[:, None, None], 0.0, LOWEST)[
        :, :, :, :LENGTH
    ],
    "clamped": lambda allowed, p: torch.where(allowed & p[:, None, None], 0.0, -math.inf).clamp(min=LOWEST),
}


@pytest.mark.parametrize(("written", "layout"), list(itertools.product(WRITTEN, ["HND", "NHD"])))
def test_causality_and_padding_are_told_apart(written: str, layout: str) -> None:
    make = WRITTEN[written]
    inputs = (*qkv(layout), padding())
    assert (
        mask_of(lambda q, k, v, p: by_hand(q, k, v, make(band(-99, 0), p)), *inputs) == "causal + key_padding"
    )


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-99, 0, "causal + key_padding"),
        (-4, 0, "sliding_window left=4 right=0 + key_padding"),
        (-99, 99, "key_padding"),
        (-4, 3, "additive"),  # the window hangs over the last key: not told apart, read as it is
    ],
)
def test_bands(low: int, high: int, kind: str) -> None:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.where(band(low, high) & p[:, None, None], 0.0, LOWEST)
        return F.scaled_dot_product_attention(q, k, v, mask)

    assert mask_of(sdpa, *qkv(), padding()) == kind


def test_fewer_queries_and_grouped_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.where(band(-99, 14, 10) & p[:, None, None], 0.0, LOWEST)
        k, v = (tensor[:, :2].repeat_interleave(2, 1) for tensor in (k, v))
        return by_hand(q[:, :, :10], k, v, mask)

    assert mask_of(attend, *qkv(), padding()) == "causal bottom-right + key_padding"


def test_infinity_needs_no_care() -> None:
    """A row of -inf alone gives NaN in eager; SDPA, and we, give 0. The other rows must be right."""

    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.where(band(-99, 0) & p[:, None, None], 0.0, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, mask)

    assert mask_of(attend, *qkv(), padding()) == "causal + key_padding"


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "causal + key_padding"), (torch.float16, "additive")]
)
def test_low_precision(dtype: torch.dtype, kind: str) -> None:
    """float16's lowest number does not swallow scores that are kept in float32: whether a query that sees nothing
    attends to all keys alike is then a matter of how the sum is rounded, and the mask is read as it is."""

    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        allowed = band(-99, 0) & p[:, None, None]
        mask = torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)
        return F.softmax(q @ k.mT / 6 + mask, -1, dtype=torch.float32).to(dtype) @ v

    seeing = padding()
    if dtype == torch.float16:
        seeing[:, 0] = True
    assert mask_of(attend, *(tensor.to(dtype) for tensor in qkv()), seeing) == kind


def test_keys_that_all_sequences_lack() -> None:
    """The row is one dim then, and read from the places of the keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = band(-3, 0) & (torch.arange(LENGTH) > 6)
        return by_hand(q, k, v, torch.where(seen, 0.0, LOWEST))

    assert mask_of(attend, *qkv()) == "sliding_window left=3 right=0 + key_padding"


def test_what_cannot_be_told_apart_is_read_as_it_is() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        """Two finite minima make -inf: a query that sees nothing attends to some of the keys only."""
        causal = torch.where(band(-99, 0), 0.0, LOWEST)
        return by_hand(q, k, v, causal + torch.where(p[:, None, None], 0.0, LOWEST))

    def small(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return by_hand(q, k, v, torch.where(p[:, None, None], 0.0, -5.0).expand(-1, -1, LENGTH, -1) * 1.0)

    def written(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.where(band(-99, 0) & p[:, None, None], 0.0, LOWEST)
        mask[:, :, :, 3] = 0.0
        return by_hand(q, k, v, mask)

    def from_data(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return by_hand(q, k, v, torch.where(band(-99, 0) & p[:, None, None], q[0, 0, 0, 0], LOWEST))

    def bias(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        """A row that hides keys itself: a query that sees no others attends to those behind the band, too."""
        row = p.float().log().clamp(min=LOWEST)
        return by_hand(q, k, v, torch.where(band(-99, 0), row[:, None, None], LOWEST))

    for attend in (two, small, written, from_data, bias):
        assert mask_of(attend, *qkv(), padding()) == "additive"


def test_dynamic_lengths() -> None:
    """What a mask means does not depend on a length that is a symbol."""

    def causal(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        return by_hand(
            q,
            k,
            v,
            torch.where((positions[:, None] >= positions) & p[:, None, None], 0.0, torch.finfo(q.dtype).min),
        )

    def windowed(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        lowest = torch.finfo(q.dtype).min
        return by_hand(q, k, v, torch.where((i >= j) & (i - j < 4) & p[:, None, None], 0.0, lowest))

    def behind_cache(q: Tensor, k: Tensor, v: Tensor, p: Tensor, past: Tensor) -> Tensor:
        k, v, p = torch.cat([past, k], 2), torch.cat([past, v], 2), F.pad(p, (past.shape[2], 0))
        i, j = torch.arange(q.shape[2])[:, None] + past.shape[2], torch.arange(k.shape[2])
        lowest = torch.finfo(q.dtype).min
        return by_hand(q, k, v, torch.where((i >= j) & p[:, None, None], 0.0, lowest))

    def padded(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return by_hand(q, k, v, torch.where(p[:, None, None], 0.0, LOWEST))

    assert mask_of(causal, *qkv(), padding(), dynamic=True) == "causal (symbolic) + key_padding"
    assert mask_of(windowed, *qkv(), padding(), dynamic=True) == (
        "sliding_window left=3 right=0 (symbolic) + key_padding"
    )
    assert mask_of(behind_cache, *qkv(), padding(), torch.randn(2, 4, 9, 32), dynamic=True) == (
        "causal bottom-right (symbolic) + key_padding"
    )
    assert mask_of(padded, *qkv(), padding(), dynamic=True) == "key_padding"
    compiled = torch.compile(padded, backend=RewritingBackend(CONFIG), dynamic=True)
    for length in (5, 17, 40):
        q, k, v = (torch.randn(2, 4, length, 32) for _ in range(3))
        mask = torch.rand(2, length) > 0.5
        mask[0] = False  # a batch that sees nothing at all
        assert relative_l2(compiled(q, k, v, mask), padded(q, k, v, mask)) < 0.02


def test_chunked_causal_masks_are_named() -> None:
    def chunked(size: int) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            positions = torch.arange(LENGTH)
            same = positions[:, None] // size == positions // size
            return F.scaled_dot_product_attention(q, k, v, same & (positions[:, None] >= positions))

        return attend

    for size, kind in ((8, "chunked_causal size=8"), (7, "chunked_causal size=7"), (24, "causal")):
        assert mask_of(chunked(size), *qkv()) == kind
