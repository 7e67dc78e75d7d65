"""Weights set to zero behind the softmax, where a mask says so or where they are NaN; and queries or keys that a batch shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.rewriting.unrecognised import unread
from sage_inductor.testing import RewritingBackend, capture, max_error, relative_l2

pytestmark = pytest.mark.usefixtures("inference")

CONFIG = Config(kernel="reference", precision="accurate")
Attend = Callable[..., Tensor]
BATCH, HEADS, LENGTH, DIM = 2, 2, 20, 16


def rewritten(function: Attend, *args: Tensor, config: Config = CONFIG, **options: Any) -> tuple[Tensor, RewritingBackend]:  # fmt: skip
    backend = RewritingBackend(config)
    torch.compiler.reset()
    result: Tensor = torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    return result, backend


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, DIM) for _ in range(3))
    return q, k, v


def padding(sees_nothing: bool) -> Tensor:
    """True: a key to attend to. The last sample ends early, or has no key."""
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[-1, ..., 0 if sees_nothing else LENGTH - 6 :] = False
    return mask


def hidden(q: Tensor, k: Tensor, mask: Tensor, low: float = -math.inf) -> Tensor:
    return (0.3 * q @ k.mT).masked_fill(~mask, low).softmax(-1)


def at_nan(weights: Tensor) -> Tensor:
    return weights.masked_fill(torch.isnan(weights), 0)


def at_nan_by_where(weights: Tensor) -> Tensor:
    return torch.where(weights.isnan(), torch.zeros_like(weights), weights)


def not_at_nan(weights: Tensor) -> Tensor:
    return torch.where(~torch.isnan(weights), weights, 0.0)


NAN: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda w: torch.nan_to_num(w),
    "function, by name": lambda w: torch.nan_to_num(w, nan=0.0),
    "method": lambda w: w.nan_to_num(0.0),
    "in place": lambda w: w.nan_to_num_(),
    "masked_fill": at_nan,
    "where": at_nan_by_where,
    "where not": not_at_nan,
    "behind dropout and a cast": lambda w: F.dropout(w, 0.1, False).nan_to_num().to(torch.float32),
}


@pytest.mark.parametrize("sees_nothing", [False, True])
@pytest.mark.parametrize("name", NAN)
def test_nan_is_zero_where_no_key_is_seen(name: str, sees_nothing: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return NAN[name](hidden(q, k, mask)) @ v

    args = *inputs(), padding(sees_nothing)
    result, backend = rewritten(attend, *args)
    (site,) = backend.sites
    assert site.rewritten and site.mask == "key_padding", site
    expected = attend(*args)
    assert bool(expected.isfinite().all()) and relative_l2(result, expected) < 0.03
    assert max_error(result, expected) < 0.1
    if sees_nothing:
        assert not result[-1].any()


MASKED: dict[str, Attend] = {
    "masked_fill": lambda w, mask: w.masked_fill(~mask, 0.0),
    "where": lambda w, mask: torch.where(mask, w, 0.0),
    "where, the other way": lambda w, mask: torch.where(~mask, torch.zeros_like(w), w),
    "product": lambda w, mask: w * mask,
    "product with floats": lambda w, mask: mask.to(w.dtype) * w,
    "product, and NaN": lambda w, mask: torch.nan_to_num(w * mask),
}


@pytest.mark.parametrize("low", [-math.inf, -1e9])
@pytest.mark.parametrize("name", MASKED)
def test_zeros_at_the_mask_that_hides_the_scores(name: str, low: float) -> None:
    """With a finite number a sample that sees no key has weights, and they are zero then."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return MASKED[name](hidden(q, k, mask, low), mask) @ v

    args = *inputs(), padding(sees_nothing=low != -math.inf)
    result, backend = rewritten(attend, *args)
    (site,) = backend.sites
    assert site.rewritten and site.mask == "key_padding", site
    expected = attend(*args)
    assert relative_l2(result, expected) < 0.03 and max_error(result, expected) < 0.1


