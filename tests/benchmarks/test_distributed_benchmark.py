"""benchmarks/distributed.py in its smallest form on two gloo ranks, and what is made of its rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/, which find each other as when started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# Two ranks as torchrun starts them, but copies of one process, made after what takes longer than the benchmark: its imports.
COPIES = """
import os, socket, sys
import torch._inductor.compile_fx, transformers.models.llama.modeling_llama
import distributed
from ranks import forked

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
rank = forked(2)
if rank is not None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    distributed.main(sys.argv[1:])
"""


def start(out: Path, *arguments: str, torchrun: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*command, str(BENCHMARKS / "distributed.py")] if torchrun else [sys.executable, "-c", COPIES]
    command += [
        "--tiny",
        "--without-inductor",
        "--device",
        "cpu",
        "--repeat",
        "1",
        "--out",
        str(out),
        *arguments,
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(BENCHMARKS), str(HELPERS), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)


def check(row: dict[str, Any], sites: int, error: float) -> None:
    plain, ours = row["plain"], row["ours"]
    assert row["ranks"] == 2 and row["all_to_all_GB_s"] > 0 and row["p2p_GB_s"] > 0
    assert plain["relative_l2"] < 1e-5 < ours["relative_l2"] < error and ours["max_error"] < 1
    assert plain["milliseconds"] > 0 and ours["milliseconds"] > 0
    assert row["rewritten"] == row["sites"] == sites
    assert ours["communication_ms"] > 0 and 0 <= ours["hidden"] <= 1


def test_a_prompt_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = start(out, "--models", "llama", "--ways", "ring 2, 8-bit wires", torchrun=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())
    assert row["way"] == "ring 2, 8-bit wires"
    assert (row["plain"]["graph_breaks"], row["ours"]["graph_breaks"]) == (0, 0)
    check(row, sites=2, error=0.04)


@pytest.mark.slow
def test_all_ways_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = start(out)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(row["model"], row["way"]): row for row in json.loads(out.read_text())}
    assert len(rows) == 3 * 6
    for (model, way), row in rows.items():
        if "error" in row:
            refused = (
                ("Ulysses 2, 8-bit wires", "DTensor") if "Llama" in model else ("TP 2", "tensor-parallel")
            )
            assert way == refused[0] and refused[1] in row["error"], row
        elif (
            way.startswith("ring 2") and "Llama" not in model
        ):  # diffusers' native attention gives a ring no log-sum-exp
            assert "return_lse" in row["plain"]["error"] and 0 < row["ours"]["relative_l2"] < 0.01, row
            assert row["rewritten"] == row["sites"] > 0
        elif way != "one GPU":
            check(row, sites=row["sites"], error=0.04 if "Llama" in model else 0.01)
    again = start(out)
    assert again.returncode == 0 and json.loads(out.read_text()) == list(rows.values())


@pytest.mark.slow
def test_a_case_that_does_not_end_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = start(out, "--models", "llama", "--ways", "one GPU", "Ulysses 2", "--limit", "1")
    assert done.returncode != 0 and "Timeout" in done.stderr, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())
    assert (row["way"], row["error"]) == ("one GPU", "did not end within 1.0 s")


def test_ways(load: Any) -> None:
    workloads = load("distributed_workloads")
    assert [str(way) for way in workloads.spreads(1)] == ["one GPU"]
    both = ["Ulysses 4", "ring 4", "Ulysses 4, 8-bit wires", "ring 4, 8-bit wires"]
    assert [str(way) for way in workloads.spreads(4)] == ["one GPU", *both, "USP 2x2", "TP 4"]
    both = ["Ulysses 8", "ring 8", "Ulysses 8, 8-bit wires", "ring 8, 8-bit wires"]
    assert [str(way) for way in workloads.spreads(8)] == ["one GPU", *both, "USP 2x4", "USP 4x2", "TP 8"]
    reasons = {
        (name, str(way)): workload.not_supported(way)
        for name, workload in workloads.WORKLOADS.items()
        for way in workloads.spreads(8)
    }
    refused = {case for case, reason in reasons.items() if reason is not None}
    assert refused == {
        ("wan_14B", "TP 8"), ("hunyuan", "TP 8"),
        *((f"llama_{size}k", way) for size in (64, 128) for way in ("USP 2x4", "USP 4x2", "Ulysses 8, 8-bit wires")),
    }  # fmt: skip
    assert workloads.WORKLOADS["hunyuan"].tokens == 119_056
    seven = workloads.Spread(ulysses=7)
    assert workloads.WORKLOADS["wan_14B"].not_supported(seven) == "heads=40 (valid: a multiple of 7)"


def test_the_share_of_communication_that_is_hidden(load: Any) -> None:
    share = load("distributed").hidden_share
    assert share([], [(0, 1)]) == (0, None)
    assert share([(0, 4), (2, 6)], [(1, 2), (1.5, 3), (5, 9)]) == (6, 0.5)  # 1 to 3 and 5 to 6
    assert share([(0, 1), (3, 4)], [(1, 3)]) == (2, 0.0)


def test_what_arithmetic_says_stands_in_the_docs(load: Any) -> None:
    report = load("distributed_report")
    docs = (ROOT / "docs" / "distributed.md").read_text()
    assert [part for part in report.paper().split("\n\n") if part not in docs] == []
    gpu = report.Gpu(operations=1e12, link=1e9, memory=float("inf"), latency=0.0)
    attention = report.Attention("", 1000, 8, 8, 125)  # 4e9 operations: 4 ms
    assert report.expected_ms(attention, report.ways(1)[0], gpu) == pytest.approx(4)
    ulysses, ring, gathered, in_8_bits = report.ways(2)
    # A rank has half of each of four tensors of a million elements, and sends half of that: 2 MB in bf16, at 1 GB/s 2 ms.
    assert report.expected_ms(attention, ulysses, gpu) == pytest.approx(2 + 2)
    # K and V of a half are 2 MB: 2 ms, longer than attending to them, which takes 1.
    assert report.expected_ms(attention, ring, gpu) == pytest.approx(2 + 1)
    assert report.expected_ms(attention, gathered, gpu) == pytest.approx(2 + 2)
    assert report.expected_ms(attention, in_8_bits, gpu) == pytest.approx(1 + 1)
    # In 5 bytes an element, Q for each of two parts, K and V of all keys, or of its own.
    slow = report.Gpu(operations=float("inf"), link=float("inf"), memory=1e9, latency=0.0)
    merged = 3 * 4 * 0.5
    assert report.expected_ms(attention, ring, slow) == pytest.approx(merged + 5 * (2 * 0.5 + 2))
    assert report.expected_ms(attention, in_8_bits, slow) == pytest.approx(merged + 5 * (2 * 0.5 + 2 * 0.5))


def test_tables_and_plots_of_rows(load: Any, tmp_path: Path) -> None:
    report = load("distributed_report")
    about = {"gpu": "G", "torch": "1", "model": "M", "tokens": 1000}
    rows = [
        {**about, "ranks": 2, "way": "one GPU", "plain": {"milliseconds": 100.0}, "ours": {"milliseconds": 80.0}},
        {
            **about, "ranks": 2, "way": "ring 2", "all_to_all_GB_s": 300.4, "p2p_GB_s": 200.0,
            "plain": {"error": "none"}, "ours": {"milliseconds": 40.0, "relative_l2": 0.01, "hidden": 0.5},
        },
        {**about, "ranks": 2, "way": "TP 2", "error": "no plan"},
    ]  # fmt: skip
    _, _, one, ring, refused = report.table(rows).splitlines()
    assert one == "| M, 1,000 | one GPU | 2 | 100.0 | 80.0 | 1.25 | 1.00 | 1.00 |  |  |  |"
    assert ring == "| M, 1,000 | ring 2 | 2 |  | 40.0 |  |  | 2.00 | 0.0100 | 50% | 300, 200 |"
    assert refused.startswith("| M, 1,000 | TP 2 | 2 | no plan |") and refused.count("|") == one.count("|")
    pytest.importorskip("matplotlib")
    report.plot(rows, tmp_path / "plot.svg")
    assert "ring, ours" in (tmp_path / "plot.svg").read_text()
