"""The fused kernels behind SDPA, as rings of several GPUs call them for their LSE."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_inductor import Config, calibrate, rewrite_exported
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, capture, graph_text, relative_l2

aten = torch.ops.aten
CONFIG = Config(kernel="reference", precision="accurate")
pytestmark = pytest.mark.usefixtures("inference")


def qkv(kv_heads: int = 4, q_len: int = 24, kv_len: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, q_len, 4, 32).transpose(1, 2)
    k, v = (torch.randn(2, kv_len, kv_heads, 32).transpose(1, 2) for _ in range(2))
    return q, k + 1, v


def on_cpu(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)
    return out * 1, lse


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two parts of the keys, put together as rings do."""
    parts = zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)
    (out, lse), (other, other_lse) = (
        aten._scaled_dot_product_flash_attention_for_cpu(q, *part, scale=0.2) for part in parts
    )
    lse, other_lse = lse[..., None], other_lse[..., None]
    return out - torch.sigmoid(other_lse - lse) * (out - other)


def rewritten(function: Any, *args: Any, config: Config = CONFIG) -> tuple[Any, RewritingBackend]:
    backend = RewritingBackend(config)
    return torch.compile(function, backend=backend)(*args), backend


@pytest.mark.parametrize("packet", [True, False])
def test_output_and_lse_are_right_and_lie_as_before(packet: bool) -> None:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    kernel = kernel if packet else kernel.default

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(q, k, v, 0.0, True, scale=0.2)  # type: ignore[no-any-return]

    q, k, v = qkv(kv_len=24)
    expected, expected_lse = attend(q, k, v)
    (out, lse), backend = rewritten(attend, q, k, v)
    (site,) = backend.sites
    assert site.rewritten and (site.pattern, site.mask) == ("fused_sdpa", "causal")
    for found, wanted, bound in ((out, expected, 0.02), (lse, expected_lse, 0.01)):
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert relative_l2(found, wanted) < bound and (found - wanted).abs().max() < 5 * bound


def test_golden() -> None:
    graph = capture(on_cpu, *qkv())
    rewrite_graph(graph.graph, CONFIG)
    assert_expected_inline(
        graph_text(graph.graph),
        """\
a = input: 2x4x24x32
b = input: 2x4x40x32
c = input: 2x4x40x32
d = sage_inductor.attention_lse(a, b, c, kernel_name='reference', precision='accurate')
e = getitem(d, 0): 2x4x24x32
f = getitem(d, 1): 2x4x24
g = .permute(f, 0, 2, 1): 2x4x24
h = .contiguous(g): 2x4x24
i = .permute(h, 0, 2, 1): 2x4x24
j = mul(e, 1): 2x4x24x32
return (j, i)""",
    )


def test_merged_parts_are_the_whole() -> None:
    q, k, v = qkv()
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    out, backend = rewritten(merged, q, k, v)
    assert [site.rewritten for site in backend.sites] == [True, True]
    assert relative_l2(out, exact) < 0.02


def test_a_mask_and_the_output_alone() -> None:
    q, k, v = qkv()
    bias = torch.randn(2, 1, 24, 40)
    attend = lambda *args: aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], attn_mask=args[3])[0]  # noqa: E731
    out, backend = rewritten(attend, q, k, v, bias)
    assert backend.sites[0].rewritten and "attention_lse" not in graph_text(backend.graphs[0].graph)
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, v, bias)) < 0.02


def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)


def on_fake_gpu(function: Any, q_len: int = 50, kv_heads: int = 4) -> tuple[Any, Any, list[Any], str]:
    """What plain torch and the rewritten graph give for CUDA tensors, as shapes."""
    graphs: list[Any] = []

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, q_len, heads, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for heads in (4, kv_heads, kv_heads)
        )
        plain = torch.compile(function, backend=backend)(q, k, v)
        sites = rewrite_graph(graphs[0].graph, CONFIG)
        graphs[0].recompile()
        found = graphs[0](q, k, v)
    return plain, found, list(sites), graph_text(graphs[0].graph)


