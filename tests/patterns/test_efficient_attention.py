"""The CUTLASS operator of xformers, under its own name and as PyTorch's: found and right, or left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flash_operators
import pytest
import torch
from expecttest import assert_expected_inline
from flash_operators import exact
from torch import Tensor

from sage_inductor import Config, Site, explain
from sage_inductor.testing import RewritingBackend, capture, graph_text, max_error, relative_l2

flash_operators.register()
pytestmark = pytest.mark.usefixtures("inference")

CONFIG = Config(kernel="reference", precision="accurate")
Form = Callable[..., Any]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kind: int = 0, lse: bool = False, **more: Any) -> Any:  # fmt: skip
    given: dict[str, Any] = {"dropout_p": 0.0, "scale": 0.2, **more}
    return torch.ops.xformers.efficient_attention_forward_cutlass(
        q, k, v, bias, None, None, None, None, custom_mask_type=kind, compute_log_sumexp=lse, **given
    )


def inputs(q_len: int = 24, kv_len: int = 24, value_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, q_len, 4, 32), torch.randn(2, kv_len, 4, 32), torch.randn(2, kv_len, 4, value_dim)


def run(function: Form, *args: Tensor, config: Config = CONFIG) -> tuple[Any, Site, str]:
    backend = RewritingBackend(config)
    torch.compiler.reset()  # numbers that differ from one call to the next become symbols
    result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    (graph,), (site,) = backend.graphs, backend.sites
    return result, site, " ".join(str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("lengths", "options", "mask"),
    [
        ((24, 24), {}, "none"),
        ((9, 24), {"scale": None}, "none"),
        ((24, 24), {"kind": 1}, "causal"),
        ((9, 24), {"kind": 1}, "causal"),
        ((24, 9), {"kind": 1}, "causal"),
        ((9, 24), {"kind": 2}, "causal bottom-right"),
        ((24, 9), {"kind": 2}, "causal bottom-right"),
        ((24, 24), {"kind": 1, "window_size": 6}, "sliding_window left=5 right=0"),
        ((9, 24), {"kind": 2, "window_size": 6}, "sliding_window left=5 right=0 bottom-right"),
        ((24, 24), {"window_size": 0}, "none"),
    ],
)
def test_found_and_right(lengths: tuple[int, int], options: dict[str, Any], mask: str) -> None:
    args = inputs(*lengths, value_dim=16)
    result, site, targets = run(lambda *tensors: attend(*tensors, **options)[0], *args)
    assert (site.pattern, site.mask, site.rewritten) == ("efficient_attention", mask, True), site
    assert "cutlass" not in targets
    expected = attend(*args, **options)[0]
    assert relative_l2(result, expected) < 0.03 and max_error(result, expected) < 0.1
    assert result.stride() == expected.stride() and result.dtype == expected.dtype


@pytest.mark.parametrize("shape", [(2, 4, 9, 24), (1, 1, 9, 24)])
def test_a_bias(shape: tuple[int, ...]) -> None:
    args, bias = inputs(9, 24), 2 * torch.randn(shape)
    result, site, _ = run(lambda *tensors: attend(*tensors)[0], *args, bias)
    assert site.rewritten and site.mask == "additive", site
    assert relative_l2(result, attend(*args, bias)[0]) < 0.03


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_lse_is_given_where_it_is_read(kind: int) -> None:
    args = inputs(9, 24)
    (out, lse), site, targets = run(lambda *tensors: attend(*tensors, kind=kind, lse=True)[:2], *args)
    assert site.rewritten and "cutlass" not in targets, site
    expected = attend(*args, kind=kind, lse=True)
    assert relative_l2(out, expected[0]) < 0.03 and lse.stride() == expected[1].stride()
    assert (lse[..., :9] - expected[1][..., :9]).abs().max() < 0.05 and bool(
        (lse[..., 9:] == torch.inf).all()
    )


def test_pytorchs_operator_of_the_same_kernel() -> None:
    """A CPU traces it, and cannot run it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._efficient_attention_forward(
            query=q, key=k, value=v, bias=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=-1,
            max_seqlen_k=-1, dropout_p=0.0, compute_log_sumexp=False, custom_mask_type=2, scale=0.2, seqlen_k=None,
            window_size=None,
        )[0]  # fmt: skip
        return out.flatten(2)

    graphs: list[Any] = []

    def trace_only(module: Any, _: Any) -> Any:
        graphs.append(module)
        return lambda *args: [torch.empty(2, 9, 128)]

    args = inputs(9, 24)
    torch.compile(function, backend=trace_only)(*args)
    (module,) = graphs
    RewritingBackend(CONFIG)(module, ())
    assert_expected_inline(
        graph_text(module.graph),
        """\
a = input: 2x9x4x32
b = input: 2x24x4x32
c = input: 2x24x4x32
d = .transpose(a, 1, 2): 2x4x9x32
e = .transpose(b, 1, 2): 2x4x24x32
f = .transpose(c, 1, 2): 2x4x24x32
g = sage_inductor.attention(d, e, f, is_causal=True, scale=0.2, bottom_right=True, kernel_name='reference', precision='accurate'): 2x4x9x32
h = .transpose(g, 1, 2): 2x9x4x32
i = .flatten(h, 2): 2x9x128
return (i)""",
    )
    expected = exact(*args, True, -1, -1, 0.2)[0].flatten(2)
    assert relative_l2(module(*args)[0], expected) < 0.03


