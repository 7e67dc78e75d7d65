"""Tensors of subclasses: those that carry out operators in their own way stay with the attention they know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from sage_inductor import Config, NotEligibleError, explain
from sage_inductor.testing import RewritingBackend, relative_l2
from sage_inductor.torch_internals.dispatch import dispatches_itself

REFERENCE = Config(kernel="reference", precision="accurate")
pytestmark = pytest.mark.usefixtures("inference")


class Halved(Tensor):
    """Holds twice its value, as a quantised tensor holds something else; knows the operators of aten."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Halved:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        return made  # type: ignore[return-value]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *args: Any) -> Halved:
        return cls(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"no rule for {func}")
        plain_args, plain_kwargs = tree_map_only(cls, lambda item: item.held / 2, (args, kwargs or {}))
        out = tree_map_only(Tensor, lambda item: cls(item * 2), func(*plain_args, **plain_kwargs))
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


class Named(Tensor):
    """Overrides functions alone, and none of them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.mT / 4).softmax(-1) @ x


def three_dims(x: Tensor) -> Tensor:
    folded = x.flatten(0, 1)
    return torch.bmm(torch.bmm(folded, folded.mT).softmax(-1), folded)


def five_dims(x: Tensor) -> Tensor:
    more = x[:, None]
    return (more @ more.mT / 4).softmax(-1) @ more


def grouped(x: Tensor) -> Tensor:
    half = x[:, :2].repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(x, half, half)


def half_of_it(x: Tensor) -> Tensor:
    """Only the keys are of the subclass."""
    return F.scaled_dot_product_attention(torch.ones_like(x) + 0 * x, x, x)


@pytest.mark.parametrize("function", [sdpa, causal, by_hand, three_dims, five_dims, grouped, half_of_it])
def test_a_subclass_with_a_dispatch_of_its_own_stays(function: Any) -> None:
    plain = torch.randn(2, 4, 16, 32)
    x = Halved(plain * 2)
    backend = RewritingBackend(REFERENCE)
    out = torch.compile(function, backend=backend)(x)
    assert isinstance(out, Halved)
    assert relative_l2(out.held / 2, function(plain)) < 1e-5
    (site,) = backend.sites
    assert not site.rewritten
    assert any(
        "=Halved (supported: plain tensors, or DTensors alone)" in reason for reason in site.reasons
    ), site.reasons


def test_explain_says_what_a_compile_does_and_names_the_tensors() -> None:
    x = Halved(torch.randn(2, 4, 16, 32))
    (site,) = explain(sdpa, x, config=REFERENCE).sites
    assert site.reasons == ("type of query, key, value=Halved (supported: plain tensors, or DTensors alone)",)


def test_fallback_error_raises_for_them() -> None:
    with pytest.raises(NotEligibleError, match="Halved"):
        explain(sdpa, Halved(torch.randn(2, 4, 16, 32)), config=Config(kernel="reference", fallback="error"))


def test_a_mask_of_a_subclass() -> None:
    def attend(x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, mask)

    (site,) = explain(attend, torch.randn(2, 4, 16, 32), Halved(torch.randn(16, 16)), config=REFERENCE).sites
    assert any(reason.startswith("type of ") and "attn_mask" in reason for reason in site.reasons)


def test_what_makes_no_difference_is_rewritten() -> None:
    plain = torch.randn(2, 4, 16, 32)
    for x in (plain, nn.Parameter(plain), nn.Parameter(plain, requires_grad=False), nn.Buffer(plain)):
        torch.compiler.reset()
        backend = RewritingBackend(REFERENCE)
        out = torch.compile(sdpa, backend=backend)(x)
        assert [site.rewritten for site in backend.sites] == [True], type(x)
        assert relative_l2(out, sdpa(plain)) < 0.02


def test_a_subclass_that_overrides_functions_only() -> None:
    plain = torch.randn(2, 4, 16, 32)
    x = plain.as_subclass(Named)
    assert not dispatches_itself(x)
    backend = RewritingBackend(REFERENCE)
    out = torch.compile(sdpa, backend=backend)(x)
    assert all(site.rewritten for site in backend.sites)
    assert relative_l2(out.as_subclass(Tensor), sdpa(plain)) < 0.02


def test_tensors_that_trace_are_no_subclasses() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FakeTensorMode():
        assert not dispatches_itself(torch.ones(2))
    with FunctionalTensorMode():
        assert not dispatches_itself(FunctionalTensor.to_functional(torch.ones(2)))


def test_nested_tensors_are_left_alone_as_before() -> None:
    x = torch.nested.nested_tensor([torch.randn(5, 32), torch.randn(7, 32)], layout=torch.jagged)

    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)

    backend = RewritingBackend(REFERENCE)
    out = torch.compile(attend, backend=backend)(x)
    assert not any(site.rewritten for site in backend.sites)
    assert torch.equal(out.values(), attend(x).values())
