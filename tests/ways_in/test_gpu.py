"""The package on a GPU: compiled models, CUDA graphs, streams, autocast, strides, and the kernels against the
oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, backends, explain, kernels, sage_attention
from sage_inductor.measurement.ground_truth import DOCUMENTED as BOUNDS
from sage_inductor.operators import inference as ops
from sage_inductor.testing import relative_l2

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("inference")]


class Block(nn.Module):
    def __init__(self, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        dim = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        batch, seq, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return x + self.out(attended.transpose(1, 2).reshape(batch, seq, dim))


def model(layers: int = 2, **kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**kwargs) for _ in range(layers))).eval().cuda().bfloat16()


def inputs(batch: int = 2, seq: int = 1000, dim: int = 512) -> Tensor:
    return torch.randn(batch, seq, dim, device="cuda", dtype=torch.bfloat16)


def close(out: Tensor, expected: Tensor, bound: float = 0.02) -> bool:
    return relative_l2(out, expected) < bound


def test_triton_kernel_is_available() -> None:
    assert kernels.available()["triton"] == []


@pytest.mark.parametrize("precision", BOUNDS)
def test_compiled_model(precision: str) -> None:
    net, x = model(), inputs()
    expected = net(x)
    options = {"sage.kernel": "triton", "sage.precision": precision}
    compiled = torch.compile(net, backend="sage_inductor", options=options, fullgraph=True)
    assert close(compiled(x), expected)
    report = explain(net, x, config=Config(kernel="triton"))
    assert [site.kernel for site in report.sites] == ["triton", "triton"]


def test_fused_qkv_is_read_in_place_and_not_modified() -> None:
    qkv = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    before = qkv.clone()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for kernel, precision in (("triton", "fast"), ("triton", "balanced"), ("triton", "accurate")):
        sage_attention(q, k, v, kernel=kernel, precision=precision)
    assert torch.equal(qkv, before)


def test_reduce_overhead_replays_with_new_data() -> None:
    net = model()
    options = {"sage.kernel": "triton", "mode": "reduce-overhead"}
    compiled = torch.compile(net, backend="sage_inductor", options=options)
    for seed in range(6):
        torch.manual_seed(seed)
        x = inputs(seq=512)
        torch.compiler.cudagraph_mark_step_begin()
        assert close(compiled(x).clone(), net(x))


def test_cuda_graph_capture_of_the_operator() -> None:
    q, k, v = (torch.randn(1, 8, 777, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ops.attention(q, k, v, kernel_name="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, k, v, kernel_name="triton")
    for _ in range(3):
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        out.zero_()
        graph.replay()
        assert torch.equal(out, ops.attention(q, k, v, kernel_name="triton"))
        assert relative_l2(out, F.scaled_dot_product_attention(q, k, v)) <= BOUNDS["fast"]


def test_side_stream() -> None:
    q, k, v = (torch.randn(1, 8, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = ops.attention(q, k, v, kernel_name="triton")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # work on the default stream would overtake this
        late = q * 1
        out = ops.attention(late, k, v, kernel_name="triton")
    stream.synchronize()
    assert torch.equal(out, expected)


def test_dynamic_lengths_compile_once() -> None:
    from torch._dynamo.utils import counters

    net = model()
    compiled = torch.compile(net, backend="sage_inductor", options={"sage.kernel": "triton"}, dynamic=True)
    for seq in (100, 513, 1024, 1999):
        x = inputs(seq=seq)
        assert close(compiled(x), net(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast() -> None:
    net = copy.deepcopy(model()).float()
    x = inputs().float()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = net(x)
        compiled = torch.compile(net, backend="sage_inductor", options={"sage.kernel": "triton"})
        assert close(compiled(x), expected)


def test_output_strides_follow_sdpa(new_process: Callable[[], None]) -> None:
    for make in (
        lambda: torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16),
        lambda: torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2),
        lambda: torch.randn(300, 2, 4, 64, device="cuda", dtype=torch.bfloat16).permute(1, 2, 0, 3),
    ):
        q, k, v = make(), make(), make()
        new_process()
        compiled = torch.compile(
            F.scaled_dot_product_attention, backend="sage_inductor", options={"sage.kernel": "triton"}
        )
        out = compiled(q, k, v)
        assert out.stride() == F.scaled_dot_product_attention(q, k, v).stride()
        assert relative_l2(out, F.scaled_dot_product_attention(q, k, v)) <= BOUNDS["fast"]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_agrees_with_the_oracle(precision: str, head_dim: int, is_causal: bool) -> None:
    """The oracle computes the same quantised numbers, but for ties: x * (127 / max) and x / (max / 127) may round
    an integer differently, which moves a score by up to max|q| max|k| / 127 / sqrt(head_dim), about .016 here."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1100, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = ops.attention_lse(q, k, v, None, is_causal, kernel_name="triton", precision=precision)
    oracle, oracle_lse = ops.attention_lse(
        q, k, v, None, is_causal, kernel_name="reference", precision=precision
    )
    assert relative_l2(out, oracle) < 0.006
    # What one P rounded the other way, and one moved score, can do to an output: the largest weight, by the step of
    # P relative to it, by the largest V.
    scores = (q.float() @ k.float().mT) * head_dim**-0.5
    if is_causal:  # early rows have weights near 1, which both kernels round alike: a key or two decides
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    weight = scores.softmax(-1).amax(-1, keepdim=True)
    step = {"fast": 1 / 8, "balanced": 1 / 127, "accurate": 1 / 256}[precision] + 0.016
    bound = weight * step * v.float().abs().max()
    assert bool(((out.float() - oracle.float()).abs() <= 2 * bound + 1e-3).all())
    assert (lse - oracle_lse).abs().max() < 0.016
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal)
    assert relative_l2(out, exact) <= BOUNDS[precision]


def test_backends_write_the_buffer() -> None:
    q, k, v = (torch.randn(2, 500, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    impl = backends.SageAttentionImpl(8, 64, causal=False, softmax_scale=0.125)
    buffer = torch.empty_like(q)
    assert impl.forward(q, k, v, None, output=buffer) is buffer
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert relative_l2(buffer, expected) <= BOUNDS["fast"]


def test_auto_never_picks_a_slower_kernel_for_decode_or_tiny_inputs() -> None:
    q = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    (site,) = explain(F.scaled_dot_product_attention, q, k, k).sites
    assert not site.rewritten
    (site,) = explain(
        F.scaled_dot_product_attention, q[:, :, :1].expand(-1, -1, 64, -1), k[:, :, :64], k[:, :, :64]
    ).sites
    assert not site.rewritten and any("SDPA" in text for text in site.reasons)


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_second_gpu() -> None:
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda:1", dtype=torch.bfloat16) for _ in range(3))
    out = ops.attention(q, k, v, kernel_name="triton")
    assert torch.cuda.current_device() == 0
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, v)) <= BOUNDS["fast"]
