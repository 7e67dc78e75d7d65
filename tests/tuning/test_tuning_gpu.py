"""The choice by measurement on a GPU: real times, memory, streams, CUDA graphs, symbolic lengths."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config, explain, kernels
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.testing import RewritingBackend, relative_l2
from sage_inductor.tuning import Comparison, SdpaCall, choice, choose, measure
from sage_inductor.tuning.machine import machine, machines

pytestmark = pytest.mark.gpu

FLOPS_AT_MOST = 5e15  # per second, of the fastest GPU there is, in 8 bits


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache_dir=str(tmp_path))


def compare(seq: int, heads: int = 16, head_dim: int = 128, batch: int = 1, **params: Any) -> Comparison:
    device = torch.device("cuda", 0)
    stride = (seq * heads * head_dim, head_dim, heads * head_dim, 1)
    spec = TensorSpec((batch, heads, seq, head_dim), stride, torch.bfloat16, device)
    problem = AttentionProblem(spec, spec, spec, None, AttentionParams(**params))
    return Comparison(problem, SdpaCall(spec, spec, spec, None, params.get("is_causal", False), None, False))


def nhd(seq: int, heads: int = 16, head_dim: int = 128) -> Tensor:
    return torch.randn(1, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def test_the_machine_is_known() -> None:
    here = machine(torch.device("cuda", 0))
    assert torch.cuda.get_device_name(0) in here.device and " SMs" in here.device
    assert "CUDA" in here.driver and here.triton != "none" and here in machines()


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_times_are_those_of_the_work(precision: str) -> None:
    """No GPU does the arithmetic in less: a neighbour on it makes times longer, so that this holds whoever shares it. A
    clock that sees the launch alone gives a hundredth of a millisecond."""
    heads, seq, head_dim = 16, 16384, 128
    least_ms = 4 * heads * seq**2 * head_dim / FLOPS_AT_MOST * 1e3
    result = measure.measure(compare(seq, heads, head_dim, precision=precision), ["triton"])
    assert not result.failed
    assert result.sdpa_ms > least_ms and result.kernels["triton"].ms > least_ms
    assert result.kernels["triton"].noise >= 0


def test_measuring_leaves_nothing_behind() -> None:
    torch.cuda.manual_seed(3)
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.autocast("cuda"):
        measure.measure(compare(1024), ["triton"])
        assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("seq", [256, 4096, 16384])
def test_the_choice_holds_when_it_is_measured_again(seq: int, config: Config) -> None:
    comparison = compare(seq)
    chosen = choose(comparison, config)
    if chosen.kernel is not None:
        again = measure.measure(comparison, [chosen.kernel])
        assert again.kernels[chosen.kernel].ratio < 1.03
    else:
        assert "measured" in chosen.reasons[0]


def test_a_warm_cache_uses_no_gpu(
    config: Config, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    first = choose(compare(2048), config)
    new_process()
    monkeypatch.setattr(measure, "measure", lambda *args: pytest.fail("measured"))
    peak = torch.cuda.max_memory_allocated()
    assert choose(compare(2048), config) == first
    assert torch.cuda.max_memory_allocated() == peak


def test_nothing_is_measured_under_capture(config: Config) -> None:
    tensor = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor += 1
        chosen = choose(compare(512), config)
    assert chosen.kernel is None and "a CUDA graph is being captured" in chosen.reasons[-1]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """256 MiB for this process, whatever other processes take and free on the same GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # what this process has reserved already it could use again
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**28 / total, 0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_without_memory_the_table_decides(
    config: Config, little_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = choose(compare(65536, heads=32), config)  # a query of 512 MiB
    assert chosen.speedup is None  # whatever the table says
    assert "tune=measure: out of memory: " in caplog.text
    assert list(Path(str(config.cache_dir)).iterdir()) == []


def test_a_problem_larger_than_the_gpu_is_not_begun() -> None:
    """Seen without an allocation: more than any GPU has."""
    comparison = compare(2**22, heads=64)  # 64 GiB for each of query, key and value
    with pytest.raises(measure.CannotMeasure, match=r"out of memory: 480.0 GiB needed, \S+ GiB free"):
        measure.measure(comparison, ["triton"])


def test_out_of_memory_while_measuring(config: Config) -> None:
    """SDPA's own workspace is not known beforehand: without a fused kernel for it, this one writes out 64 GiB of
    scores or more."""
    comparison = compare(2**17, heads=8, head_dim=257)
    problem = compare(2**17, heads=8, head_dim=64).problem
    with pytest.raises(measure.CannotMeasure, match="out of memory"):
        measure.measure(Comparison(problem, comparison.sdpa), ["triton"])


def test_compiled_sites_carry_their_speedup(config: Config) -> None:
    q = nhd(16384)
    (site,) = explain(F.scaled_dot_product_attention, q, q, q, config=config).sites
    assert site.speedup is not None
    assert site.rewritten == (site.speedup > 1.02) or "wins from" in site.reasons[0]


def test_symbolic_lengths_are_dispatched_without_recompiling(config: Config) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    inputs = nhd(16384), nhd(16384), nhd(16384)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 2)
    backend = RewritingBackend(config)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    compiled(*inputs)
    (site,) = backend.sites
    if not site.rewritten:
        pytest.skip("no kernel beats SDPA here at 16384 to 65536 tokens")
    (node,) = [node for node in backend.graphs[0].graph.nodes if "attention" in str(node.target)]
    least = node.kwargs["min_kv_len"]
    assert least == node.kwargs["min_q_len"] >= choice.SHORTEST
    with torch.compiler.set_stance("fail_on_recompile"):
        for seq in (least // 2, least - 1, least, 20000):
            q, k, v = nhd(seq), nhd(seq), nhd(seq)
            error = relative_l2(compiled(q, k, v), attend(q, k, v))
            assert error == 0 if seq < least else 1e-3 < error < 0.045, (seq, error)


def test_cuda_graph_modes_work_with_it(config: Config) -> None:
    options = {"sage.cache_dir": config.cache_dir, "mode": "reduce-overhead"}
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 2, backend="sage_inductor", options=options
    )
    for _ in range(4):
        inputs = nhd(8192), nhd(8192), nhd(8192)
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_l2(compiled(*inputs).clone(), F.scaled_dot_product_attention(*inputs) * 2) < 0.045
