"""`python -m sage_inductor`: what each command prints, and its exit codes."""

from __future__ import annotations

import html
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_selftest import Crashes, IgnoresMask, WrongStream, Zeros, recorded

import sage_inductor
from sage_inductor import Config, Plan, kernels
from sage_inductor.cli import main
from sage_inductor.kernels.reference.kernel import ReferenceKernel
from sage_inductor.measurement import selftest
from sage_inductor.measurement.selftest import CASES

HAS_GPU = torch.cuda.is_available()
MODEL = """
import torch
import torch.nn.functional as F
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x, scale=1.0):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        return {"out": F.scaled_dot_product_attention(q, k, v) * scale}

class Raises(Attention):
    def forward(self, x):
        raise RuntimeError("shapes do not fit")

def make_model():
    return Attention(), (torch.randn(2, 40, 64),)

def with_keywords():
    return Attention(), {"x": torch.randn(2, 40, 64)}

def with_both():
    return Attention(), [torch.randn(2, 40, 64)], {"scale": 2.0}

def without_attention():
    return nn.Linear(4, 4), (torch.randn(3, 4),)

class Both(Attention):
    def forward(self, x):
        return super().forward(x), ((x @ x.mT).tanh() * 5).softmax(-1) @ x

def with_softcap():
    return Both(), (torch.randn(2, 40, 64),)

def that_raises():
    return Raises(), (torch.randn(2, 40, 64),)

def samples():
    return [(torch.randn(1, 20, 64),), {"x": torch.randn(3, 60, 64)}]

def fails():
    raise FileNotFoundError("weights.safetensors")

def returns_model():
    return Attention()

def returns_tensor():
    return Attention(), torch.randn(2, 40, 64)

a_number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return tmp_path


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*argv: str) -> Done:
        code = main(argv)
        return Done(code, *capsys.readouterr())

    return call


# --------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]) -> Callable[..., None]:
    """Registers kernels of test_selftest.py as the only ones; on a CPU, with an emulated capture."""

    def plant(*classes: type[ReferenceKernel]) -> None:
        new_process()  # kernels are instances, made once
        monkeypatch.setattr(
            kernels, "KERNELS", {cls.name: f"{cls.__module__}:{cls.__name__}" for cls in classes}
        )
        if not HAS_GPU:
            check = selftest.check
            monkeypatch.setattr(
                selftest, "check", lambda *args, progress=None: check(*args, ["accurate"], recorded, progress)
            )

    return plant


def test_doctor_on_this_machine(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few cases: Triton's interpreter, where it runs the kernels, takes a second for each."""
    few = [case for case in selftest.CASES if case.name in ("ragged lengths", "CUDA graph capture")]
    monkeypatch.setattr(selftest, "CASES", few)
    done = run("doctor", "--json")
    data = done.json
    assert data["facts"]["torch"] == torch.__version__ and bool(data["facts"]["gpus"]) is HAS_GPU
    by_name = {kernel["kernel"]: kernel for kernel in data["kernels"]}
    assert list(by_name) == list(kernels.KERNELS) and all(kernel["is_sound"] for kernel in data["kernels"])
    statuses = {finding["status"] for finding in by_name["reference"]["findings"]}
    assert statuses == ({"passed"} if HAS_GPU else {"passed", "skipped"})
    can_run = any(not kernel["reasons"] for name, kernel in by_name.items() if name != "reference")
    assert done.code == data["exit_code"] == (0 if can_run else 3)


def test_doctor_counts_the_reference_only_when_asked(run: Any) -> None:
    done = run("doctor", "--kernel", "reference")
    assert done.code == 0
    assert "All is well. Can run: reference." in done.out
    for text in ("Machine", "sageattention", "Kernels on ", f"{len(CASES) - (0 if HAS_GPU else 2)} passed"):
        assert text in done.out


