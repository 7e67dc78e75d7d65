"""`sage_attention` with the shapes that SDPA takes: any number of dims, and dims of 1 that broadcast."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import NotEligibleError, sage_attention
from sage_inductor.operators.leading_dims import folded
from sage_inductor.testing import max_error, relative_l2

Shape = tuple[int, ...]
# query, key, value, enable_gqa
SHAPES: dict[str, tuple[Shape, Shape, Shape, bool]] = {
    "batch of keys": ((2, 4, 24, 32), (1, 4, 40, 32), (1, 4, 40, 32), False),
    "batch of queries": ((1, 4, 24, 32), (2, 4, 40, 32), (2, 4, 40, 32), False),
    "heads of keys and values": ((2, 4, 24, 32), (2, 1, 40, 32), (2, 1, 40, 32), False),
    "heads of values": ((2, 4, 24, 32), (2, 4, 40, 32), (2, 1, 40, 32), False),
    "heads of queries": ((2, 1, 24, 32), (2, 4, 40, 32), (2, 4, 40, 32), False),
    "no batch of keys": ((2, 4, 24, 32), (4, 40, 32), (4, 40, 32), False),
    "keys of two dims": ((2, 4, 24, 32), (40, 32), (40, 32), False),
    "queries of two dims": ((24, 32), (2, 4, 40, 32), (2, 4, 40, 32), False),
    "three dims": ((4, 24, 32), (1, 40, 32), (1, 40, 32), False),
    "five dims": ((2, 3, 4, 24, 32), (2, 3, 4, 40, 32), (2, 3, 4, 40, 32), False),
    "five dims that broadcast": ((2, 3, 4, 24, 32), (2, 1, 4, 40, 32), (1, 3, 4, 40, 32), False),
    "six dims, value_head_dim": ((2, 1, 3, 2, 24, 32), (2, 2, 1, 2, 40, 32), (2, 2, 1, 2, 40, 16), False),
    "groups in five dims": ((2, 3, 4, 24, 32), (2, 3, 2, 40, 32), (2, 3, 2, 40, 32), True),
    "groups that broadcast": ((2, 4, 24, 32), (2, 40, 32), (2, 40, 32), True),
    "groups of two sizes": ((2, 4, 24, 32), (2, 2, 40, 32), (2, 1, 40, 32), True),
}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, bool]:
    query, key, value, gqa = SHAPES[name]
    return (
        torch.randn(query, dtype=dtype),
        torch.randn(key, dtype=dtype),
        torch.randn(value, dtype=dtype),
        gqa,
    )


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask, **kwargs)


def check(out: Tensor, expected: Tensor, limit: float = 0.02) -> None:
    assert out.shape == expected.shape
    assert relative_l2(out, expected) < limit
    assert max_error(out, expected) < 5 * limit


@pytest.mark.parametrize("kernel", ["reference", "triton", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_that_sdpa_takes(name: str, kernel: str) -> None:
    if kernel == "triton" and (os.environ.get("TRITON_INTERPRET") != "1" or name.startswith("six")):
        pytest.skip("needs the interpreter, which is slow")
    query, key, value, gqa = inputs(name)
    out = sage_attention(query, key, value, enable_gqa=gqa, kernel=kernel, precision="accurate")
    assert isinstance(out, Tensor)
    check(out, exact(query, key, value, enable_gqa=gqa))


@pytest.mark.parametrize("name", SHAPES)
def test_causal_lse_and_a_buffer(name: str) -> None:
    query, key, value, gqa = inputs(name)
    expected = exact(query, key, value, is_causal=True, enable_gqa=gqa)
    options: dict[str, Any] = {
        "is_causal": True, "enable_gqa": gqa, "kernel": "reference", "precision": "accurate",
    }  # fmt: skip
    out, lse = sage_attention(query, key, value, return_lse=True, **options)
    check(out, expected)
    assert lse.shape == expected.shape[:-1]
    for buffer in (torch.empty_like(expected, dtype=torch.float32), _strided(expected)):
        assert sage_attention(query, key, value, out=buffer, **options) is buffer
        check(buffer, expected)


def _strided(like: Tensor) -> Tensor:
    """A buffer whose dims in front do not lie one behind the other."""
    wide = torch.empty(*(2 * size for size in like.shape[:-1]), like.shape[-1])
    return wide[tuple(slice(None, None, 2) for _ in like.shape[:-1])]


@pytest.mark.parametrize(
    "mask",
    [(24, 40), (3, 1, 24, 40), (2, 1, 1, 1, 40), (2, 3, 4, 24, 40), (1, 1, 4, 24, 40), (1, 3, 1, 24, 40)],
)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
def test_masks_of_more_dims(mask: Shape, additive: bool, gqa: bool) -> None:
    query, key, value, _ = inputs("five dims")
    if gqa:
        key, value = key[:, :, :2], value[:, :, :2]
    attn_mask = torch.randn(mask) if additive else torch.rand(mask) < 0.8
    out = sage_attention(
        query, key, value, attn_mask, enable_gqa=gqa, kernel="reference", precision="accurate"
    )
    assert isinstance(out, Tensor)
    check(out, exact(query, key, value, attn_mask, enable_gqa=gqa))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    query, key, value, _ = inputs("five dims that broadcast", dtype)
    out = sage_attention(query, key, value, kernel="reference", precision="accurate")
    assert isinstance(out, Tensor) and out.dtype == dtype
    check(out, exact(query, key, value), 0.025)


def test_views_are_enough_where_they_can_be() -> None:
    """Five dims as models make them, `x.unflatten(...)`: the dims in the middle become heads."""
    x = torch.randn(2, 24, 3 * 4 * 32).unflatten(2, (3, 4, 32)).permute(0, 2, 3, 1, 4)
    given = folded(x, x, x, None, False)
    assert given.query.data_ptr() == x.data_ptr() and given.query.shape == (2, 12, 24, 32)
    few = torch.randn(2, 1, 40, 32)
    given = folded(torch.randn(2, 4, 24, 32), few, few, None, False)
    assert given.enable_gqa and given.key.data_ptr() == few.data_ptr() and given.key.shape[1] == 1
    one = torch.randn(1, 4, 40, 32)
    given = folded(torch.randn(2, 4, 24, 32), one, one, None, False)
    assert given.key.data_ptr() == one.data_ptr() and given.key.stride(0) == 0
    plain = torch.randn(2, 4, 24, 32)
    assert folded(plain, plain, plain, None, False).query is plain


def test_strides_of_the_output() -> None:
    x = torch.randn(2, 24, 3 * 4 * 32).unflatten(2, (3, 4, 32)).permute(0, 2, 3, 1, 4)
    out = sage_attention(x, x, x, kernel="reference")
    assert isinstance(out, Tensor) and out.stride() == x.stride()
    query, key, value, _ = inputs("batch of queries")
    out = sage_attention(query, key, value, kernel="reference")
    assert isinstance(out, Tensor) and out.is_contiguous()


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 3, 4, 24, 32), (2, 2, 4, 40, 32), (2, 2, 4, 40, 32)),
        ((2, 4, 24, 32), (3, 4, 40, 32), (3, 4, 40, 32)),
        ((2, 4, 24, 32), (2, 3, 40, 32), (2, 3, 40, 32)),
        ((2, 3, 4, 24, 32), (2, 3, 4, 40, 16), (2, 3, 4, 40, 32)),
        ((32,), (2, 3, 4, 40, 32), (2, 3, 4, 40, 32)),
    ],
)
def test_shapes_that_do_not_fit_say_so(query: Shape, key: Shape, value: Shape) -> None:
    with pytest.raises(RuntimeError, match="sage_inductor attention: "):
        sage_attention(torch.randn(query), torch.randn(key), torch.randn(value), kernel="reference")


def test_gradients_take_the_exact_way_with_the_shapes_as_given() -> None:
    query, key, value, _ = inputs("five dims that broadcast")
    query.requires_grad_()
    out = sage_attention(query, key, value)
    assert isinstance(out, Tensor) and out.requires_grad
    assert relative_l2(out.detach(), exact(query.detach(), key, value)) < 1e-5
    with pytest.raises(NotEligibleError):
        sage_attention(query, key, value, kernel="reference")


def test_one_graph_when_compiled() -> None:
    query, key, value, _ = inputs("five dims that broadcast")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return sage_attention(query, key, value, kernel="reference", precision="accurate")

    torch.compiler.reset()
    out = torch.compile(attend, backend="eager", fullgraph=True)(query, key, value)
    check(out, exact(query, key, value))
