"""Mutated files and command lines: `python tests/helpers/fuzz.py --files 2000 --commands 500 --seed 0`.

A file that is read gives what was written or is refused in the documented way. A command ends within 10 s, with a documented
exit code, without a traceback, and leaves the files that were there as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sage_inductor import cli
from sage_inductor.config import Config
from sage_inductor.kernels.hopper import kept
from sage_inductor.plan.plan import Plan
from sage_inductor.plan.sites import Figure, Fingerprint, Measured, PlannedSite
from sage_inductor.tuning.machine import Machine
from sage_inductor.tuning.store import Result, Store, Timing

SECONDS = 10
EXIT_CODES = (0, 1, 2, 3)
MODEL = """
import torch
import torch.nn.functional as F
def make():
    return lambda q: F.scaled_dot_product_attention(q, q, q), (torch.zeros(1, 1, 4, 8),)
def raises():
    raise ValueError("\\x1b[31m\\ud800")
"""
VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "", "\x1b[31m", "\ud800", "\0", "x" * 100_000,
    [], {}, [[]], {"a": 1}, [1, None], -0.0, 2**63, "sdpa", "1e999",
]  # fmt: skip
DEEP = "[" * 100_000

FIGURE = Figure(0.01, 0.005)
PLAN = Plan(
    "rel_l2",
    0.05,
    (
        PlannedSite(
            "block.attention",
            Fingerprint("sdpa", "model.py: attend()", 1, 2, 2, 8, 8, "none"),
            "fast",
            measured=(Measured("fast", "reference", 1, FIGURE, FIGURE, FIGURE, FIGURE, FIGURE),),
        ),
    ),
    made_with={"torch": "2"},
)
MACHINE = Machine("gpu", "driver", "torch", "cudnn", "triton", "sageattention", "kernels")
KEY = {"head_dim": 64}
RESULT = Result(128, 128, 1.0, {"triton": Timing(0.5, 0.5, 0.01)}, {"hopper": "failed"})
CUBIN = b"\x7fELF" + bytes(range(200))


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut, doubled; or, of JSON, values and keys."""
    kind = rng.randrange(7)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if kind == 2:
        return (
            content[:at]
            + rng.choice([b"\xff", b'"', b"{", DEEP.encode(), b"1e999", b"\0"])
            + content[at + 1 :]
        )
    if kind == 3:
        return content[:at] + content[at // 2 :]
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return bytes(rng.randrange(256) if rng.random() < 0.02 else byte for byte in content)
    return json.dumps(_changed(rng, copy.deepcopy(data))).encode()


def _changed(rng: random.Random, data: Any) -> Any:
    """A value somewhere within `data` exchanged, taken away or doubled under another name."""
    if rng.random() < 0.05 or not data or not isinstance(data, (dict, list)):
        return rng.choice(VALUES)
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = rng.choice(keys)
    if rng.random() < 0.1:
        del data[key]
    elif rng.random() < 0.1 and isinstance(data, dict):
        data["x" * 1000] = data[key]
    else:
        data[key] = _changed(rng, data[key])
    return data


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(signum: int, frame: types.FrameType | None) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_plan(file: Path) -> None:
    try:
        plan = Plan.load(file)
    except ValueError as error:
        assert str(file) in str(error) and len(str(error)) < 1000, str(error)[:2000]
    else:
        assert Plan.from_json(plan.to_json()) == plan
        str(plan)
    with contextlib.suppress(ValueError):
        Config(plan=str(file))


def read_store(file: Path) -> None:
    for result in Store(str(file.parent.parent), MACHINE).load(KEY):
        assert result.q_len >= 1 and result.kv_len >= 1
        result.decides(128, 128, ["triton"])


def read_cubin(file: Path) -> None:
    assert kept.load(file.parent, file.name, "key") in (None, CUBIN)


def fuzz_files(count: int, rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = folder / "plan.json"
        PLAN.save(plan)
        Store(name, MACHINE).save(KEY, RESULT)
        (store,) = (folder / MACHINE.fingerprint()).iterdir()
        kept.store(folder / "kernels", "k", "key", CUBIN)
        readers: dict[Path, Callable[[Path], None]] = {
            plan: read_plan, store: read_store, folder / "kernels" / "k": read_cubin
        }  # fmt: skip
        originals = {file: file.read_bytes() for file in readers}
        for index in range(count):
            file = rng.choice(list(readers))
            content = originals[file]
            for _ in range(rng.randrange(1, 4)):
                content = mutated(rng, content)
            file.write_bytes(content)
            try:
                with in_time():
                    readers[file](file)
            except BaseException as error:
                raise AssertionError(f"file {index}, {file.name}: {content[:500]!r}") from error


def arguments(rng: random.Random) -> list[str]:
    odd = [
        "\x1b[31m", "\ud800", "a" * 5000, "", "-1", "nan", "1e999", "--", "nul\0", "/dev/full", "/dev/zero", "/", "pipe",
        "keep.json", "bad.json", "missing/x", "*", "[", "cuda:99", "meta", "cpu", "1,1,4,8", "0,1,4,8", "1,1,1", "9,9,9",
        "1,99999999,99999999,64", "reference", "fast", "rel_l2", "0.05", "out.json", "out.html",
    ]  # fmt: skip
    flags = [
        "--json", "--html", "--out", "--plan", "--kernel", "--precision", "--fallback", "--include", "--exclude",
        "--tune", "--cache-dir", "--training", "--require-all", "--metric", "--tolerance", "--samples", "--shape",
        "--causal", "--dtype", "--device", "--help", "--regional", "--unknown", "--dynamic",
    ]  # fmt: skip
    models = [
        "model.py:make",
        "model.py:raises",
        "model.py:none",
        "missing.py:make",
        "keep.json:x",
        "model.py",
        ":",
        "\0:x",
    ]
    command = rng.choice(["explain", "explain", "calibrate", "bench", rng.choice(odd)])
    chosen = [command]
    if rng.random() < 0.85:
        chosen.append(rng.choice(models))
    if command == "calibrate" and rng.random() < 0.7:
        chosen += ["--out", rng.choice(odd)]
    if command == "bench":  # of a shape: a model's takes minutes
        chosen = [command, "--shape", rng.choice(odd), "--kernel", "reference"]
    for _ in range(rng.randrange(4)):
        chosen += [rng.choice(flags), *([rng.choice(odd)] if rng.random() < 0.8 else [])]
    return chosen


def fuzz_commands(count: int, rng: random.Random) -> dict[int, int]:
    codes: dict[int, int] = {}
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        try:
            os.chdir(name)
            Path("model.py").write_text(MODEL)
            PLAN.save("keep.json")
            Path("bad.json").write_text(DEEP)
            os.mkfifo("pipe")
            before = {file: Path(file).read_bytes() for file in ("model.py", "bad.json")}
            for index in range(count):
                line = arguments(rng)
                out, err = io.StringIO(), io.StringIO()
                try:
                    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_time():
                        code = cli.main(line)
                    assert code in EXIT_CODES, code
                    raises = "model.py:raises" in line
                    assert raises or "Traceback" not in err.getvalue(), err.getvalue()[-3000:]
                    assert "\x1b" not in out.getvalue() + err.getvalue()
                    for file, content in before.items():
                        assert Path(file).read_bytes() == content, f"{file} was written"
                    assert Path("keep.json").read_bytes().startswith((b"{", b"<!doctype"))
                    assert not [file for file in os.listdir() if file.endswith(".tmp")]
                except BaseException as error:
                    raise AssertionError(f"command {index}: {line!r}") from error
                codes[code] = codes.get(code, 0) + 1
        finally:
            os.chdir(home)
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzz_files(options.files, random.Random(options.seed))
    print(f"{options.files} files: each read as written, or refused", flush=True)
    codes = fuzz_commands(options.commands, random.Random(options.seed))
    print(f"{options.commands} command lines; exit codes: {codes}", flush=True)


if __name__ == "__main__":
    main()
