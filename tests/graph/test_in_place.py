"""What is written in place, by whatever means and through whatever view, is never read at the wrong time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config, explain
from sage_inductor.testing import RewritingBackend, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
BOUND = 0.03  # INT8 scores at these sizes; what is read at the wrong time is off by .05 and more


@torch.library.custom_op("sage_inductor_tests::triple_", mutates_args={"x"})
def triple_(x: Tensor) -> None:
    x.mul_(3)


def checkpointed(x: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        return x.view(-1).mul_(3).sum()

    return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.mul_(3),
    "method of a view": lambda x: x.ravel().mul_(3),
    "as_strided": lambda x: x.as_strided((2, 16), (16, 1)).fill_(9.0),
    "data": lambda x: x.data.mul_(3),
    "adjoint": lambda x: x.adjoint().mul_(3),
    "unfold": lambda x: x.unfold(-2, 2, 2).mul_(3),
    "tensor_split": lambda x: torch.tensor_split(x, 2)[0].mul_(9),
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1).fill_(9),
    "foreach": lambda x: torch._foreach_mul_([x], 3.0),
    "out": lambda x: torch.mul(x, 3, out=x),
    "setitem": lambda x: x[..., 0].__setitem__(..., 7.0),
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.leaky_relu(x, 0.1, True),
    "overload": lambda x: torch.ops.aten.mul_.Tensor(x, 3.0),
    "packet": lambda x: torch.ops.aten.mul_(x, 3.0),
    "custom operator": lambda x: torch.ops.sage_inductor_tests.triple_(x),
    "checkpoint": checkpointed,
}


def agrees(function: Callable[..., Tensor], *inputs: Tensor) -> RewritingBackend:
    torch.compiler.reset()
    backend = RewritingBackend(CONFIG)
    with torch.no_grad():
        expected = function(*(tensor.clone() for tensor in inputs))
        out = torch.compile(function, backend=backend, fullgraph=True)(*(t.clone() for t in inputs))
    assert relative_l2(out, expected) < BOUND, backend.sites
    return backend


def inputs(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 16, 32), torch.randn(2, kv_heads, 16, 32), torch.randn(2, kv_heads, 16, 32)


@pytest.mark.parametrize("name", WRITES)
def test_a_key_that_was_repeated_before(name: str) -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeated = key.repeat_interleave(2, 1)
        WRITES[name](key)
        return F.scaled_dot_product_attention(query, repeated, value.repeat_interleave(2, 1))

    backend = agrees(model, *inputs(kv_heads=2))
    assert [site.rewritten for site in backend.sites] == [True]  # by the repeated key


def test_a_value_that_was_written_to_after_it_was_repeated() -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeated = value.repeat_interleave(2, 1)
        repeated[:, 1] = 5.0
        return F.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), repeated)

    agrees(model, *inputs(kv_heads=2))


@pytest.mark.parametrize("name", WRITES)
def test_attention_written_out(name: str) -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * 0.2
        WRITES[name](key)
        return scores.softmax(-1) @ value

    assert agrees(model, *inputs()).sites == []
    with torch.no_grad():
        (item,) = explain(model, *inputs(), config=CONFIG).unread
    assert item.obstacle == "operands=written to in place meanwhile"


@pytest.mark.parametrize("name", [name for name in WRITES if name != "checkpoint"])
def test_constant_masks(name: str) -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.arange(256.0).view(16, 16).sin()
        zeros = torch.zeros(16, 16)
        WRITES[name](mask)
        zeros[:, ::2].copy_(mask[:, ::2])
        return F.scaled_dot_product_attention(query, key, value, zeros)

    assert agrees(model, *inputs()).sites[0].mask == "additive"


MASK_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda mask: mask.__setitem__((..., 0), True),
    "view": lambda mask: mask.view(2, -1)[:, :6].fill_(True),
    "ravel": lambda mask: mask.ravel()[:9].fill_(True),
    "diagonal": lambda mask: mask.diagonal(dim1=-2, dim2=-1).fill_(True),
    "not": lambda mask: mask.logical_not_(),
}


@pytest.mark.parametrize("name", MASK_WRITES)
@pytest.mark.parametrize("late", ["joined", "padding"])
def test_masks_of_causality_and_padding(late: str, name: str) -> None:
    def model(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(16, 16, dtype=torch.bool).tril() & padding
        MASK_WRITES[name](mask if late == "joined" else padding)
        return F.scaled_dot_product_attention(query, key, value, mask)

    assert agrees(model, *inputs(), torch.rand(2, 1, 1, 16) > 0.3).sites[0].mask == "bool"


def test_additive_padding() -> None:
    def model(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        mask = torch.zeros(2, 1, 16, 16).masked_fill(~padding, -torch.inf)
        mask.view(2, -1)[:, :100].fill_(1.0)
        return F.scaled_dot_product_attention(query, key, value, mask)

    assert agrees(model, *inputs(), torch.rand(2, 1, 1, 16) > 0.3).sites[0].mask == "additive"


@pytest.mark.parametrize("copy", ["reshape", "contiguous", "flatten"])
@pytest.mark.parametrize("shared", [True, False])
def test_copies_of_one_output_stay_apart(copy: str, shared: bool) -> None:
    """An output laid out as its copy would be makes that copy a view."""
    copies: dict[str, Callable[[Tensor], Tensor]] = {
        "reshape": lambda x: x.reshape(2, 16, -1), "contiguous": lambda x: x.contiguous(), "flatten": lambda x: x.flatten(2)
    }  # fmt: skip

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value)
        transposed = out.transpose(1, 2)
        first = copies[copy](transposed)
        second = copies[copy](transposed if shared else out.transpose(1, 2))
        first.mul_(3)
        return second + 0

    agrees(model, *inputs())


def test_writing_to_something_else_costs_nothing() -> None:
    """A KV cache that is filled, and a checkpointed body that writes to a tensor of its own."""

    def model(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
        cache[:, :, :16] = key
        repeated = cache[:, :, :16].repeat_interleave(2, 1)

        def body(x: Tensor) -> Tensor:
            own = torch.zeros_like(x)
            own[0] = x[0]
            return own

        out = torch.utils.checkpoint.checkpoint(body, key, use_reentrant=False)
        query = query + out.sum()
        causal = torch.ones(16, 16, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(query, repeated, value.repeat_interleave(2, 1), causal)

    backend = agrees(model, *inputs(kv_heads=2), torch.zeros(2, 2, 64, 32))
    (site,) = backend.sites
    assert site.rewritten and site.mask == "causal"
    assert site.key is not None and site.key.shape[1] == 2  # before it was repeated


@pytest.mark.parametrize("which", ["scores", "weights", "output", "output of bmm", "bias"])
def test_products_that_write_to_a_tensor_of_somebody_else_stay(which: str) -> None:
    """The caller holds what `out=` names, whatever is done with the returned value."""

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        square, long = (torch.ones(*query.shape[:-1], size) for size in (query.shape[-2], value.shape[-1]))
        outs = {name: {} for name in ("scores", "weights", "output", "bias")}
        given = {"out": long if which.startswith("output") else square}
        outs[which.partition(" ")[0]] = given
        scores = torch.matmul(query, key.mT, **outs["scores"])
        scores = torch.add(scores, query.new_ones(query.shape[-2]), **outs["bias"])
        weights = torch.softmax(scores, -1, **outs["weights"])
        if which == "output of bmm":
            torch.bmm(weights.flatten(0, 1), value.flatten(0, 1), out=long.view(-1, *long.shape[2:]))
        else:
            torch.matmul(weights, value, **outs["output"])
        return given["out"].sin() + 1

    agrees(model, *inputs())
