"""Packed sequences in the operators of flash-attn 2 and 3 and of xformers: segments where a kernel is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flash_operators
import pytest
import torch
from torch import Tensor

from sage_inductor import Config, Site
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

flash_operators.register()
pytestmark = pytest.mark.usefixtures("inference")

ENDS = torch.tensor([0, 10, 10, 37, 40], dtype=torch.int32)
OTHER = torch.tensor([0, 4, 9, 30, 50], dtype=torch.int32)
BY_NAME = Config(kernel="reference", precision="accurate")
Form = Callable[..., Any]


def fa2(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, causal: bool = False, left: int = -1, right: int = -1, **more: Any) -> Any:  # fmt: skip
    return torch.ops.flash_attn._flash_attn_varlen_forward(
        q, k, v, own, other, 27, 27, **{"dropout_p": 0.0, "softmax_scale": 0.2, **more}, causal=causal,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip


def fa3(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, causal: bool = False, left: int = -1, right: int = -1, **more: Any) -> Any:  # fmt: skip
    return torch.ops.flash_attn_3._flash_attn_forward(
        q, k, v, cu_seqlens_q=own, cu_seqlens_k=other, max_seqlen_q=27, max_seqlen_k=27, softmax_scale=0.2,
        causal=causal, window_size_left=left, window_size_right=right, **more,
    )  # fmt: skip


def xformers(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, causal: bool = False, left: int = -1, right: int = -1, p: float = 0.0) -> Any:  # fmt: skip
    return torch.ops.xformers_flash.flash_fwd(
        q, k, v, own, other, None, 27, 27, p, 0.2, causal, left, right, False, None
    )


def cutlass(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, causal: bool = False, left: int = -1, right: int = -1, **more: Any) -> Any:  # fmt: skip
    """A batch of 1 in front; as many heads of keys as of queries; a window is causal."""
    window = {"window_size": left + 1} if left >= 0 else {}
    kind = 1 if causal or left >= 0 else 0
    given = {"dropout_p": 0.0, **more}
    items = torch.ops.xformers.efficient_attention_forward_cutlass(
        q[None],
        k[None],
        v[None],
        None,
        own,
        other,
        27,
        27,
        custom_mask_type=kind,
        scale=0.2,
        **given,
        **window,
    )
    return (items[0][0], *items[1:])


FORMS = {"fa2": fa2, "fa3": fa3, "xformers": xformers, "cutlass": cutlass}


def packed(form: str, keys: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = 4 if form == "cutlass" else 2
    return torch.randn(40, 4, 32), torch.randn(keys, kv_heads, 32), torch.randn(keys, kv_heads, 32)


def run(function: Form, *args: Tensor, config: Config = BY_NAME, **options: Any) -> tuple[Any, Site, str]:
    backend = RewritingBackend(config)
    result = torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    (graph,), (site,) = backend.graphs, backend.sites
    return result, site, " ".join(str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, "segments"),
        ({"causal": True}, "causal + segments"),
        ({"causal": True, "left": 5}, "sliding_window left=5 right=0 + segments"),
    ],
)
def test_one_length_for_queries_and_keys(form: str, options: dict[str, Any], mask: str) -> None:
    attend, args = FORMS[form], packed(form)
    result, site, targets = run(lambda q, k, v, ends: attend(q, k, v, ends, ends, **options)[0], *args, ENDS)
    assert (site.rewritten, site.pattern, site.mask) == (True, "varlen_attn", mask), site
    assert "flash" not in targets and "cutlass" not in targets and "scaled_dot_product" not in targets
    expected = attend(*args, ENDS, ENDS, **options)[0]
    assert relative_l2(result, expected) < 0.03 and max_error(result, expected) < 0.1
    assert result.stride() == expected.stride() and result.dtype == expected.dtype


@pytest.mark.parametrize("form", ["fa2", "fa3", "xformers"])
def test_a_window_on_both_sides(form: str) -> None:
    attend, args = FORMS[form], packed(form)
    result, site, _ = run(lambda q, k, v, ends: attend(q, k, v, ends, ends, False, 4, 3)[0], *args, ENDS)
    assert site.rewritten and site.mask == "band left=4 right=3 + segments", site
    assert relative_l2(result, attend(*args, ENDS, ENDS, False, 4, 3)[0]) < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_lengths_of_their_own(form: str) -> None:
    attend, args = FORMS[form], packed(form, keys=50)
    result, site, _ = run(lambda q, k, v, own, other: attend(q, k, v, own, other)[0], *args, ENDS, OTHER)
    assert site.rewritten and site.mask == "segments", site
    assert relative_l2(result, attend(*args, ENDS, OTHER)[0]) < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_symbolic_lengths_make_one_graph(form: str) -> None:
    attend = FORMS[form]
    backend = RewritingBackend(BY_NAME)
    compiled = torch.compile(
        lambda q, k, v, ends: attend(q, k, v, ends, ends, True)[0], backend=backend, dynamic=True
    )
    for total in (40, 33):
        args = tuple(torch.randn(total, 4, 32) for _ in range(3))
        ends = ENDS.clamp(max=total)
        assert relative_l2(compiled(*args, ends), attend(*args, ends, ends, True)[0]) < 0.03
    (site,) = backend.sites
    assert site.rewritten and site.mask == "causal (symbolic) + segments" and len(backend.graphs) == 1, site


def test_a_scale_that_the_graph_computes() -> None:
    """As of a symbolic head_dim."""

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, p: float = 0.0) -> Tensor:
        out: Tensor = fa2(q, k, v, ends, ends, True, softmax_scale=q.shape[-1] ** -0.5, dropout_p=p)[0]
        return out

    args = tuple(torch.randn(40, 4, 32) for _ in range(3))
    result, site, _ = run(attend, *args, ENDS, dynamic=True)
    assert site.rewritten, site
    assert relative_l2(result, attend(*args, ENDS)) < 0.03


@pytest.mark.parametrize("form", ["fa2", "fa3", "xformers"])
def test_memory_in_another_order(form: str) -> None:
    """`empty_like(q)` keeps the order of q."""
    attend = FORMS[form]
    args = tuple(torch.randn(4, 40, 32).transpose(0, 1) for _ in range(3))
    result, site, _ = run(lambda q, k, v, ends: attend(q, k, v, ends, ends)[0] * 1.0, *args, ENDS)
    expected = attend(*args, ENDS, ENDS)[0] * 1.0
    assert site.rewritten and result.stride() == expected.stride()
    assert relative_l2(result, expected) < 0.03


def stays(function: Form, *args: Tensor, config: Config = BY_NAME) -> str:
    result, site, targets = run(function, *args, config=config)
    assert not site.rewritten and "scaled_dot_product" not in targets
    expected = function(*args)
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    assert all(torch.equal(*pair) for pair in pairs)
    return "; ".join(site.reasons)


@pytest.mark.parametrize("form", FORMS)
def test_what_stays(form: str) -> None:
    attend, args = FORMS[form], packed(form, keys=50)

    def causal(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor) -> Any:
        return attend(q, k, v, own, other, True)[0]

    assert "with cu_seq_q and cu_seq_k apart (supported: one for both)" in stays(causal, *args, ENDS, OTHER)
    by_auto = stays(lambda *tensors: attend(*tensors)[0], *args, ENDS, OTHER, config=Config())
    assert '(supported: a kernel by name; "auto" has no measurement against it)' in by_auto
    assert "varlen_attn" not in by_auto.replace("_flash_attn_varlen_forward", "")


def test_what_no_kernel_computes_stays() -> None:
    args = packed("fa2", keys=50)

    def with_(**more: Any) -> Form:
        return lambda q, k, v, own, other: fa2(q, k, v, own, other, **more)[0]

    assert stays(with_(softcap=30.0), *args, ENDS, OTHER).startswith("softcap=30.0 (supported: 0;")
    assert stays(with_(dropout_p=0.5), *args, ENDS, OTHER) == "dropout_p=0.5 (supported: 0.0)"

    def paged(q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, used: Tensor) -> Any:
        return fa2(q, k, v, own, other, seqused_k=used)[0]

    assert stays(paged, *args, ENDS, OTHER, OTHER[1:]).startswith("seqused_k=a tensor (supported: None;")
    lse = stays(lambda *tensors: fa2(*tensors)[:2], *args, ENDS, OTHER)
    assert (
        lse == "log-sum-exp of flash_attn::_flash_attn_varlen_forward is read (supported: the output alone)"
    )


def test_with_gradients_it_stays() -> None:
    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = fa2(q, k, v, ENDS, ENDS)[:2]
            ctx.save_for_backward(out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # not attention's
            out, lse = ctx.saved_tensors
            return grad * lse.transpose(0, 1)[..., None], None, None

    backend = RewritingBackend(Config(kernel="reference", training=True))
    args = [tensor.requires_grad_() for tensor in packed("fa2")]
    with torch.enable_grad():
        out = torch.compile(lambda *tensors: WithGradient.apply(*tensors), backend=backend)(*args)
    assert torch.equal(out, WithGradient.apply(*args))
    (site,) = backend.sites
    assert "requires_grad=inputs (supported: none; torch.no_grad())" in site.reasons


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_it_stays_unless_the_inputs_are_cast_already(form: str) -> None:
    """Autocast would cast what our operator is given; these operators take their inputs as they are."""
    attend, args = FORMS[form], packed(form)

    def function(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Any:
        return attend(q, k, v, ends, ends)[0]

    with torch.autocast("cpu", torch.bfloat16):
        reasons = stays(function, *args, ENDS)
        assert "autocast=bfloat16 (supported: torch.float32, as the inputs of the kernel, or none)" in reasons
        torch.compiler.reset()
        result, site, _ = run(function, *(tensor.bfloat16() for tensor in args), ENDS)
    assert site.rewritten and result.dtype == torch.bfloat16, site