@pytest.mark.parametrize(
    ("kernel", "case", "problem"),
    [
        (Zeros, "whole tiles", "the output is all zeros"),
        (IgnoresMask, "key-padding mask", "error against float64="),
        (Crashes, "grouped heads", "raises ImportError: undefined symbol"),
        pytest.param(WrongStream, "CUDA graph capture", "were not written", marks=pytest.mark.skipif(HAS_GPU, reason="emulated; test_selftest.py has the real one")),
    ],
)  # fmt: skip
def test_doctor_finds_planted_faults(
    kernel: type[ReferenceKernel], case: str, problem: str, run: Any, planted: Any
) -> None:
    planted(kernel)
    done = run("doctor")
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if f"  {case}  " in line and "accurate" in line]
    assert "failed" in line and problem in " ".join(done.out.split())
    assert f"Something is wrong with: {kernel.name}." in done.out
    data = run("doctor", "--json").json
    assert data["exit_code"] == 1 and not data["kernels"][0]["is_sound"]


def test_doctor_tells_a_broken_installation_from_a_limit(
    run: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(Zeros)
    missing = "device=cpu (supported: cuda)"
    monkeypatch.setattr(Zeros, "unavailable_reasons", lambda self, device=None: [missing])
    done = run("doctor")
    assert done.code == 3 and missing in done.out and "cannot run" in done.out
    built = "self-test error of sageattention 2.2.0=1.00 (supported: below 0.2)"
    monkeypatch.setattr(Zeros, "unavailable_reasons", lambda self, device=None: [built])
    monkeypatch.setattr(Zeros, "broken_reasons", lambda self, device=None: [built])
    done = run("doctor")
    assert done.code == 1 and built in done.out and "broken" in done.out


def test_doctor_survives_a_kernel_that_cannot_be_imported(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", {"lost": "no_such_module:Kernel"})
    done = run("doctor")
    assert done.code == 1 and "raises ModuleNotFoundError: No module named 'no_such_module'" in done.out


def test_doctor_shows_every_case_when_asked(run: Any) -> None:
    out = run("doctor", "--kernel", "reference", "--verbose").out
    for case in selftest.CASES:
        assert out.count(f"  {case.name}  ") == (len(kernels.PRECISIONS) if case.every_precision else 1)


@pytest.mark.parametrize("has_rich", [True, False])
def test_doctor_shows_on_a_terminal_what_it_is_at(
    has_rich: bool, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_inductor.measurement import progress

    if not has_rich:
        monkeypatch.setattr(progress, "_bar", lambda: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done = run("doctor", "--kernel", "reference")
    assert done.code == 0 and "reference fast: causal, head_dim 128" not in done.out
    if not has_rich:
        assert "reference fast: causal, head_dim 128" in done.err and done.err.endswith("\r\x1b[K")
    assert run("doctor", "--kernel", "reference", "--json").json["exit_code"] == 0


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_inductor.cli import doctor
    from sage_inductor.kernels import installed

    file = tmp_path / "version"
    monkeypatch.setattr(installed, "DRIVER_FILE", file)
    assert installed.driver_version() is None and doctor.machine_facts()["driver"] == "none found"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    assert installed.driver_version() == doctor.machine_facts()["driver"] == "570.86.15"


# -------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("name", ["make_model", "with_keywords", "with_both"])
def test_explain(run: Any, name: str) -> None:
    done = run("explain", f"net.py:{name}", "--kernel", "reference", "--precision", "balanced", "--json")
    assert done.code == 0
    (site,) = done.json["sites"]
    assert (site["kernel"], site["precision"], site["source"]) == ("reference", "balanced", "net.py:13")


def test_explain_as_a_table(run: Any) -> None:
    done = run("explain", "net.py:make_model", "--device-is-not-an-option")
    assert done.code == 2 and "--device-is-not-an-option" in done.err
    done = run("explain", "net.py:make_model", "--exclude", "<root>", "--exclude", "x.*")
    assert done.code == 0
    assert "net.py:13" in done.out and "2x2x40x32 float32" in done.out and "(exclude: <root>)" in done.out
    assert "1 attention(s): 0 rewritten, 1 left; 1 graph(s)" in done.out


def test_require_all(run: Any) -> None:
    assert run("explain", "net.py:make_model", "--require-all", "--kernel", "reference").code == 0
    assert run("explain", "net.py:make_model", "--require-all", "--exclude", "*").code == 3
    assert run("explain", "net.py:without_attention").code == 0
    done = run("explain", "net.py:without_attention", "--require-all")
    assert done.code == 3 and "no attention found" in done.out
    done = run("explain", "net.py:with_softcap", "--kernel", "reference", "--require-all")
    assert done.code == 3 and "1 attention(s): 1 rewritten, 0 left" in done.out
    assert "scores=tanh between product and softmax" in done.out


def test_gradients_count_only_with_training(run: Any) -> None:
    assert (
        run("explain", "net.py:make_model", "--kernel", "reference", "--require-all", "--training").code == 0
    )
    reasons = run("explain", "net.py:make_model", "--kernel", "reference", "--json").json["sites"][0][
        "reasons"
    ]
    assert reasons == []


def test_explain_writes_a_page(run: Any, folder: Path) -> None:
    done = run("explain", "net.py:make_model", "--kernel", "reference", "--html", "report.html")
    page = (folder / "report.html").read_text()
    assert done.code == 0 and page.startswith("<!doctype html>") and "reference fast" in page
    done = run("explain", "net.py:make_model", "--html", "no/such/folder/report.html")
    assert done.code == 2 and done.err.startswith("cannot write no/such/folder/report.html: No such file")


def test_every_field_of_config_is_an_option(run: Any) -> None:
    done = run("explain", "--help")
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')} " in done.out
    assert done.code == 0 and "fnmatch globs on the site's module path" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (str, "7", "7"),
        (str | None, "a", "a"),
        (int, "7", 7),
        (float | None, "0.5", 0.5),
        (Path | str | None, "p", "p"),
    ],
)
def test_options_have_the_types_of_their_fields(hint: Any, text: str, value: Any) -> None:
    from sage_inductor.cli.options import _parser_of

    assert _parser_of(hint)(text) == value


@pytest.mark.skipif(HAS_GPU, reason="a machine that can run it")
def test_a_kernel_that_cannot_run_here(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    done = run("explain", "net.py:make_model", "--kernel", "triton")
    assert done.code == 3 and done.err == "kernel=triton: device=cpu (supported: cuda)\n"


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("net.py", 2, "'net.py' (valid: FILE.py:FUNCTION)"),
        ("net.py:", 2, "(valid: FILE.py:FUNCTION)"),
        ("gone.py:make_model", 2, "gone.py: no such file"),
        ("net.py:missing", 2, "net.py has no function missing (it has: Attention, Raises, make_model"),
        ("net.py:a_number", 2, "net.py has no function a_number"),
        ("net.py:returns_model", 2, "net.py:returns_model returned Attention (valid: (model, args)"),
        ("net.py:returns_tensor", 2, "returned (Attention, Tensor) (valid: (model, args)"),
        ("net.py:fails", 1, "net.py:fails raised: FileNotFoundError: weights.safetensors"),
        ("net.py:that_raises", 1, "the model raised: RuntimeError: shapes do not fit"),
        ("broken.py:make_model", 1, "broken.py cannot be imported: SyntaxError"),
        ("notes.txt:make_model", 2, "notes.txt is no Python file"),
    ],
)
def test_models_that_are_not_as_they_should_be(
    run: Any, folder: Path, spec: str, code: int, message: str
) -> None:
    (folder / "broken.py").write_text("def make_model(:\n")
    (folder / "notes.txt").write_text("hello")
    done = run("explain", spec)
    assert done.code == code
    assert message in done.err.splitlines()[-1]
    assert ("Traceback" in done.err) is (code == 1) and done.out == ""


def test_values_that_config_refuses(run: Any) -> None:
    done = run("explain", "net.py:make_model", "--precision", "exact")
    assert done.code == 2 and done.err == "precision='exact' (valid: auto, fast, balanced, accurate)\n"


# ------------------------------------------------------------------------------------------------ calibrate


def test_calibrate_makes_a_plan_that_explain_applies(run: Any, folder: Path) -> None:
    done = run(
        "calibrate",
        "net.py:make_model",
        "--samples",
        "net.py:samples",
        "--tolerance",
        "0.03",
        "--out",
        "plan.json",
    )
    plan = Plan.load(folder / "plan.json")
    (site,) = plan.sites
    # On normal inputs "fast" is at .035 or so, and "balanced" below .021.
    assert done.code == 0 and (plan.metric, plan.tolerance, site.decision) == ("rel_l2", 0.03, "balanced")
    assert [measured.samples for measured in site.measured] == [2, 2, 2]
    assert done.out.split() == ["net.py:make_model", *str(plan).split(), "written", "to", "plan.json"]
    done = run("explain", "net.py:make_model", "--kernel", "reference", "--plan", "plan.json", "--json")
    (explained,) = done.json["sites"]
    assert done.code == 0 and done.json["missing"] == [] and explained["rewritten"]
    assert explained["precision"] == "balanced"
    assert explained["rel_l2"] == next(m for m in site.measured if m.precision == "balanced").rel_l2.worst


def test_calibrate_takes_its_options(run: Any, folder: Path) -> None:
    argv = ("calibrate", "net.py:with_keywords", "--metric", "cosine", "--out", "plan.json", "--exclude", "*")
    done = run(*argv, "--json")
    assert done.code == 0 and done.json == json.loads((folder / "plan.json").read_text())
    (site,) = done.json["sites"]
    assert done.json["metric"] == "cosine" and site["decision"] == "sdpa" and "exclude" in site["reasons"][0]


def test_explain_shows_sites_that_only_the_plan_has(run: Any, folder: Path) -> None:
    assert run("calibrate", "net.py:make_model", "--out", "plan.json").code == 0
    done = run("explain", "net.py:without_attention", "--plan", "plan.json", "--html", "report.html")
    text = "the plan has sites that the model lacks: <root>"
    assert done.code == 0 and done.out == f"no attention found in 1 graph(s)\n{text}\n"
    assert html.escape(text) in (folder / "report.html").read_text()


def test_calibrate_refuses(run: Any) -> None:
    done = run("calibrate", "net.py:make_model")
    assert done.code == 2 and "--out" in done.err
    done = run("calibrate", "net.py:make_model", "--out", "no/folder/plan.json")
    assert done.code == 2 and done.err.startswith("cannot write no/folder/plan.json: No such file")
    done = run("calibrate", "net.py:with_both", "--out", "plan.json")
    assert done.code == 2 and "positional and keyword inputs together" in done.err
    assert run("calibrate", "net.py:make_model", "--tolerance", "much", "--out", "plan.json").code == 2


def test_errors_about_arguments_need_no_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the package raises; the same from the model are the model's."""
    from sage_inductor.config import Config as Refuses

    monkeypatch.setattr(sage_inductor, "calibrate", lambda *args, **options: Refuses(precision="?"))
    done = run("calibrate", "net.py:make_model", "--out", "plan.json")
    assert done.code == 2 and done.err == "precision='?' (valid: auto, fast, balanced, accurate)\n"

    def calibrate(*args: Any, **options: Any) -> None:
        raise ValueError("too few values to unpack")

    monkeypatch.setattr(sage_inductor, "calibrate", calibrate)
    done = run("calibrate", "net.py:make_model", "--out", "plan.json")
    assert (
        done.code == 1
        and "calibration failed: ValueError: too few values" in done.err
        and "Traceback" in done.err
    )


# ---------------------------------------------------------------------------------------------------- bench


def test_bench_of_a_shape(run: Any) -> None:
    done = run(
        "bench", "--shape", "1,2,96,32", "--causal", "--kernel", "reference", "--device", "cpu", "--json"
    )
    sdpa, *rows = done.json
    assert done.code == 0 and sdpa["name"] == "sdpa" and sdpa["speedup"] == 1.0 and 0 < sdpa["rel_l2"] < 0.004
    assert [row["precision"] for row in rows] == list(kernels.PRECISIONS)
    for row in rows:
        assert row["ms"] > 0 and 0.002 < row["rel_l2"] < 0.04
        assert row["tflops"] == pytest.approx(2 * 2 * 96**2 * 32 / row["ms"] / 1e9)
        assert row["speedup"] == pytest.approx(sdpa["ms"] / row["ms"])


def test_bench_says_what_cannot_run(run: Any) -> None:
    done = run(
        "bench",
        "--shape",
        "1,2,64,30",
        "--kernel",
        "sageattention",
        "--precision",
        "accurate",
        "--device",
        "cpu",
    )
    assert done.code == 3
    (line,) = [line for line in done.out.splitlines() if line.startswith("sageattention")]
    assert "(supported: " in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "either FILE.py:FUNCTION or --shape"),
        (("net.py:make_model", "--shape", "1,1,1,1"), "either FILE.py:FUNCTION or --shape"),
        (("--shape", "1,2,3"), "--shape 1,2,3 (valid: four sizes, B,H,S,D"),
        (("--shape", "1,2,0,64"), "sizes of at least 1"),
        (("--shape", "1,2,64,64", "--include", "x"), "include: of use for a model only"),
        (("--shape", "1,2,64,64", "--kernel", "auto"), "kernel auto: of use for a model only"),
        (("--shape", "1,2,64,64", "--device", "tpu"), "--device tpu: "),
        (("--shape", "1,2,64,64", "--device", "cuda:99"), "--device cuda:99: torch sees "),
        (("--shape", "1,2,64,64", "--kernel", "cutlass"), "invalid choice: 'cutlass'"),
    ],
)
def test_bench_refuses(run: Any, argv: tuple[str, ...], message: str) -> None:
    done = run("bench", *argv)
    assert done.code == 2 and message in done.err and done.out == ""


