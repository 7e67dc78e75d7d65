"""The self-test passes what is right and names each planted fault."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sage_inductor import kernels
from sage_inductor.errors import NotEligibleError
from sage_inductor.kernels import AttentionParams
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.kernels.reference.kernel import ReferenceKernel
from sage_inductor.measurement.ground_truth import DOCUMENTED
from sage_inductor.measurement.selftest import CASES, Finding, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Recorder(TorchDispatchMode):
    """A capture for the CPU: keeps every operation, and repeats them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            if func.is_view or func._schema.is_mutable:
                continue
            several = isinstance(result, (tuple, list))
            for old, new in zip(result, again, strict=True) if several else [(result, again)]:
                if isinstance(old, Tensor):
                    old.copy_(new)


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    with Recorder() as recorder:
        run()
    return recorder.replay


class Zeros(ReferenceKernel):
    name = "zeros"

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, params: Any, out: Tensor, *rest: Any
    ) -> None:
        out.zero_()


class IgnoresMask(ReferenceKernel):
    name = "ignores mask"

    def run(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *rest: Any) -> None:
        super().run(query, key, value, None, *rest)


class IgnoresCausal(ReferenceKernel):
    name = "ignores causal"

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, params: AttentionParams, *rest: Any
    ) -> None:
        super().run(query, key, value, attn_mask, dataclasses.replace(params, is_causal=False), *rest)


class IgnoresSegments(ReferenceKernel):
    name = "ignores segments"

    def run(self, *args: Any) -> None:
        super().run(*args[:7])


class WrongStream(ReferenceKernel):
    """Its work is done, but nobody who captures the current stream sees it."""

    name = "wrong stream"

    def run(self, *args: Any) -> None:
        with _disable_current_modes():
            super().run(*args)


class SmoothsInPlace(ReferenceKernel):
    name = "smooths K in place"

    def run(self, query: Tensor, key: Tensor, *rest: Any) -> None:
        super().run(query, key, *rest)
        key -= key.mean(2, keepdim=True)


class LeavesTheLastTile(ReferenceKernel):
    name = "leaves the last tile"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        params: Any,
        out: Tensor,
        lse: Any,
        *ids: Any,
    ) -> None:
        whole = out.shape[2] // 128 * 128
        part = torch.empty_like(out[:, :, :whole])
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])[:, :, :whole]
        lse = None if lse is None else lse[:, :, :whole]
        ids = tuple(item._replace(query=item.query[:, :whole]) for item in ids)
        super().run(query[:, :, :whole], key, value, mask, params, part, lse, *ids)
        out[:, :, :whole] = part


class AttendsToPadding(ReferenceKernel):
    """What sageattention 1.0.6 does: padded keys take part with a score of 0 after smoothing."""

    name = "attends to padding"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        params: Any,
        out: Tensor,
        lse: Any,
        *ids: Any,
    ) -> None:
        if mask is None and not ids and not params.is_causal:
            pad = (0, 0, 0, -key.shape[2] % 64)
            mean = key.mean(2, keepdim=True)
            key, value = (torch.nn.functional.pad(tensor, pad) for tensor in (key - mean, value))
        super().run(query, key, value, mask, params, out, lse, *ids)


