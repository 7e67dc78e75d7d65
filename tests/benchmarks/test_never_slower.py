"""benchmarks/never_slower.py, on a CPU: what it chooses, times, writes and resumes. The figures need a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_inductor import kernels
from sage_inductor.testing import relative_l2
from sage_inductor.tuning import measure
from sage_inductor.tuning.store import Result, Timing

FACTS = {"gpu": "none", "torch": torch.__version__, "triton": "none"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import never_slower

    def median_ms(calls: list[Any]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e3

    def measured(comparison: Any, names: Any) -> Result:
        ratio = 0.5 if comparison.lengths[0] >= 64 else 2.0
        return Result(*comparison.lengths, 1.0, {name: Timing(ratio, ratio, 0.0) for name in names})

    monkeypatch.setattr(never_slower, "DEVICE", "cpu")
    monkeypatch.setattr(never_slower, "median_ms", median_ms)
    monkeypatch.setattr(never_slower, "sets_beyond_l2", lambda size: 2)
    monkeypatch.setattr(never_slower, "machine", lambda: FACTS)
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("reference",))
    yield never_slower
    for name in ("never_slower", "attention", "timing"):
        sys.modules.pop(name, None)


def test_both_phases_and_their_resumption(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    long, short = script.Site(1, 2, 2, 64, 64, 32), script.Site(1, 2, 2, 40, 40, 32, is_causal=True)
    script.run("check", out, 60.0, [long])
    assert not out.exists()  # nothing was chosen yet
    script.run("choose", out, -1.0, [long])
    assert not out.exists()  # the budget is spent
    script.run("choose", out, 60.0, [long, short])
    script.run("check", out, 60.0, [long, short])
    first, second = rows = json.loads(out.read_text())
    assert first["kernel"] == "reference" and first["speedup_when_chosen"] == 2.0 and first["kernel_ms"] > 0
    assert first["slower_by"] == pytest.approx(first["kernel_ms"] / first["sdpa_ms"] - 1)
    assert second["kernel"] == "sdpa" and second["slower_by"] == 0 and "time=2 ms" in second["reasons"][0]
    text, within = script.summary(rows)
    assert (
        not within and "2 sites, 2 checked: 1 with a kernel" in text
    )  # the reference is slow, and it says so
    assert script.summary([{**first, "slower_by": 0.029}, second])[1]
    before = out.read_text()
    script.run("choose", out, 60.0, [long, short])
    script.run("check", out, 60.0, [long, short])
    assert out.read_text() == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"mask": "tril"},
        {"mask": "tril", "kv_heads": 2},
        {"mask": "padding"},
        {"mask": "ragged", "batch": 3},
        {"mask": "left", "batch": 3},
        {"mask": "packed", "batch": 2, "kv_heads": 2},
        {"kv_heads": 2},
        {"layout": "HND"},
    ],
)
def test_kernel_and_baseline_compute_the_same(script: Any, options: dict[str, Any]) -> None:
    site = script.Site(
        **{"batch": 1, "heads": 4, "kv_heads": 4, "q_len": 32, "kv_len": 32, "head_dim": 32} | options
    )
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in site.inputs()]
    expected = site.model(*inputs)
    assert torch.equal(site.baseline()(*inputs), expected)
    assert relative_l2(site.kernel("reference")(*inputs), expected) < 0.06


def test_sites_of_unknown_lengths_are_understood(script: Any, tmp_path: Path) -> None:
    sites = [script.Site(2, 2, 2, 32, 32, 32, mask=mask, dynamic=True) for mask in ("left", "packed")]
    found = [script.choose(site, tmp_path)["understood"] for site in sites]
    assert found == ["causal (symbolic) + key_padding", "causal (symbolic) + segments"]


def test_the_grid_holds_every_size_once(script: Any) -> None:
    sites = list(script.grid())
    assert len(set(sites)) == len(sites)
    assert {site.q_len for site in sites} >= set(script.SIZES)
    assert {site.precision for site in sites} == {"fast", "balanced", "accurate"}