@pytest.mark.usefixtures("without_inductor")
def test_bench_of_a_model(run: Any) -> None:
    done = run("bench", "--kernel", "reference", "--kernel", "auto", "net.py:make_model", "--json")
    plain, reference, auto = done.json
    assert done.code == 0 and plain["name"] == "torch.compile" and plain["graph_breaks"] == 0
    assert (reference["rewritten"], reference["sites"], reference["graph_breaks"]) == (1, 1, 0)
    assert 1e-4 < reference["rel_l2"] < 0.04 and reference["ms"] > 0
    assert auto["rewritten"] == 0 and auto["rel_l2"] < 1e-6 and auto["problems"]


def test_bench_counts_graph_breaks(run: Any, folder: Path) -> None:
    (folder / "breaking.py").write_text(
        "import torch\nimport torch.nn.functional as F\n"
        "def net(x):\n    x = F.scaled_dot_product_attention(x, x, x)\n    torch._dynamo.graph_break()\n    return x + 1\n"
        "def make_model(): return net, (torch.randn(1, 2, 16, 32),)\n"
    )
    rows = run("bench", "breaking.py:make_model", "--kernel", "reference", "--json").json
    assert [row["graph_breaks"] for row in rows] == [1, 1]


def test_the_timer() -> None:
    from sage_inductor.measurement.timers import median_ms

    calls: list[str] = []
    ms = median_ms(
        [lambda: calls.append("a"), lambda: calls.append("b")], target_ms=0.0, least=4, device="cpu"
    )
    assert 0 <= ms < 1 and calls == [
        "a",
        "b",
        "a",
        "a",
        "b",
        "a",
        "b",
    ]  # once each, an estimate, four in turns


