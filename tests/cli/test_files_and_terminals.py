"""The command line as an unlucky user meets it: full disks, closed pipes, odd terminals, odd files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from sage_inductor import cli
from sage_inductor.calibration import probe
from sage_inductor.plan.plan import Plan

MODEL = """
    import sys
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(NAME, Attention())

        def forward(self, x):
            return self._modules[NAME](x)

    NAME = "attention"
    if __name__ == "__main__":
        raise SystemExit("run as a program")

    def make():
        return Model(), (torch.randn(1, 2, 8, 8),)

    def odd():
        global NAME
        NAME = "a\\x1b[31mred\\ud800\\u202e\\u00e4"
        return Model(), (torch.randn(1, 2, 8, 8),)

    def stops():
        sys.exit(0)

    def interrupted():
        raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "main.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sage_inductor", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 200, **options}
    return subprocess.run(command, **options)


def test_a_file_called_main(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "main.py:make", "--kernel", "reference"]) == 0
    assert "1 rewritten" in capsys.readouterr().out


def test_sys_exit_in_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "main.py:stops"]) == 1
    assert "sys.exit(0)" in capsys.readouterr().err
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    assert cli.main(["explain", "leaves.py:make"]) == 1
    assert "sys.exit(0)" in capsys.readouterr().err


def test_interruption_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "main.py:interrupted"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["explain", "calibrate"])
@pytest.mark.parametrize("target", ["missing/file", ".", "n" * 300, "nul\0", "\udc80\ud800"])
def test_targets_are_checked_first(
    folder: Path, command: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model file does not even run: it would be told of as missing."""
    flag = "--html" if command == "explain" else "--out"
    assert cli.main([command, "absent.py:make", flag, target]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["--html", "--out"])
def test_a_full_disk_costs_neither_the_old_file_nor_the_report(
    folder: Path, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    Path("old").write_text("what was there")
    monkeypatch.setattr("sage_inductor.kernels.files._write_all", full)
    monkeypatch.setattr("sage_inductor.cli.calibrate.Ledger", None, raising=False)
    if which == "--html":
        code = cli.main(["explain", "main.py:make", "--kernel", "reference", which, "old"])
    else:
        monkeypatch.setattr("sage_inductor.cli.calibrate.is_regular_target", lambda path: False)
        code = cli.main(["calibrate", "main.py:make", which, "old"])
    printed = capsys.readouterr()
    assert code != 0 and "No space left" in printed.err
    assert "attention" in printed.out
    assert Path("old").read_text() == "what was there"
    assert {file.name for file in folder.iterdir()} - {"__pycache__"} == {"main.py", "old"}
    if which == "--out":
        elsewhere = printed.out.split("written to ")[1].split(" instead")[0]
        assert len(Plan.load(elsewhere).sites) == 1
        os.unlink(elsewhere)


def test_a_page_of_a_name_that_has_no_encoding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.html").write_text("old")
    assert cli.main(["explain", "main.py:odd", "--kernel", "reference", "--html", "page.html"]) == 0
    assert "\\ud800" in Path("page.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and r"a\x1b[31mred\ud800\u202eä" in out


def test_ascii_terminal_and_narrow_ones(folder: Path) -> None:
    widths = ("80", "20", "5", "1")
    script = f"""
import os
from sage_inductor import cli
for columns in {widths}:
    os.environ["COLUMNS"] = columns
    assert cli.main(["explain", "main.py:odd", "--kernel", "reference"]) == 0
    print(end="\\0", flush=True)
"""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()[-2000:]
    *pages, rest = done.stdout.decode("ascii").split("\0")
    assert rest == "" and len(set(pages)) == len(pages)  # each is as wide as its terminal
    for columns, page in zip(widths, pages, strict=True):
        words = "".join(page.split())
        assert "attention(s)" in words or columns in ("5", "1")
        assert "reference" in words or columns in ("5", "1")


def test_output_that_nobody_takes(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("explain", "main.py:make", "--html", "page.html", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert Path("page.html").stat().st_size > 1000  # the page is written all the same
    with open("/dev/full", "wb") as full:
        done = run("explain", "main.py:make", stdout=full)
    assert done.returncode == 1 and done.stderr == b"cannot print: No space left on device\n"


@pytest.mark.parametrize(
    "shape", ["1,1,99999999999,99999999999", "1,1,9999999999,128", "9" * 5000 + ",1,1,1", "1,1,1", "a,b,c,d"]
)
def test_impossible_shapes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--shape", shape, "--kernel", "reference"]) in (1, 2)
    assert "--shape" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_plan_that_is_no_file(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"pipe": "pipe", "device": "/dev/zero", "folder": "."}[kind]
    if kind == "pipe":
        os.mkfifo(plan)
    began = time.monotonic()
    assert cli.main(["explain", "main.py:make", "--plan", plan]) == 2
    assert time.monotonic() - began < 10 and plan in capsys.readouterr().err


def test_interrupted_calibration_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT after four of six measurements; the same command makes the other two."""
    monkeypatch.setattr(
        probe, "compare", probe.compare
    )  # what the model's file puts there goes with the test
    (folder / "slow.py").write_text(
        textwrap.dedent(MODEL)
        + textwrap.dedent("""
            import os, time
            from sage_inductor.calibration import probe
            real = probe.compare
            def compare(actual, exact):
                with open("measured", "a") as file:
                    file.write("x")
                if os.path.exists("slowly") and os.path.getsize("measured") > 4:
                    time.sleep(100)
                return real(actual, exact)
            if real.__module__.startswith("sage_inductor."):  # the file is run for the model and for the samples
                probe.compare = compare
            def samples():
                torch.manual_seed(0)
                return [(torch.randn(1, 2, 8, 8),), (torch.randn(1, 2, 8, 8),)]
        """)
    )
    command = [
        "calibrate",
        "slow.py:make",
        "--samples",
        "slow.py:samples",
        "--out",
        "plan.json",
        "--kernel",
        "reference",
    ]
    Path("slowly").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "sage_inductor", *command],
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore the signal, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 400  # on a busy machine
    while not Path("measured").exists() or len(Path("measured").read_text()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)  # before the sleep of 100 s would end by itself
    assert process.returncode == 130 and errors.count(b"\n") == 1, errors
    assert not Path("plan.json").exists() and len(Path("plan.json.partial").read_text().splitlines()) == 3
    Path("slowly").unlink()
    Path("measured").unlink()
    assert cli.main(command) == 0
    assert len(Path("measured").read_text()) == 2 and not Path("plan.json.partial").exists()
    (site,) = Plan.load("plan.json").sites
    assert {measured.samples for measured in site.measured} == {2}
    Path("measured").unlink()
    whole = json.loads(Path("plan.json").read_text())
    assert cli.main(command) == 0
    assert json.loads(Path("plan.json").read_text()) == whole  # as one that nobody interrupted