class ForgetsTheMeanInLSE(ReferenceKernel):
    name = "forgets the mean in LSE"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        params: Any,
        out: Tensor,
        lse: Any,
        *ids: Any,
    ) -> None:
        super().run(query, key, value, mask, params, out, lse, *ids)
        if lse is not None:
            mean = reference.quantize_kv(key, value, "fast").smoothing.mean
            lse -= (query.float() @ mean.repeat_interleave(query.shape[1] // key.shape[1], 1).mT)[..., 0] / 8


class Crashes(ReferenceKernel):
    name = "crashes"

    def run(self, *args: Any) -> None:
        raise ImportError("undefined symbol: _ZN3c104cuda")


class RefusesCapture(ReferenceKernel):
    name = "refuses capture"

    def run(self, *args: Any) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotEligibleError("kernel=refuses", ["CUDA graph capture (supported: none)"])
        super().run(*args)


def failures(kernel: type[ReferenceKernel], precision: str = "accurate") -> dict[str, tuple[str, ...]]:
    """case -> problems, on the CPU with an emulated capture."""
    found = check(kernel(), "cpu", [precision], capture=recorded)
    assert [finding.case for finding in found] == [case.name for case in CASES]
    return {finding.case: finding.problems for finding in found if finding.status == "failed"}


@pytest.mark.parametrize("precision", DOCUMENTED)
def test_the_oracle_passes(precision: str) -> None:
    found = check(ReferenceKernel(), "cpu", [precision], capture=recorded)
    skipped = {finding.case: finding.problems for finding in found if finding.status != "passed"}
    assert skipped == {"side stream": ("device=cpu (supported: cuda)",)}
    # The inputs are such that a kernel as inaccurate as documented passes, but none much worse.
    for finding in found:
        if finding.status == "passed" and finding.rel_l2 is not None:
            # The documented error is that of normal inputs; others are held to the bound that includes their dtype's.
            is_normal = finding.case != "outliers in channels"
            most = DOCUMENTED[precision] if is_normal else finding.bound
            assert most is not None and DOCUMENTED[precision] / 2 < finding.rel_l2 <= most


@pytest.mark.parametrize("name", [name for name in kernels.KERNELS if name != "reference"])
def test_every_kernel_that_can_run_passes(name: str) -> None:
    kernel = kernels.get(name)
    if reasons := kernel.unavailable_reasons(torch.device(DEVICE)):
        pytest.skip("; ".join(reasons))
    # The interpreter takes ten seconds for each precision.
    precisions = None if DEVICE == "cuda" else ["accurate"]
    found = check(kernel, DEVICE, precisions)
    assert [finding for finding in found if finding.status == "failed"] == []
    assert sum(finding.status == "passed" for finding in found) >= 5


@pytest.mark.parametrize(
    ("kernel", "cases"),
    [
        (Zeros, {"whole tiles", "ragged lengths", "CUDA graph capture"}),
        (IgnoresMask, {"key-padding mask"}),
        (IgnoresCausal, {"causal, head_dim 128"}),
        (WrongStream, {"CUDA graph capture"}),
        (LeavesTheLastTile, {"ragged lengths", "grouped heads", "NHD strides"}),
    ],
)
def test_faults_of_one_precision_are_found(kernel: type[ReferenceKernel], cases: set[str]) -> None:
    """Be it the last, in which the fewest cases run."""

    class InTheLast(kernel):  # type: ignore[misc, valid-type]
        def run(self, *args: Any) -> None:
            (super() if args[4].precision == "accurate" else kernels.get("reference")).run(*args)

    precisions = ("fast", "accurate")
    found = [f for f in check(InTheLast(), "cpu", precisions, recorded) if f.status == "failed"]
    assert {finding.precision for finding in found} == {"accurate"}
    assert {finding.case for finding in found} >= cases


def test_few_forms_of_a_kernel_are_compiled() -> None:
    """What the kernels are specialised on: of the 24 that all cases have in all precisions, 13."""
    forms = set()

    class Compiled(ReferenceKernel):
        name = "compiled"

        def run(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Any,
            params: Any,
            out: Any,
            lse: Any,
            *ids: Any,
        ) -> None:
            kind = None if mask is None else (mask.dtype, mask.stride(2) == 0 or mask.shape[2] == 1)
            forms.add((params.precision, query.shape[-1], params.is_causal, kind, lse is None, bool(ids)))

    check(Compiled(), "cpu", capture=recorded)
    assert len(forms) == 13


def test_progress_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    found = check(Zeros(), "cpu", capture=recorded, progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == list(range(len(found) + 1))
    assert {total for _, total, _ in told} == {len(found)}
    assert told[0][2] == "zeros fast: whole tiles" and told[-1][2] == "zeros"


def test_zeros() -> None:
    found = failures(Zeros)
    assert set(found) == {case.name for case in CASES} - {"side stream"}
    assert all("the output is all zeros" in problems for problems in found.values())


def test_an_ignored_mask() -> None:
    found = failures(IgnoresMask)
    assert set(found) == {"key-padding mask", "bool mask", "additive mask"}
    assert all("error against float64=" in problems[0] for problems in found.values())


def test_an_ignored_causal_mask() -> None:
    assert set(failures(IgnoresCausal)) == {"causal, head_dim 128"}


def test_ignored_segments() -> None:
    found = failures(IgnoresSegments)
    assert set(found) == {"segments"} and "error against float64=" in found["segments"][0]


def test_work_that_a_capture_misses() -> None:
    found = failures(WrongStream)
    assert set(found) == {"CUDA graph capture"}
    assert "were not written" in found["CUDA graph capture"][0]


def test_modified_inputs() -> None:
    found = failures(SmoothsInPlace)
    assert "ragged lengths" in found and found["ragged lengths"] == ("the inputs were modified",)


def test_an_unwritten_tile() -> None:
    found = failures(LeavesTheLastTile)
    assert "whole tiles" not in found and "ragged lengths" in found
    assert found["ragged lengths"] == (
        f"{2 * 2 * 2 * 64} of {2 * 2 * 130 * 64} output elements are NaN or were not written",
    )


def test_padded_keys_that_take_part() -> None:
    found = failures(AttendsToPadding)
    assert "ragged lengths" in found and "whole tiles" not in found and "bool mask" not in found


def test_a_wrong_log_sum_exp() -> None:
    found = failures(ForgetsTheMeanInLSE)
    assert set(found) == {"log-sum-exp"}
    assert found["log-sum-exp"][0].startswith("error of the log-sum-exp=")


def test_a_crash_is_a_finding() -> None:
    found = failures(Crashes)
    assert set(found.values()) == {("raises ImportError: undefined symbol: _ZN3c104cuda",)}


def test_a_stated_limit_is_not_a_fault() -> None:
    found = {f.case: f for f in check(RefusesCapture(), "cpu", ["fast"], capture=recorded)}
    assert found["CUDA graph capture"].status == "skipped"
    assert found["CUDA graph capture"].problems == ("CUDA graph capture (supported: none)",)
    assert found["causal, head_dim 128"].status == "passed"


def test_an_unavailable_kernel_gives_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Zeros, "unavailable_reasons", lambda self, device: ["no GPU (supported: one)"])
    (finding,) = check(Zeros(), "cpu", ["fast"])
    assert finding == Finding("zeros", "fast", "all", "skipped", ("no GPU (supported: one)",))


def test_a_replay_that_reads_old_data_fails() -> None:
    """As a kernel does that keeps a copy of its inputs from the time of the capture."""

    class KeepsACopy(ReferenceKernel):
        name = "keeps a copy"

        def run(self, query: Tensor, *rest: Any) -> None:
            with _disable_current_modes():
                query = query.clone()
            super().run(query, *rest)

    found = failures(KeepsACopy)
    assert set(found) == {"CUDA graph capture"}
    assert any("error against float64" in problem for problem in found["CUDA graph capture"])


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["default", "other"])
def test_a_kernel_on_another_stream(stream: str) -> None:
    """For real: the oracle, launched as sageattention 2.x launches, or on a stream of its own."""
    side = functools.partial(torch.cuda.Stream, "cuda") if stream == "other" else torch.cuda.default_stream

    class ElsewhereKernel(ReferenceKernel):
        name = "elsewhere"

        def run(self, *args: Any) -> None:
            with torch.cuda.stream(side()):
                super().run(*args)

    found = {f.case: f for f in check(ElsewhereKernel(), "cuda", ["fast"])}
    assert found["CUDA graph capture"].status == "failed"
    assert found["side stream"].status == "failed"
    (problem,) = found["CUDA graph capture"].problems
    assert "were not written" in problem or problem.startswith("raises ")
    torch.randn(1, device="cuda")  # still works


@pytest.mark.gpu
def test_the_oracle_passes_on_a_gpu() -> None:
    found = check(ReferenceKernel(), "cuda")
    assert [finding for finding in found if finding.status == "failed"] == []
    assert {finding.case for finding in found if finding.status == "passed"} >= {"side stream"}