# --------------------------------------------------------------------------------------------------- output


def test_tables_in_colour_on_a_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    out = run("explain", "net.py:make_model", "--kernel", "reference").out
    assert "\x1b[32mreference fast" in out and "│" in out


def test_plain_tables_where_rich_is_missing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_inductor.cli import output

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    out = run("explain", "net.py:make_model", "--kernel", "reference").out
    assert "\x1b" not in out and "reference fast" in out


def test_measurements_have_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from test_report_html import SITES

    from sage_inductor.cli.explain import show_report

    show_report("a model", sage_inductor.Report(SITES))
    out = capsys.readouterr().out
    assert "speed-up" in out and "1.40x" in out and "0.0400" in out
    show_report("a model", sage_inductor.Report((replace(SITES[3], speedup=None),)))
    assert "speed-up" not in capsys.readouterr().out


def test_without_a_command(run: Any) -> None:
    done = run()
    assert done.code == 2 and "usage: python -m sage_inductor" in done.err


def test_as_a_module(folder: Path) -> None:
    command = [sys.executable, "-m", "sage_inductor", "explain", "net.py:make_model", "--kernel", "reference"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reference fast" in done.stdout and done.stderr == ""


# -------------------------------------------------------------------------------------------------- logging


COMPILE = """
import sys
import net
for line in sys.stdin:
    torch.compiler.reset()
    exec(line)
    model, args = net.make_model()
    with torch.no_grad():
        torch.compile(model, backend="sage_inductor", options={"sage.kernel": "reference"})(*args)
    print("compiled", file=sys.stderr)
"""


# Graphs run as they are rewritten. Where torch imports the package, which TORCH_LOGS names, Inductor compiles them.
WITHOUT_INDUCTOR = (
    "torch._TorchCompileInductorWrapper.__call__ = lambda self, graph_module, inputs: graph_module.forward"
)


def logged(folder: Path, code: str, *before: str, **environment: str) -> list[str]:
    """What a process that begins with `code` writes to stderr when it compiles net.py's model, once behind each line of
    `before`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{COMPILE}"], cwd=folder, env={**os.environ, **environment},
        input="\n".join(before or ["pass"]), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *texts, rest = done.stderr.split("compiled\n")
    assert rest == ""
    return texts


SITE_LINE, SUMMARY = (
    "<root> at net.py:13: reference (fast)",
    "1 of 1 attention(s) rewritten (kernel=reference)",
)


def test_torch_logs_shows_a_line_for_each_site(folder: Path) -> None:
    """torch imports the package that TORCH_LOGS names, also amidst the package's own import of torch."""
    code = f"import sage_inductor, torch\n{WITHOUT_INDUCTOR}"
    (text,) = logged(folder, code, TORCH_LOGS="+sage_inductor")
    assert text.count(SITE_LINE) == 1 and text.count(SUMMARY) == 1


def test_nothing_is_shown_unless_set_logs_asks_for_it(folder: Path) -> None:
    code = "import logging; torch._logging.set_logs(modules={'sage_inductor': logging.DEBUG})"
    before, after = logged(folder, f"import torch\n{WITHOUT_INDUCTOR}", "pass", code)
    assert before == "" and after.count(SITE_LINE) == 1


def test_torch_logs_shows_one_summary_otherwise_and_torch_trace_holds_the_report(folder: Path) -> None:
    (text,) = logged(folder, "import torch", TORCH_LOGS="sage_inductor", TORCH_TRACE=str(folder / "trace"))
    assert text.count(SUMMARY) == 1 and SITE_LINE not in text
    (file,) = (folder / "trace").iterdir()
    lines = file.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if '"sage_inductor_report"' in line)
    payload = "\n".join(line.removeprefix("\t") for line in lines[start + 1 :] if line.startswith("\t"))
    report, _ = json.JSONDecoder().raw_decode(payload)
    assert report["rewritten"] == 1 and report["sites"][0]["source"] == "net.py:13"
    assert json.loads(lines[start].partition("] ")[2])["frame_id"] == 0


def test_logging_alone(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sage_inductor"):
        run("explain", "net.py:make_model", "--kernel", "reference")
    assert [record.getMessage() for record in caplog.records] == [SUMMARY]