LEFT: dict[str, tuple[Attend, str]] = {
    "another number for NaN": (lambda w, mask: w.nan_to_num(1.0), "weights=nan_to_num"),
    "another mask": (
        lambda w, mask: torch.where(mask.flip(-1), w, 0.0),
        "weights=zeros at a mask that does not hide the scores alone",
    ),
    "the mask inverted": (
        lambda w, mask: w * ~mask,
        "weights=zeros at a mask that does not hide the scores alone",
    ),
    "a mask of other numbers": (lambda w, mask: w * (0.5 * mask), "weights=mul"),
    "NaN that is read": (lambda w, mask: at_nan(w) + w.isnan().any(), "weights=add"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    change, obstacle = LEFT[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return change(hidden(q, k, mask), mask) @ v

    args = *inputs(), padding(sees_nothing=False)
    result, backend = rewritten(attend, *args)
    assert torch.equal(result, attend(*args)) and not any(site.rewritten for site in backend.sites)
    assert [item.obstacle.startswith(obstacle) for item in unread(backend.graphs[0].graph)] == [True]


def test_linalg_matmul() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.linalg.matmul(torch.softmax(torch.linalg.matmul(q, k.mT) * 0.3, -1), v)

    args = inputs()
    result, backend = rewritten(attend, *args)
    assert [site.rewritten for site in backend.sites] == [True]
    assert relative_l2(result, attend(*args)) < 0.03


BROADCAST: dict[str, Attend] = {
    "sdpa": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "by hand": lambda q, k, v: (0.3 * q @ k.mT).softmax(-1) @ v,
    "merged heads": lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("shared", ["q", "kv", "v", "qk"])
def test_inputs_that_the_batch_shares(name: str, shared: str) -> None:
    args = [item[:1] if letter in shared else item for letter, item in zip("qkv", inputs(), strict=True)]
    result, backend = rewritten(BROADCAST[name], *args)
    (site,) = backend.sites
    assert site.rewritten, site
    expected = BROADCAST[name](*args)
    assert relative_l2(result, expected) < 0.03 and result.stride() == expected.stride()


def test_a_shared_batch_of_unknown_size_stays() -> None:
    q, k, v = inputs()
    result, backend = rewritten(BROADCAST["sdpa"], q[:1].clone(), k, v, dynamic=True)
    (site,) = backend.sites
    assert not site.rewritten and site.reasons[0].startswith("batch=1, s")
    assert torch.equal(result, BROADCAST["sdpa"](q[:1], k, v))


def test_gradients_of_shared_queries() -> None:
    args = [tensor.requires_grad_() for tensor in (inputs()[0][:1].clone(), *inputs()[1:])]
    with torch.enable_grad():
        out, backend = rewritten(
            BROADCAST["sdpa"], *args, config=Config(kernel="reference", precision="accurate", training=True)
        )
        grads = torch.autograd.grad(out.sum(), args)
        expected = torch.autograd.grad(BROADCAST["sdpa"](*args).sum(), args)
    assert backend.sites[0].rewritten
    assert all(relative_l2(grad, other) < 1e-5 for grad, other in zip(grads[1:], expected[1:], strict=True))
    assert grads[0].shape == args[0].shape


@pytest.mark.parametrize("own", [True, False])
def test_rows_without_keys_are_asked_of_the_logits(own: bool) -> None:
    """As torch.export decomposes SDPA. Rows of other logits are other rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        logits = (q @ k.mT).masked_fill(mask.logical_not(), -math.inf)
        seen = ((logits if own else logits.mT) == -math.inf).logical_not().any(-1, keepdim=True)
        return torch.where(seen.logical_not(), 0.0, logits.softmax(-1)) @ v

    args = *inputs(), padding(sees_nothing=True)
    result, backend = rewritten(attend, *args)
    expected = attend(*args)
    assert [site.rewritten for site in backend.sites] == [True] * own
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_l2(result.nan_to_num(), expected.nan_to_num()) < (0.03 if own else 1e-6)


def test_symbolic_sizes_hide_nothing_from_the_report() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tanh().softmax(-1).flatten(0, 1) @ v.flatten(0, 1)

    (item,) = unread(capture(attend, *inputs(), dynamic=True).graph)
    assert item.obstacle.startswith("scores=tanh")
