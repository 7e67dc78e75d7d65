"""`out=` under the checks of torch's own: every kernel, since no kernel is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sage_inductor import sage_attention

KERNELS = ["auto", "reference", "triton"]
SHAPE = (1, 2, 16, 16)


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(torch.randn(SHAPE, device=device) for _ in range(3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_autograd_hears_of_the_write(kernel: str, inputs: tuple[Tensor, ...]) -> None:
    """It saved `out` for a gradient, which would be that of other numbers."""
    weight = torch.ones(SHAPE, device=inputs[0].device, requires_grad=True)
    out = torch.randn(SHAPE, device=inputs[0].device)
    product = (weight * out).sum()
    version = out._version
    sage_attention(*inputs, out=out, kernel=kernel)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grad", [True, False])
def test_leaf_that_requires_grad(kernel: str, grad: bool, inputs: tuple[Tensor, ...]) -> None:
    """As torch's own: refused, and allowed under no_grad."""
    out = torch.zeros(SHAPE, device=inputs[0].device, requires_grad=True)
    with torch.set_grad_enabled(grad):
        if grad:
            with pytest.raises(RuntimeError, match="out requires grad"):
                sage_attention(*inputs, out=out, kernel=kernel)
            assert not out.detach().any()
        else:
            assert sage_attention(*inputs, out=out, kernel=kernel) is out
            assert out.detach().any()


def test_view_of_what_requires_grad(inputs: tuple[Tensor, ...]) -> None:
    out = (torch.zeros(SHAPE, device=inputs[0].device, requires_grad=True) * 1).view(SHAPE)
    with pytest.raises(RuntimeError, match="out requires grad"):
        sage_attention(*inputs, out=out, kernel="reference")


def _negative(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([x, x], -1)).conj().imag


def _expanded(x: Tensor) -> Tensor:
    return x[..., :1].expand(SHAPE)


def _overlapping(x: Tensor) -> Tensor:
    return x.flatten().as_strided(SHAPE, (512, 256, 8, 1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("view", "message"),
    [(_negative, "negative view"), (_expanded, "expanded"), (_overlapping, "overlap")],
)
def test_views_that_cannot_be_written(
    kernel: str, view: Callable[[Tensor], Tensor], message: str, inputs: tuple[Tensor, ...]
) -> None:
    out = view(torch.zeros(SHAPE, device=inputs[0].device))
    with pytest.raises(RuntimeError, match=message):
        sage_attention(*inputs, out=out, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("index", range(3))
def test_out_that_shares_memory_with_an_input(kernel: str, index: int, inputs: tuple[Tensor, ...]) -> None:
    """The whole of an input is a place for the output (as for torch's pointwise operators), a shifted part is not."""
    memory = torch.randn(2 * 512, device=inputs[0].device)
    tensors = list(inputs)
    tensors[index] = memory[:512].view(SHAPE)
    with pytest.raises(RuntimeError, match="shares memory"):
        sage_attention(*tensors, out=memory[256:768].view(SHAPE), kernel=kernel)
    expected = sage_attention(*tensors, kernel=kernel)
    assert torch.equal(sage_attention(*tensors, out=memory[512:].view(SHAPE), kernel=kernel), expected)


def test_conjugate_view(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError, match="conjugate view"):
        sage_attention(*inputs, out=torch.zeros(SHAPE, dtype=torch.complex64).conj(), kernel="reference")


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_negative_inputs_are_read_as_what_they_are(kernel: str, inputs: tuple[Tensor, ...]) -> None:
    query, key, value = inputs
    negative = _negative(query)
    assert negative.is_neg()
    expected = sage_attention(negative.clone(), key, value, kernel=kernel)
    assert torch.equal(sage_attention(negative, key, value, kernel=kernel), expected)
    out = torch.empty_like(expected)
    assert torch.equal(sage_attention(negative, key, value, kernel=kernel, out=out), expected)


def test_compiled_function_that_writes_into_its_argument(
    inputs: tuple[Tensor, ...], fresh_compile: None
) -> None:
    def write(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            sage_attention(query, key, value, out=out, kernel="reference")
        return out + 1

    out = torch.zeros(SHAPE, device=inputs[0].device)
    expected = sage_attention(*inputs, kernel="reference")
    result = torch.compile(write, fullgraph=True)(*inputs, out)
    assert torch.equal(result, expected + 1) and torch.equal(out, expected)


def test_variable_lengths_too(inputs: tuple[Tensor, ...]) -> None:
    from sage_inductor.kernels.triton import attention_varlen

    query = inputs[0].view(16, 2, 16)
    lengths = torch.tensor([0, 16], dtype=torch.int32, device=query.device)
    out = torch.randn_like(query)
    version = out._version
    attention_varlen(query, query, query, lengths, lengths, 16, 16, precision="accurate", out=out)
    assert out._version > version
    for bad, message in ((out.requires_grad_(), "requires grad"), (query, "shares memory")):
        with pytest.raises(ValueError, match=message):
            attention_varlen(query, query, query, lengths, lengths, 16, 16, precision="accurate", out=bad)