@pytest.mark.parametrize("kernel", [flash, efficient, cudnn])
@pytest.mark.parametrize("q_len", [50, 64])
def test_every_kernel_has_its_form(kernel: Any, q_len: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(q, k, v)[:2]
        return out + 1, lse

    plain, found, (site,), _ = on_fake_gpu(attend, q_len)
    assert site.rewritten, site.reasons
    for new, old in zip(found, plain, strict=True):
        assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)


def test_rows_behind_the_last_query_have_an_lse_of_inf() -> None:
    """As the kernel leaves them, so that a merge gives them no weight of another part's."""
    from sage_inductor.patterns.fused_attention import lse_steps

    q = torch.randn(2, 4, 50, 64)
    ((pad, arguments),) = lse_steps(torch.empty(2, 4, 64), q) or ()
    lse = pad(torch.zeros(2, 4, 50), *arguments)  # type: ignore[operator]
    assert lse.shape == (2, 4, 64) and bool((lse[..., 50:] == math.inf).all())


@pytest.mark.parametrize("kernel", [flash, efficient, cudnn])
def test_a_call_whose_random_state_is_read_stays(kernel: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        items = kernel(q, k, v)
        return items[0] + 1, items[1], items[6 if len(items) > 4 else 2]

    _, _, sites, text = on_fake_gpu(attend)
    assert not sites and "_scaled_dot_product" in text and "sage" not in text


def test_an_lse_that_was_not_computed_is_not_read_as_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[:2]

    _, _, sites, _ = on_fake_gpu(attend)
    assert not sites

    def output_alone(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0] + 1

    torch.compiler.reset()
    _, _, (site,), _ = on_fake_gpu(output_alone)
    assert site.rewritten


def test_gradients_beside_an_lse_stay() -> None:
    q, k, v = qkv()
    with torch.enable_grad():
        _, backend = rewritten(
            on_cpu, q.requires_grad_(), k, v, config=Config(kernel="reference", training=True)
        )
    (site,) = backend.sites
    assert not site.rewritten and "the LSE is read" in site.reasons[0]


def test_autocast_does_not_cast_what_the_kernel_did_not() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        (out, _), backend = rewritten(on_cpu, q, k, v)
    (site,) = backend.sites
    assert out.dtype == torch.float32 and not site.rewritten and "autocast" in site.reasons[0]


def test_symbolic_lengths() -> None:
    for length in (24, 30):
        q, k, v = qkv(q_len=length)
        backend = RewritingBackend(CONFIG)
        fast = torch.compile(on_cpu, backend=backend, dynamic=True)
        for found, wanted in zip(fast(q, k, v), on_cpu(q, k, v), strict=True):
            assert relative_l2(found, wanted) < 0.02 and found.stride() == wanted.stride()
        assert backend.sites[0].rewritten


def test_grouped_heads() -> None:
    plain, found, (site,), text = on_fake_gpu(
        lambda q, k, v: [item * 1 for item in flash(q, k, v)[:2]], kv_heads=2
    )
    assert site.rewritten and "enable_gqa=True" in text
    assert [item.shape for item in found] == [item.shape for item in plain]


def test_of_an_exported_program() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return on_cpu(q, k, v)

    args = qkv()
    program = rewrite_exported(torch.export.export(Model(), args), CONFIG)
    out, lse = program.module()(*args)
    expected, expected_lse = on_cpu(*args)
    assert "attention_lse" in str(program.graph)
    assert relative_l2(out, expected) < 0.02 and relative_l2(lse, expected_lse) < 0.01
    assert lse.stride() == expected_lse.stride()


def test_calibration_measures_it() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return merged(q, k, v)

    plan = calibrate(Model(), [qkv()], tolerance=0.1, config=Config(kernel="reference"))
    assert all(site.measured for site in plan.sites) and len(plan.sites) == 2
