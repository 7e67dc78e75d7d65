"""The sweep finds what a kernel does wrong, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agreement
import pytest
import sweep
import torch
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.reference.kernel import ReferenceKernel


def kernel_with(defect: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> ReferenceKernel:
    """The oracle, then `defect(query, key, out, lse)`."""

    class Defective(ReferenceKernel):
        def run(self, *args: Any) -> None:
            super().run(*args)
            query, key, _value, _mask, _params, out, lse, *_segments = args
            defect(query, key, out, lse)

    return Defective()


def faults(defect: Callable[[Tensor, Tensor, Tensor, Tensor], None], seed: int = 0) -> str:
    kernel = kernel_with(defect)
    return "; ".join(agreement.case_faults(kernel, agreement.draw_case(seed, kernel)))


def beyond(tensor: Tensor) -> Tensor:
    """The element before the first one of `tensor`, in memory it does not own."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - 1)


def test_the_oracle_agrees_with_itself() -> None:
    for seed in range(0, 400, 10):
        assert faults(lambda q, k, out, lse: None, seed) == ""


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        (lambda q, k, out, lse: out.mul_(1.1), "relative L2 0."),
        (lambda q, k, out, lse: out.view(-1)[-1:].add_(100) if out.is_contiguous() else out.add_(1), "largest error"),
        (lambda q, k, out, lse: lse.add_(0.1), "LSE 0.1"),
        (lambda q, k, out, lse: lse.mul_(float("nan")), "LSE nan"),
        (lambda q, k, out, lse: k.sub_(1), "key's buffer was written to"),
        (lambda q, k, out, lse: beyond(out).fill_(0), "out's buffer was written to"),
        (lambda q, k, out, lse: beyond(q).fill_(0), "query's buffer was written to"),
        (lambda q, k, out, lse: out.add_(beyond(k)), "outputs are NaN"),
    ],
)  # fmt: skip
def test_a_defect_is_found(defect: Callable[[Tensor, Tensor, Tensor, Tensor], None], expected: str) -> None:
    assert expected in faults(defect)


def test_variants_are_shared_and_differ() -> None:
    kernel = kernels.get("reference")
    cases = [agreement.draw_case(seed, kernel) for seed in range(4 * agreement.SEEDS_PER_VARIANT)]
    assert len({case.variant for case in cases}) == 4
    assert len({(case.q_len, case.kv_len, case.batch, case.params) for case in cases}) > 90
    assert agreement.draw_case(17, kernel) == cases[17]


def test_only_what_the_kernel_supports_is_drawn() -> None:
    class Narrow(ReferenceKernel):
        head_dims = (64,)
        dtypes = (torch.float16,)

    cases = [agreement.draw_case(seed, Narrow()) for seed in range(0, 500, agreement.SEEDS_PER_VARIANT)]
    assert {case.variant.head_dim for case in cases} == {64}
    assert {case.variant.dtype for case in cases} == {torch.float16}
    assert {case.variant.value_head_dim for case in cases} == {0, 64}


def test_missing_seeds() -> None:
    state = sweep.State("reference", "cpu")
    assert list(state.missing(0, 60)) == [(0, 25), (25, 50), (50, 60)]
    state.add(25, 30)
    state.add(0, 10)
    state.add(30, 31)
    assert state.done == [[0, 10], [25, 31]]
    assert list(state.missing(5, 60)) == [(10, 25), (31, 50), (50, 60)]
    assert list(state.missing(0, 60, 15)) == [(15, 16), (45, 46)]


def test_sweep_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.json"
    arguments = ["--kernel", "reference", "--state", str(path), "--seeds", "0"]
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert sweep.main([*arguments, "30", "--budget", "-1"]).done == []
        assert sweep.main([*arguments, "3"]).done == [[0, 3]]
        broken = kernel_with(lambda q, k, out, lse: lse.add_(1))
        monkeypatch.setattr(kernels, "get", lambda name: broken)
        state = sweep.main([*arguments, "5"])
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert state.done == [[0, 5]] and set(state.failures) == {"3", "4"}
    assert json.loads(path.read_text())["failures"]["3"][0].startswith("LSE 1 (bound 0.05)")
    assert "seed 3: LSE 1" in capsys.readouterr().out
