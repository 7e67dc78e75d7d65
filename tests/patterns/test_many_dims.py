"""SDPA of five dims and more: its inner dims are folded into heads, those of its mask likewise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
MASKS = [
    (8, 16), (1, 16), (16,), (2, 8, 16), (3, 1, 8, 16), (3, 2, 8, 16), (2, 1, 1, 1, 16), (2, 3, 2, 8, 16),
    (1, 3, 1, 8, 16), (2, 1, 2, 1, 16), (1, 1, 1, 8, 16),
]  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def compiled(*inputs: Tensor) -> tuple[Tensor, RewritingBackend]:
    backend = RewritingBackend(CONFIG)
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(attention, backend=backend)(*inputs), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_of_any_number_of_dims(shape: tuple[int, ...], is_bool: bool, dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 2, 8, 16, dtype=dtype)
    k, v = (torch.randn(2, 3, 2, 16, 16, dtype=dtype) for _ in range(2))
    mask = (
        (torch.rand(shape) < 0.6).index_fill(-1, torch.tensor(0), True)
        if is_bool
        else torch.randn(shape, dtype=dtype)
    )
    actual, backend = compiled(q, k, v, mask)
    exact = attention(q.double(), k.double(), v.double(), mask if is_bool else mask.double())
    assert [site.rewritten for site in backend.sites] == [True]
    assert relative_l2(actual, exact) < 0.02 and max_error(actual, exact) < 0.06
    assert actual.stride() == exact.stride() and actual.dtype == dtype


def test_six_dims_and_keys_of_groups() -> None:
    q = torch.randn(2, 2, 3, 2, 8, 16)
    k, v = (torch.randn(2, 2, 3, 1, 16, 16).expand(-1, -1, -1, 2, -1, -1) for _ in range(2))
    mask = torch.randn(2, 1, 3, 1, 8, 16)
    actual, backend = compiled(q, k, v, mask)
    exact = attention(q.double(), k.double(), v.double(), mask.double())
    assert [site.rewritten for site in backend.sites] == [True]
    assert relative_l2(actual, exact) < 0.02 and actual.stride() == exact.stride()
