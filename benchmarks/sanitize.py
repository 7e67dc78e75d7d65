"""The sweep (tests/helpers/sweep.py) under NVIDIA's compute-sanitizer: a few ragged problems with each of its tools.

    python benchmarks/sanitize.py --kernel triton
    python benchmarks/sanitize.py --tools memcheck --sanitizer /usr/local/cuda/bin/compute-sanitizer

memcheck finds accesses out of bounds (every tensor gets an allocation of its own, without PyTorch's caching; the parts
of a call's workspace share one, so that only the sweep's comparison sees one part run into the next), racecheck races on
shared memory, synccheck misused barriers. Only the package's kernels are looked at. Exits with the number of tools that
found something. Of hopper racecheck reports the votes on leaving out a tile: notes.md says why they stay ("Under
compute-sanitizer").
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = (
    "attention",
    "combine",
    "quantize",
    "evened",
    "statistics",
    "mask_blocks",
    "block_list",
    "segment",
    "sampled_list",
)  # substrings of the names of the package's kernels
ERROR = 86  # what compute-sanitizer exits with on a finding; nothing else here does


def command(sanitizer: str, tool: str, sweep: Sequence[str]) -> list[str]:
    """The sweep under `tool`."""
    # torch asks the driver questions that fail by design.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    for name in KERNELS:
        quiet += ["--kernel-name", f"kns={name}"]
    script = str(ROOT / "tests" / "helpers" / "sweep.py")
    return [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR), *quiet, sys.executable, script, *sweep]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns how many tools found something or could not finish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="triton")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 150), metavar=("FIRST", "STOP"))
    parser.add_argument(
        "--step", type=int, default=25, help="one problem of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds for each tool; compiling included"
    )
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer"), help="its path")
    options = parser.parse_args(argv)
    if options.sanitizer is None:
        parser.error(
            "no compute-sanitizer on PATH: name it with --sanitizer (it is part of the CUDA toolkit)"
        )
    # Without guards around the tensors: what lies outside them is then outside the allocation.
    sweep = ["--kernel", options.kernel, "--seeds", *map(str, options.seeds), "--step", str(options.step)]
    sweep += ["--budget", str(options.budget), "--guard", "0"]
    failed = 0
    for tool in options.tools:
        begin = time.monotonic()
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command(options.sanitizer, tool, sweep), env=environment, check=False)
        what = {0: "clean", ERROR: "FOUND SOMETHING"}.get(run.returncode, f"FAILED with {run.returncode}")
        print(f"{tool}: {what} after {time.monotonic() - begin:.0f} s", flush=True)
        failed += run.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
