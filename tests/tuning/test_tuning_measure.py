"""The measurement itself, of real times: on a CPU here, by the same code on a GPU in test_tuning_gpu.py."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sage_inductor import Config, kernels
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.measurement import timers as timing
from sage_inductor.testing import RewritingBackend
from sage_inductor.tuning import Comparison, SdpaCall, measure
from sage_inductor.tuning.measure import CannotMeasure

REFERENCE = type(kernels.get("reference"))


def of(
    query: Tensor, key: Tensor, mask: Tensor | None = None, own_mask: Tensor | None = None, **params: Any
) -> Comparison:
    """Self-contained: kernels read `own_mask`, SDPA reads `mask`."""
    q, k = TensorSpec.of(query), TensorSpec.of(key)
    read = None if own_mask is None else TensorSpec.of(own_mask).as_4d()
    sdpa_mask = None if mask is None else TensorSpec.of(mask)
    problem = AttentionProblem(q, k, k, read, AttentionParams(**params))
    is_causal = params.get("is_causal", False) and mask is None
    gqa = query.shape[1] != key.shape[1]
    return Comparison(problem, SdpaCall(q, k, k, sdpa_mask, is_causal, None, gqa))


def nhd(seq: int = 48, heads: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, seq, heads, 32, dtype=dtype).transpose(1, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_UP_MS", 1.0)
    monkeypatch.setattr(measure, "ROUNDS_MS", 5.0)


BOOL = torch.ones(2, 1, 48, 48, dtype=torch.bool)


@pytest.mark.parametrize(
    "comparison",
    [
        of(nhd(), nhd()),
        of(nhd(), nhd(heads=1)),
        of(nhd(), nhd(), is_causal=True),
        of(nhd(), nhd(), BOOL.tril(), is_causal=True),  # SDPA reads the mask that was found to be causal
        of(nhd(), nhd(), BOOL, BOOL),
        of(nhd(), nhd(), BOOL[:, :, :1].expand(-1, -1, 48, -1), BOOL[:, :, :1]),
        of(nhd(), nhd(), torch.zeros(48, 48), torch.zeros(48, 48)),
        of(nhd(dtype=torch.bfloat16), nhd(dtype=torch.bfloat16), precision="accurate"),
        of(nhd(), nhd(80), window_left=8, window_right=8),
    ],
    ids=["plain", "gqa", "causal", "causal mask", "bool", "expanded", "bias", "bfloat16", "window"],
)
def test_reference_against_sdpa_on_the_cpu(comparison: Comparison) -> None:
    result = measure.measure(comparison, ["reference"])
    assert (result.q_len, result.kv_len) == comparison.lengths and not result.failed
    timing = result.kernels["reference"]
    # Quantising in eager PyTorch is dozens of operations; SDPA is one.
    assert timing.ratio > 1 and timing.ms > result.sdpa_ms > 0 and timing.noise >= 0


def test_kernels_and_sdpa_read_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides as at the site, no row without a key, and normal numbers."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    sdpa = F.scaled_dot_product_attention

    def spy_sdpa(*args: Any, **kwargs: Any) -> Tensor:
        seen["sdpa"] = args
        return sdpa(*args, **kwargs)

    def spy_run(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: Any) -> None:
        seen["kernel"] = query, key, value, mask

    monkeypatch.setattr(measure, "builtin_sdpa", spy_sdpa)
    monkeypatch.setattr(REFERENCE, "run", spy_run)
    query, mask = nhd(), torch.ones(2, 1, 1, 48, dtype=torch.bool).expand(2, 2, 48, 48)
    measure.measure(of(query, query, mask, mask), ["reference"])
    for own, other in zip(seen["kernel"], seen["sdpa"], strict=True):
        assert own.stride() == other.stride() and torch.equal(own, other)
    q, k, v, read = seen["kernel"]
    assert q.stride() == query.stride() and not torch.equal(q, k) and not torch.equal(k, v)
    assert abs(float(q.mean())) < 0.1 and abs(float(q.std()) - 1) < 0.1
    assert bool(read.any(-1).all()) and not bool(read.all()) and read.stride() == mask.stride()


def test_nothing_is_left_behind() -> None:
    comparison, state = of(nhd(), nhd()), torch.get_rng_state()
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        measure.measure(comparison, ["reference"])
        assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_no_mode_around_sees_it() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was seen")

    comparison = of(nhd(), nhd())
    with FakeTensorMode():
        assert measure.measure(comparison, ["reference"]).sdpa_ms > 0
    with Recorder(), torch.device("meta"):
        assert measure.measure(comparison, ["reference"]).sdpa_ms > 0


def test_a_failing_kernel_and_a_failing_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError("no luck\nat all")

    comparison = of(nhd(), nhd())
    monkeypatch.setattr(REFERENCE, "run", fails)
    result = measure.measure(comparison, ["reference"])
    assert result.failed == {"reference": "ZeroDivisionError: no luck"} and not result.kernels
    monkeypatch.undo()
    misfit = replace(comparison.sdpa, key=TensorSpec.of(torch.empty(2, 2, 48, 31)))
    with pytest.raises(CannotMeasure, match="SDPA does not take the inputs"):
        measure.measure(replace(comparison, sdpa=misfit), ["reference"])


@pytest.mark.parametrize("culprit", ["kernel", "inputs"])
def test_out_of_memory(culprit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    if culprit == "kernel":
        monkeypatch.setattr(REFERENCE, "run", out_of_memory)
    else:
        monkeypatch.setattr(measure, "_buffer", out_of_memory)
    with pytest.raises(CannotMeasure, match="^out of memory: CUDA out of memory. Tried to allocate 9 GiB.$"):
        measure.measure(of(nhd(), nhd()), ["reference"])
    # The compile goes on, by the table.
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("reference",))
    monkeypatch.setattr(REFERENCE, "not_chosen_reasons", lambda self, problem: ["slow"])
    backend = RewritingBackend(Config(cache_dir=str(tmp_path)))
    with torch.no_grad():
        torch.compile(F.scaled_dot_product_attention, backend=backend)(nhd(), nhd(), nhd())
    (site,) = backend.sites
    assert site.reasons[0] == "reference: slow" and "out of memory" in site.reasons[1]
    assert list(tmp_path.iterdir()) == []


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    cuda = torch.device("cuda", 0)
    tensor = TensorSpec((1, 8, 2**17, 64), (2**26, 2**23, 64, 1), torch.bfloat16, cuda)  # 128 MiB
    mask = TensorSpec((1, 1, 2**17, 2**17), (2**34, 2**34, 2**17, 1), torch.bool, cuda)  # 16 GiB
    problem = AttentionProblem(tensor, tensor, tensor, None, AttentionParams(is_causal=True))
    comparison = Comparison(problem, SdpaCall(tensor, tensor, tensor, mask, False, None, False))
    free = 60 * gib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * gib)
    measure._check_memory(comparison)
    free = 30 * gib
    with pytest.raises(CannotMeasure, match="out of memory: 40.9 GiB needed, 32.0 GiB free"):
        measure._check_memory(comparison)


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order: an L2 cache without the inputs, a GPU kept busy, and the call between two events."""
    steps: list[str] = []
    gpu_ms = 5.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            steps.append("record")

        def synchronize(self) -> None:
            steps.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return gpu_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(timing, "keep_gpu_busy", lambda cycles: steps.append("busy"))
    clock = measure._CudaClock(torch.device("cpu"))
    clock.flush.fill_(1)
    assert clock(lambda: steps.append("call")) == 5.0
    assert steps == ["busy", "record", "call", "record", "synchronize"]
    assert clock.flush.numel() == 128 and not bool(clock.flush.any())
    gpu_ms = 0.001
    assert clock(lambda: time.sleep(0.003)) > 2.9  # the host takes longer to queue it than the GPU to do it


def test_calls_take_turns() -> None:
    order: list[str] = []
    ticks = {"a": 1.0, "b": 3.0}

    def clock(call: Any) -> float:
        call()
        return ticks[order[-1]]

    times = measure.interleaved({name: lambda name=name: order.append(name) for name in ticks}, clock)  # type: ignore[misc]
    assert order[:2] == ["a", "b"]  # the warm-up, which is not counted
    assert order[2:8] == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0] * measure.ROUNDS[0], "b": [3.0] * measure.ROUNDS[0]}


def test_the_noise_is_that_of_the_median() -> None:
    """Half the 95% interval of the median of normal samples is 1.96 * 1.2533 / sqrt(n) of their deviation (2.46); the
    notch, made to compare two medians, is 1.57 * 1.349 (2.12)."""
    generator = torch.Generator().manual_seed(0)
    noises = []
    for _ in range(300):
        samples = (1 + 0.05 * torch.randn(40, generator=generator, dtype=torch.float64)).tolist()
        timing = measure._against(samples, [1.0] * 40)
        assert abs(timing.ratio - 1) < 0.05
        noises.append(timing.noise)
    assert sum(noises) / 300 == pytest.approx(2.12 * 0.05 / 40**0.5, rel=0.05)