def stays(function: Form, *args: Tensor, config: Config = CONFIG) -> str:
    result, site, targets = run(function, *args, config=config)
    assert not site.rewritten and "cutlass" in targets and site.pattern == "efficient_attention"
    expected = function(*args)
    pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
    assert all(torch.equal(one, other) for one, other in pairs if isinstance(one, Tensor))
    return "; ".join(site.reasons)


def test_what_stays() -> None:
    args, bias = inputs(9, 24), torch.randn(2, 4, 9, 24)

    def with_(**more: Any) -> Form:
        return lambda *tensors: attend(*tensors, **more)[0]

    assert stays(with_(dropout_p=0.5), *args) == "dropout_p=0.5 (supported: 0.0)"
    assert stays(with_(kind=1), *args, bias) == "bias beside custom_mask_type=1 (supported: one of them)"
    assert stays(with_(kind=1, window_size=5), *args).startswith("window_size beside custom_mask_type=1")
    assert stays(with_(window_size=5), *args).startswith("window_size=5 beside custom_mask_type=0")
    assert stays(with_(kind=3), *args) == "custom_mask_type=3 (supported: 0, 1, 2)"
    assert stays(lambda *tensors: attend(*tensors)[:2], *args).startswith(
        "logsumexp=of another form, or length"
    )
    assert stays(lambda *tensors: attend(*tensors)[::2], *args).startswith("read=what belongs to a backward")
    assert "device=cpu" in stays(with_(), *args, config=Config())
    lse = stays(lambda *tensors: attend(*tensors, kind=2, lse=True)[:2], *inputs(24, 9))
    assert lse.startswith("logsumexp=read where queries may see no key")

    def of_graph(q: Tensor, k: Tensor, v: Tensor, kind: int) -> Any:
        return attend(q, k, v, kind=kind)[0]

    backend = RewritingBackend(CONFIG)
    torch.compile(of_graph, backend=backend, dynamic=True)(*args, 2)
    assert backend.sites[0].reasons == (
        "custom_mask_type=a number of the graph (supported: one known while compiling)",
    )

    def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return attend(q, k, v, seqlen_k=lengths)[0]

    assert stays(padded, *args, torch.tensor([24, 20])).startswith("seqlen_k=a tensor (supported: None;")


def test_gradients_stay() -> None:
    backend = RewritingBackend(Config(kernel="reference", training=True))
    args = [tensor.requires_grad_() for tensor in inputs()]
    with torch.enable_grad():
        torch.compile(lambda *tensors: attend(*tensors)[0], backend=backend)(*args)
    (site,) = backend.sites
    assert site.reasons == ("requires_grad=inputs (supported: none; torch.no_grad())",)


def test_a_report_has_it_as_a_site() -> None:
    report = explain(lambda *tensors: attend(*tensors)[0], *inputs(), config=CONFIG)
    assert [site.rewritten for site in report.sites] == [True] and report.operators == ()
    graph = capture(lambda *tensors: attend(*tensors, kind=1)[0], *inputs())
    RewritingBackend(CONFIG)(graph, ())
    assert "is_causal=True" in graph_text(graph.graph)
