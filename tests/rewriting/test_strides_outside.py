"""Strides that can be seen outside a region that was rewritten are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

ACCURATE = Config(kernel="reference", precision="accurate")


def seq_first(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(length, batch, heads, dim, dtype=dtype).permute(1, 2, 0, 3)


def batch_inside(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def contiguous(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, heads, length, dim, dtype=dtype)


LAYOUTS = {"seq first": seq_first, "nhd": batch_inside, "hnd": contiguous}
CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda y: y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1),
    "flatten": lambda y: y.transpose(1, 2).flatten(2),
    "flatten of batch": lambda y: y.transpose(1, 2).flatten(0, 1),
    "permute": lambda y: y.permute(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1),
    "split": lambda y: y.transpose(1, 2).reshape(y.shape[0], y.shape[2], y.shape[1], 2, -1),
    "contiguous": lambda y: y.transpose(1, 2).contiguous(),
    "read later": lambda y: y.transpose(1, 2).flatten(2).transpose(0, 1) * 2,
}


# Every shape, and both dtypes with one of them: which memory an output gets does not depend on its dtype.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 2, 24, 64), torch.float32),
        ((2, 2, 24, 64), torch.bfloat16),
        ((1, 4, 17, 16), torch.float32),
        ((3, 1, 9, 16), torch.bfloat16),
        ((2, 4, 1, 32), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_what_a_region_returns(
    layout: str, chain: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return CHAINS[chain](F.scaled_dot_product_attention(q, k, v))

    inputs = tuple(LAYOUTS[layout](*shape, dtype) for _ in range(3))
    backend = RewritingBackend(ACCURATE)
    torch.compiler.reset()
    with torch.no_grad():
        actual = torch.compile(attend, backend=backend)(*inputs)
        eager, exact = attend(*inputs), attend(*(tensor.double() for tensor in inputs))
    assert actual.shape == eager.shape and actual.dtype == eager.dtype
    sized = [dim for dim, size in enumerate(eager.shape) if size > 1]
    assert [actual.stride(dim) for dim in sized] == [eager.stride(dim) for dim in sized]
    assert backend.sites[0].rewritten is (shape[2] > 1)
    assert relative_l2(actual, exact) < 0.02 and max_error(actual, exact) < 0.06


@pytest.mark.parametrize(
    "reads", [lambda y: y.transpose(0, 1).view(-1, 128), lambda y: y.mT.mT.view(2, 24, 2, 64)]
)
def test_a_view_behind_the_region_that_its_strides_allow(reads: Callable[[Tensor], Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 24, 128)

    q, k, v = (seq_first(2, 2, 24, 64, torch.float32) for _ in range(3))
    torch.compiler.reset()
    with torch.no_grad():
        expected = reads(attend(q, k, v))
        compiled = torch.compile(attend, backend="sage_inductor", options={"sage.kernel": "reference"})
        assert relative_l2(reads(compiled(q, k, v)), expected) < 0.05
