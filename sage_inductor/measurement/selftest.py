"""The self-test of a kernel on this machine: small problems, held against the oracle and float64.

A kernel may return zeros, ignore the mask or work on another stream than the current one, and still look plausible in a
benchmark. Here it fails by name. `python -m sage_inductor doctor` prints what `check` finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams, AttentionProblem, Kernel, Segments, TensorSpec
from sage_inductor.kernels.base import reason
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.measurement.ground_truth import (
    DOCUMENTED,
    EPS,
    LARGEST_STEP,
    LSE_TOLERANCE,
    float64_attention,
)
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.measurement.progress import ProgressCallback
from sage_inductor.torch_internals.sdpa import keep_gpu_busy

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the GPU work of a call, and returns a function that repeats that work on the same memory. It need not run the
call itself."""

NORMAL = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One small problem. `mask` is a kind of mask, `layout` the order of all tensors in memory. With `outliers` four channels of K
    are 20 times as large as the others, those of Q a quarter. It runs in each precision of a
    kernel if `every_precision` is true, else in the first one only."""

    name: str
    q_len: int = 130
    kv_len: int = 200
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 2
    is_causal: bool = False
    mask: Literal["none", "key padding", "bool", "additive"] = "none"
    segments: bool = False
    layout: Literal["HND", "NHD"] = "HND"
    k_bias: float = 0.0
    outliers: bool = False
    smoothing: str = "mean"
    lse: bool = False
    when: Literal["eager", "captured", "side stream"] = "eager"
    every_precision: bool = True


# The lengths fill no tile, so that faults with padded keys and queries show; with two batches, faults with strides do. On a
# GPU each combination of precision, head_dim, kind of mask and LSE is a variant that takes seconds to compile. Each precision
# has three of them; the other cases, which have nothing to do with how P and V are quantised, run in one precision.
CASES = (
    Case("whole tiles", q_len=128, kv_len=256),
    Case("ragged lengths"),
    Case("causal, head_dim 128", q_len=200, head_dim=128, is_causal=True),
    Case("key-padding mask", mask="key padding"),
    Case("bool mask", mask="bool", every_precision=False),
    Case("additive mask", mask="additive", every_precision=False),
    Case("segments", segments=True, every_precision=False),
    Case("grouped heads", heads=4),
    Case("NHD strides", layout="NHD"),
    Case("biased keys", k_bias=4.0),
    Case("outliers in channels", outliers=True, smoothing="both", every_precision=False),
    Case("log-sum-exp", lse=True, every_precision=False),
    Case("side stream", q_len=1024, kv_len=1024, when="side stream"),
    Case("CUDA graph capture", when="captured"),  # last: a capture that fails can leave CUDA in a bad state
)


@dataclass(frozen=True)
class Finding:
    """The result of one case.

    `rel_l2` and `oracle_l2` are relative L2 errors against float64 and against the oracle, `bound` is the largest allowed
    `rel_l2`. All three are None where nothing was run. `problems` says why the case failed, or was skipped.
    """

    kernel: str
    precision: str
    case: str
    status: Literal["passed", "failed", "skipped"]
    problems: tuple[str, ...] = ()
    rel_l2: float | None = None
    oracle_l2: float | None = None
    bound: float | None = None


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None

    @property
    def segments(self) -> Segments | None:
        if self.query_segments is None or self.key_segments is None:
            return None
        return Segments(self.query_segments, self.key_segments)

    def fill(self, new: Inputs) -> None:
        """Write new data to the same memory, as a replayed graph reads it there."""
        for tensor, data in self._beside(new):
            tensor.copy_(data)

    def equals(self, other: Inputs) -> bool:
        return all(torch.equal(tensor, data) for tensor, data in self._beside(other))

    def _beside(self, other: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, data in zip(self, other, strict=True):
            if tensor is not None and data is not None:
                yield tensor, data


def check(
    kernel: Kernel,
    device: torch.device | str,
    precisions: Sequence[str] | None = None,
    capture: Capture | None = None,
    progress: ProgressCallback | None = None,
) -> list[Finding]:
    """Run the cases in every precision of `kernel` on `device`, or in `precisions` only.

    A kernel that is not available there gives one skipped finding for each precision, with the reasons. `capture` records
    and replays GPU work; by default it is a CUDA graph on a CUDA device. `progress` is called as (done, total, what is
    next) before each case, and after the last.
    """
    device = torch.device(device)
    if capture is None and device.type == "cuda":
        capture = cuda_graph
    precisions = tuple(kernel.precisions if precisions is None else precisions)
    unavailable = tuple(kernel.unavailable_reasons(device))
    if unavailable:
        return [Finding(kernel.name, precision, "all", "skipped", unavailable) for precision in precisions]
    tasks = [
        (precision, case)
        for precision in precisions
        for case in CASES
        if case.every_precision or precision == precisions[0]
    ]
    findings = []
    with _on(device), torch.no_grad():
        for done, (precision, case) in enumerate(tasks):
            if progress is not None:
                progress(done, len(tasks), f"{kernel.name} {precision}: {case.name}")
            findings.append(_examine(kernel, precision, case, device, capture))
    if progress is not None:
        progress(len(tasks), len(tasks), kernel.name)
    return findings


def _examine(
    kernel: Kernel, precision: str, case: Case, device: torch.device, capture: Capture | None
) -> Finding:
    finding = Finding(kernel.name, precision, case.name, "skipped")
    emulated = case.when == "captured" and capture is not None
    if case.when != "eager" and device.type != "cuda" and not emulated:
        return dataclasses.replace(finding, problems=(reason("device", device.type, "cuda"),))
    inputs, new = draw(case, device, seed=0), draw(case, device, seed=1)
    params = AttentionParams(is_causal=case.is_causal, precision=precision, smoothing=case.smoothing)
    unsupported = kernel.not_supported_reasons(_problem(inputs, params, case.lse))
    if unsupported:
        return dataclasses.replace(finding, problems=tuple(unsupported))
    out, lse = torch.empty_like(inputs.query), None
    if case.lse:
        lse = torch.empty(inputs.query.shape[:3], dtype=torch.float32, device=device)

    def run() -> None:
        segments = () if inputs.segments is None else (inputs.segments,)
        kernel.run(*inputs[:4], params, out, lse, *segments)

    _erase(out, lse)
    try:
        if case.when == "captured" and capture is not None:
            replay = capture(run)
            inputs.fill(new)
            _erase(out, lse)
            replay()
        elif case.when == "side stream":
            _run_behind_other_work(run, inputs, new)
        else:
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except NotEligibleError as error:  # a limit that the kernel states by itself
        return dataclasses.replace(finding, problems=error.reasons)
    except Exception as error:  # whatever a broken build does
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return dataclasses.replace(finding, status="failed", problems=(f"raises {text}",))
    # Drawn again, because the kernel may have written to its inputs.
    given = draw(case, device, seed=0 if case.when == "eager" else 1)
    judged = _judge(finding, kernel, given, params, out, lse)
    if inputs.equals(given):
        return judged
    return dataclasses.replace(
        judged, status="failed", problems=("the inputs were modified", *judged.problems)
    )


def _judge(
    finding: Finding, kernel: Kernel, inputs: Inputs, params: AttentionParams, out: Tensor, lse: Tensor | None
) -> Finding:
    """`finding` with the errors of output and LSE, and passed or failed by their bounds."""
    query, key, value, attn_mask = inputs[:4]
    problems = []
    exact, exact_lse = float64_attention(query, key, value, attn_mask, params, segments=inputs.segments)
    oracle, _ = reference.attention(
        query, key, value, attn_mask,
        bounds=params.bounds(query.shape[2], key.shape[2]), precision=params.precision, smoothing=params.smoothing,
        segments=inputs.segments,
    )  # fmt: skip
    documented, eps = DOCUMENTED[params.precision], EPS[query.dtype]
    bound, oracle_bound = documented + eps, kernel.oracle_distance * documented + eps
    rel_l2, oracle_l2 = relative_l2(out, exact), relative_l2(out, oracle)
    unwritten = int(out.isnan().sum())
    if unwritten:
        problems.append(f"{unwritten} of {out.numel()} output elements are NaN or were not written")
    elif int(out.count_nonzero()) == 0:
        problems.append("the output is all zeros")
    else:
        if not rel_l2 <= bound:
            problems.append(f"error against float64={rel_l2:.3f} (supported: up to {bound:.3f})")
        if not oracle_l2 <= oracle_bound:
            problems.append(f"distance from the oracle={oracle_l2:.3f} (supported: up to {oracle_bound:.3f})")
        largest, step = float((out.double() - oracle.double()).abs().max()), LARGEST_STEP + eps
        allowed = kernel.oracle_distance * step * float(value.abs().max())
        if largest > allowed:
            problems.append(
                f"largest distance from the oracle={largest:.3f} (supported: up to {allowed:.3f})"
            )
    if lse is not None:
        distance = float((lse - exact_lse).abs().max())
        if not distance <= LSE_TOLERANCE:
            problems.append(f"error of the log-sum-exp={distance:.3f} (supported: up to {LSE_TOLERANCE})")
    return dataclasses.replace(
        finding,
        status="failed" if problems else "passed",
        problems=tuple(problems),
        rel_l2=rel_l2,
        oracle_l2=oracle_l2,
        bound=bound,
    )


def draw(case: Case, device: torch.device, seed: int) -> Inputs:
    """The inputs of a case: two batches of standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def make(heads: int, length: int, bias: Tensor | float = 0.0) -> Tensor:
        if case.layout == "NHD":
            data = (randn(2, length, heads, case.head_dim) + bias).to(device, NORMAL)
            return data.transpose(1, 2)
        return (randn(2, heads, length, case.head_dim) + bias).to(device, NORMAL)

    standing_out = torch.ones(case.head_dim, device=device, dtype=NORMAL)
    standing_out[:4] = 20.0 if case.outliers else 1.0
    query = make(case.heads, case.q_len)
    key = make(case.kv_heads, case.kv_len, case.k_bias * randn(case.head_dim))
    if case.outliers:
        query, key = query / standing_out.sqrt(), key * standing_out
    value = make(case.kv_heads, case.kv_len)
    mask: Tensor | None = None
    if case.mask == "key padding":
        lengths = torch.tensor([case.kv_len - 60, case.kv_len // 3])
        mask = (torch.arange(case.kv_len) < lengths[:, None])[:, None, None]
    elif case.mask != "none":
        mask = torch.rand(2, case.heads, case.q_len, case.kv_len, generator=generator) > 0.4
    if mask is not None and case.mask == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -math.inf).to(NORMAL)
    # Segments whose keys lie in several pieces, others in each batch, and some that have no query.
    ids = [
        (torch.arange(length) // 40 + torch.tensor([[0], [1]])).remainder(3).int().to(device)
        for length in (case.q_len, case.kv_len)
        if case.segments
    ]
    return Inputs(query, key, value, None if mask is None else mask.to(device), *ids)


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """The replay of `run` as a CUDA graph. `run` is called once before, to compile, and captured on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context restores the current stream, which the inner one does not when the capture fails.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            run()
    except Exception:
        # A failed capture leaves the random generator in capture mode until a good capture ends.
        good = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream)
        with contextlib.suppress(Exception), torch.cuda.stream(stream), good:
            torch.zeros(1, device="cuda")
        raise
    torch.cuda.synchronize()  # for work that went to another stream: it must not write after this
    return graph.replay


def _run_behind_other_work(run: Callable[[], None], inputs: Inputs, late: Inputs) -> None:
    """Call `run` on a side stream that fills its inputs late. A kernel that works on another stream reads the old ones."""
    run()  # compiles: done later, that would give the side stream time to finish
    device = inputs.query.device
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        keep_gpu_busy(20_000_000)  # about 10 ms
        inputs.fill(late)
        run()
    stream.synchronize()


def _problem(inputs: Inputs, params: AttentionParams, return_lse: bool) -> AttentionProblem:
    query, key, value, mask, *ids = (None if tensor is None else TensorSpec.of(tensor) for tensor in inputs)
    assert query is not None and key is not None and value is not None
    return AttentionProblem(query, key, value, mask, params, return_lse, *ids)


def _erase(out: Tensor, lse: Tensor | None) -> None:
    """Fill with NaN, so that elements that are not written show."""
    out.fill_(math.nan)
    if lse is not None:
        lse.fill_(math.nan)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
