"""`torch.nn.attention.varlen.varlen_attn` becomes attention within segments, where a kernel is named. A CPU traces it and cannot
run it: what it computes is written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sage_inductor import Config
from sage_inductor.kernels import AttentionParams
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import graph_text, relative_l2

varlen = pytest.importorskip("torch.nn.attention.varlen")
pytestmark = pytest.mark.usefixtures("inference")

ENDS = torch.tensor([0, 10, 10, 37, 40], dtype=torch.int32)
OTHER = torch.tensor([0, 4, 9, 30, 50], dtype=torch.int32)
BY_NAME = Config(kernel="reference", precision="accurate")


def rewritten(function: Any, *inputs: Tensor, config: Config = BY_NAME, dynamic: bool | None = None) -> tuple[fx.GraphModule, Site]:  # fmt: skip
    """The graph of `function` after the pass, and its site."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        (outputs,) = next(node for node in module.graph.nodes if node.op == "output").args
        return lambda *args: [torch.empty(0) for _ in outputs]

    torch.compiler.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (site,) = rewrite_graph(graphs[0].graph, config)
    graphs[0].recompile()
    return graphs[0], site


def packed(heads: int = 4, kv_heads: int = 4, keys: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(40, heads, 32), torch.randn(keys, kv_heads, 32), torch.randn(keys, kv_heads, 32)


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor, other: Tensor, params: AttentionParams
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for (first, end), (first_key, end_key) in zip(
        zip(own[:-1], own[1:], strict=True), zip(other[:-1], other[1:], strict=True), strict=True
    ):
        inputs = (t.transpose(0, 1)[None] for t in (q[first:end], k[first_key:end_key], v[first_key:end_key]))
        out[first:end] = float64_attention(*inputs, None, params)[0][0].transpose(0, 1)
    return out


@pytest.mark.parametrize(
    ("kwargs", "params", "mask"),
    [
        ({}, {}, "segments"),
        ({"window_size": (-1, 0)}, {"is_causal": True}, "causal + segments"),
        ({"window_size": (5, 0)}, {"is_causal": True, "window_left": 5}, "sliding_window left=5 right=0 + segments"),
        ({"window_size": (4, 3), "scale": 0.3}, {"window_left": 4, "window_right": 3, "scale": 0.3}, "band left=4 right=3 + segments"),
    ],
)  # fmt: skip
def test_one_length_for_queries_and_keys(kwargs: Any, params: Any, mask: str) -> None:
    q, k, v = packed(kv_heads=2)
    module, site = rewritten(
        lambda q, k, v, ends: varlen.varlen_attn(q, k, v, ends, ends, 27, 27, enable_gqa=True, **kwargs), q, k, v, ENDS
    )  # fmt: skip
    assert site.rewritten and (site.pattern, site.mask) == ("varlen_attn", mask), site
    assert "varlen" not in graph_text(module.graph) and "scaled_dot_product" not in graph_text(module.graph)
    (out,) = module(*in_order(module, q=q, k=k, v=v, ends=ENDS))
    assert out.stride() == torch.empty_like(q).stride()
    assert relative_l2(out, by_sequence(q, k, v, ENDS, ENDS, AttentionParams(**params))) < 0.013


def in_order(module: fx.GraphModule, **inputs: Tensor) -> list[Tensor]:
    """The inputs in the order of the graph's placeholders, whose names end with theirs."""
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    return [next(value for name, value in inputs.items() if str(target).strip("_").endswith(f"_{name}")) for target in names]  # fmt: skip


def test_lengths_of_their_own() -> None:
    q, k, v = packed(keys=50)
    module, site = rewritten(
        lambda q, k, v, own, other: varlen.varlen_attn(q, k, v, own, other, 27, 21), q, k, v, ENDS, OTHER
    )
    assert site.rewritten and site.mask == "segments"
    (out,) = module(*in_order(module, q=q, k=k, v=v, own=ENDS, other=OTHER))
    assert relative_l2(out, by_sequence(q, k, v, ENDS, OTHER, AttentionParams())) < 0.013


def test_symbolic_lengths() -> None:
    q, k, v = packed()
    module, site = rewritten(
        lambda q, k, v, ends: varlen.varlen_attn(q, k, v, ends, ends, 27, 27, window_size=(-1, 0)), q, k, v, ENDS,
        dynamic=True,
    )  # fmt: skip
    assert site.rewritten and site.mask == "causal (symbolic) + segments", site


@pytest.mark.parametrize(
    ("config", "kwargs", "reason"),
    [
        (Config(), {}, 'varlen_attn (supported: a kernel by name; "auto" has no measurement against it)'),
        (BY_NAME, {"seqused_k": torch.tensor([9, 0, 20, 2], dtype=torch.int32)}, "seqused_k of varlen_attn (supported: None)"),
        (BY_NAME, {"other": OTHER[:4]}, "cu_seq_q and cu_seq_k of 5 and 4 numbers (supported: as many in both)"),
        (BY_NAME, {"return_aux": varlen.AuxRequest(lse=True)}, "log-sum-exp of varlen_attn is read (supported: the output alone)"),
        (BY_NAME, {"other": OTHER, "window_size": (-1, 0)}, "window of varlen_attn with cu_seq_q and cu_seq_k apart (supported: one for both)"),
    ],
)  # fmt: skip
def test_what_stays(config: Config, kwargs: Any, reason: str) -> None:
    q, k, v = packed()
    other = kwargs.pop("other", ENDS) if "other" in kwargs else ENDS
    module, site = rewritten(
        lambda q, k, v: varlen.varlen_attn(q, k, v, ENDS, other, 27, 27, **kwargs), q, k, v, config=config
    )
    assert not site.rewritten and reason in site.reasons, site
    assert "varlen" in graph_text(module.graph) and "scaled_dot_product" not in graph_text(module.graph)


def test_under_autocast_it_stays() -> None:
    """It takes its inputs as they are, and our operator would be given others."""
    q, k, v = packed()
    with torch.autocast("cpu", torch.bfloat16):
        _, site = rewritten(
            lambda q, k, v, ends: varlen.varlen_attn(q, k, v, ends, ends, 27, 27), q, k, v, ENDS
        )
    assert site.reasons == (
        "autocast=bfloat16 (supported: torch.float32, as the inputs of the kernel, or none)",
    )
