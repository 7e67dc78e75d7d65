"""What masks mean: constant ones are worked out, everything else is data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.rewriting.masks.whole import classify_constant
from sage_inductor.testing import RewritingBackend, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
pytestmark = pytest.mark.usefixtures("inference")


def attend(make_mask: Any, q_len: int = 24, kv_len: int = 24, *extra: Tensor) -> str:
    """The kind of the mask that `make_mask(*extra)` builds inside the graph; checks the numbers too."""
    q, k, v = torch.randn(2, 4, q_len, 32), torch.randn(2, 4, kv_len, 32), torch.randn(2, 4, kv_len, 32)

    def model(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, make_mask(*extra))

    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(model, backend=backend)(q, k, v, *extra)
    assert relative_l2(out, model(q, k, v, *extra)) < 0.02
    (site,) = backend.sites
    assert site.rewritten
    return site.mask


def triangle(q_len: int = 24, kv_len: int = 24, diagonal: int = 0) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal)


@pytest.mark.parametrize(
    ("make_mask", "kind"),
    [
        (lambda: torch.ones(24, 24, dtype=torch.bool), "all_true"),
        (lambda: torch.zeros(24, 24), "zero_bias"),
        (lambda: torch.zeros(1, 1, 1, 24), "zero_bias"),
        (lambda: triangle(), "causal"),
        (lambda: torch.arange(24) <= torch.arange(24)[:, None], "causal"),
        (lambda: (torch.arange(24)[None] <= torch.arange(24)[:, None]) & torch.ones(24, 24).bool(), "causal"),
        (lambda: torch.full((24, 24), -torch.inf).triu(1), "causal"),
        (lambda: torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)[None, None], "causal"),
        (lambda: torch.zeros(24, 24).masked_fill(~triangle(), -1e38 * 3), "causal"),
        (lambda: triangle() & ~triangle(diagonal=-5), "sliding_window left=4 right=0"),
        (lambda: triangle(diagonal=3) & ~triangle(diagonal=-5), "band left=4 right=3"),
        (lambda: triangle(diagonal=3), "band left=all right=3"),
        (lambda: ~triangle(diagonal=-3), "band left=2 right=all"),
        (lambda: triangle().expand(2, 4, 24, 24), "causal"),
    ],
)
def test_constant_masks(make_mask: Any, kind: str) -> None:
    assert attend(make_mask) == kind


def test_constant_masks_of_unequal_lengths() -> None:
    assert attend(lambda: triangle(10, 24), 10, 24) == "causal"
    assert attend(lambda: triangle(10, 24, 14), 10, 24) == "causal bottom-right"
    assert (
        attend(lambda: triangle(10, 24, 14) & ~triangle(10, 24, 9), 10, 24)
        == "sliding_window left=4 right=0 bottom-right"
    )


@pytest.mark.parametrize(
    ("make_mask", "kind"),
    [
        (lambda: torch.arange(24 * 24).view(24, 24) % 3 != 0, "bool"),  # constant, but no band
        (lambda: triangle() | (torch.arange(24) == 23), "bool"),  # causal and one more key
        (
            lambda: triangle().expand(2, 1, 24, 24).roll(1, 3),
            "bool",
        ),  # the first query sees not the first key
        (
            lambda: torch.stack([triangle(), ~triangle(diagonal=-1)])[:, None],
            "bool",
        ),  # differs between batches
        (lambda: torch.zeros(24, 24).masked_fill(~triangle(), -5.0), "additive"),  # a bias, not a mask
        (
            lambda: torch.linspace(0, 1, 24)[None] - torch.linspace(0, 1, 24)[:, None],
            "additive",
        ),  # ALiBi-like
        (
            lambda: torch.zeros(24, 24).index_fill_(1, torch.tensor([3]), -torch.inf),
            "additive",
        ),  # written in place
        (
            lambda: torch.full((24, 24), torch.finfo(torch.float32).min).index_fill(
                0, torch.arange(1, 24), 0.0
            ),
            "additive",
        ),
    ],
)
def test_what_only_looks_constant_is_read_at_run_time(make_mask: Any, kind: str) -> None:
    assert attend(make_mask) == kind


def test_a_constant_that_eager_refuses_is_left_to_inductor() -> None:
    """float32's lowest number is beyond bfloat16, where Inductor takes it for -inf."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lowest = torch.full((24, 24), torch.finfo(torch.float32).min, dtype=torch.bfloat16)
        return F.scaled_dot_product_attention(q, k, v, lowest.triu(1))

    q, k, v = (torch.randn(2, 4, 24, 32, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(RuntimeError, match="overflow"):
        model(q, k, v)
    options = {"sage.kernel": "reference", "sage.precision": "accurate"}
    out = torch.compile(model, backend="sage_inductor", options=options)(q, k, v)
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 0.02


def test_masks_from_inputs_are_read_at_run_time() -> None:
    assert attend(lambda m: m, 24, 24, triangle()) == "bool"
    assert attend(lambda m: triangle() | m[:, None, None], 24, 24, torch.rand(2, 24) > 0.3) == "bool"
    assert attend(lambda m: m[:, None, None, :], 24, 24, torch.rand(2, 24) > 0.3) == "key_padding"
    assert (
        attend(lambda m: m[:, None, None, :].expand(2, 1, 24, 24), 24, 24, torch.rand(2, 24) > 0.3)
        == "key_padding"
    )
    assert attend(lambda m: m, 24, 24, torch.randn(4, 24, 24)) == "additive"


def test_a_random_mask_is_not_taken_for_a_constant() -> None:
    q = torch.randn(1, 1, 24, 32)

    def model(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, torch.rand(24, 24) > 0.5)

    backend = RewritingBackend(CONFIG)
    torch.compile(model, backend=backend)(q)
    assert backend.sites[0].mask == "bool"


def test_a_buffer_is_not_taken_for_a_constant() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", triangle())

        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, self.mask)  # type: ignore[arg-type]

    model, q = Model(), torch.randn(1, 2, 24, 32)
    compiled = torch.compile(model, backend=RewritingBackend(CONFIG))
    assert relative_l2(compiled(q), model(q)) < 0.02
    model.mask.fill_(True)  # type: ignore[operator]
    assert relative_l2(compiled(q), model(q)) < 0.02


def test_dynamic_lengths_give_the_right_mask_at_every_length() -> None:
    def model(q: Tensor) -> Tensor:
        seq = q.shape[2]
        return F.scaled_dot_product_attention(
            q, q, q, torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()
        )

    compiled = torch.compile(model, backend=RewritingBackend(CONFIG), dynamic=True)
    for seq in (5, 40, 131):
        q = torch.randn(1, 2, seq, 32)
        assert relative_l2(compiled(q), model(q)) < 0.02


def test_random_bands_round_trip() -> None:
    """Whatever band a mask is, the window found for it allows exactly the same keys."""
    from sage_inductor.kernels import AttentionParams

    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        q_len, kv_len, a, b = (int(torch.randint(1, 14, (), generator=generator)) for _ in range(4))
        low, high = a - 7, b - 5
        distance = torch.arange(kv_len) - torch.arange(q_len)[:, None]
        mask = (distance >= low) & (distance <= high)
        found = classify_constant(mask, q_len, kv_len)
        if found is None:
            continue
        params = AttentionParams(found.is_causal, found.bottom_right, found.window_left, found.window_right)
        found_low, found_high = params.bounds(q_len, kv_len)
        allowed = torch.ones_like(mask)
        if found_low is not None:
            allowed &= distance >= found_low
        if found_high is not None:
            allowed &= distance <= found_high
        assert torch.equal(allowed, mask), (q_len, kv_len, low, high, found)


def test_causality_joined_with_padding_is_taken_apart() -> None:
    def joined(padding: Tensor) -> Tensor:
        causal = torch.arange(24)[None, None, None, :] <= torch.arange(24)[None, None, :, None]
        both = torch.ones((), dtype=torch.bool) & causal
        return (both & padding[:, None, None, :]).expand(2, -1, 24, 24)

    padding = torch.rand(2, 24) > 0.3
    assert attend(joined, 24, 24, padding) == "causal + key_padding"
    window = lambda p: triangle() & ~triangle(diagonal=-5) & p[:, None, None]  # noqa: E731
    assert attend(window, 24, 24, padding) == "sliding_window left=4 right=0 + key_padding"
    everything = lambda p: (torch.arange(24) >= 0)[None, None, :, None] & p[:, None, None]  # noqa: E731
    assert attend(everything, 24, 24, padding) == "key_padding"
    two = lambda p: triangle() & p[:, None, None] & p.flip(1)[:, None, None]  # noqa: E731
    assert attend(two, 24, 24, padding) == "causal + key_padding"
    no_band = lambda p: (torch.arange(576).view(24, 24) % 3 != 0) & p[:, None, None]  # noqa: E731
    assert attend(no_band, 24, 24, padding) == "bool"
    assert attend(lambda p: triangle() | p[:, None, None], 24, 24, padding) == "bool"
    filled_up = lambda p: triangle() & F.pad(p, (0, 4))[:, None, None] & (torch.arange(24) != 2)  # noqa: E731
    assert attend(filled_up, 24, 24, padding[:, :20]) == "bool"


def test_a_joined_mask_that_is_written_later_is_not_taken_apart() -> None:
    def written(padding: Tensor) -> Tensor:
        both = triangle() & padding[:, None, None, :]
        both[:, :, 3] = True
        return both

    def written_through_new_dims(padding: Tensor) -> Tensor:
        both = triangle() & padding[:, None, None, :]
        both[..., None] = True
        return both

    for make_mask in (written, written_through_new_dims):
        assert attend(make_mask, 24, 24, torch.rand(2, 24) > 0.3) == "bool"
