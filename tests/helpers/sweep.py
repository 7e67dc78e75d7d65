"""Random problems of a kernel against the oracle: seeded, resumable, on a GPU or through Triton's interpreter.

    python tests/helpers/sweep.py --kernel triton --seeds 0 2000 --budget 500 --jobs 8
    python tests/helpers/sweep.py --kernel triton --seeds 1234 1235          # one failure again
    python tests/helpers/sweep.py --kernel triton --seeds 0 1000 --step 25   # one problem of each variant

Shapes, strides, masks, dtypes, precisions, grouped heads, causality, windows and packed sequences are drawn from the
seed (agreement.py); all tensors lie in buffers of NaN and so does the kernels' workspace. Seeds that the state file
has as done are left out. Exits with 1 when a seed failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import agreement
from agreement import DEVICE, SEEDS_PER_VARIANT

from sage_inductor import kernels


@dataclass
class State:
    """What a sweep has found; `done` are seeds [first, stop), sorted, apart."""

    kernel: str
    device: str
    done: list[list[int]] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)  # seed -> faults
    seconds: float = 0.0

    def missing(self, first: int, stop: int, step: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of seeds that are not done, none longer than what shares a compiled variant; with a `step`
        single seeds."""
        seed = first
        while seed < stop:
            if covering := [end for start, end in self.done if start <= seed < end]:
                seed = covering[0] if step == 1 else seed + step
                continue
            if step > 1:
                yield seed, seed + 1
                seed += step
                continue
            variant_end = (seed // SEEDS_PER_VARIANT + 1) * SEEDS_PER_VARIANT
            end = min([stop, variant_end, *(start for start, _ in self.done if start > seed)])
            yield seed, end
            seed = end

    def add(self, first: int, stop: int) -> None:
        merged: list[list[int]] = []
        for start, end in sorted([*self.done, [first, stop]]):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.done = merged


@dataclass(frozen=True)
class Outcome:
    """Of seeds first..stop; `fatal`: the device can do nothing more in this process."""

    first: int
    stop: int
    failures: dict[str, list[str]]
    fatal: bool = False


def run_seeds(
    kernel_name: str, first: int, stop: int, deadline: float, guard: int = agreement.GUARD
) -> Outcome:
    """As many of the seeds as there is time for."""
    agreement.GUARD = guard
    # Fills whatever torch.empty gives, the kernels' workspace too, with NaN and the largest integers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    kernel = kernels.get(kernel_name)
    failures = {}
    for seed in range(first, stop):
        if time.time() > deadline:
            return Outcome(first, seed, failures)
        try:
            case = agreement.draw_case(seed, kernel)
            if faults := agreement.case_faults(kernel, case):
                failures[str(seed)] = [*faults, str(case)]
        except Exception as error:  # a sweep reports what happens and goes on
            failures[str(seed)] = [f"{type(error).__name__}: {error}"]
            if "CUDA error" in str(error):
                return Outcome(first, seed + 1, failures, fatal=True)
    return Outcome(first, stop, failures)


def sweep(
    state: State, ranges: list[tuple[int, int]], budget: float, jobs: int, path: Path | None, guard: int
) -> None:
    """Run the ranges of seeds, saving `state` after each."""
    begin = time.time()
    before, seconds = sum(end - start for start, end in state.done), state.seconds
    tasks = [(state.kernel, *seeds, begin + budget, guard) for seeds in ranges]
    for outcome in outcomes(tasks, jobs):
        state.add(outcome.first, outcome.stop)
        state.failures |= outcome.failures
        state.seconds = seconds + time.time() - begin
        for seed, faults in outcome.failures.items():
            print(f"seed {seed}: " + "; ".join(faults), flush=True)
        if path is not None:
            path.write_text(json.dumps(asdict(state), indent=1) + "\n")
        if outcome.fatal:
            break
    ran = sum(end - start for start, end in state.done) - before
    print(
        f"{state.kernel} on {state.device}: {ran} problems in {time.time() - begin:.0f} s, "
        f"{len(state.failures)} failures so far; seeds done: {state.done}"
    )


def outcomes(tasks: list[tuple[str, int, int, float, int]], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        for task in tasks:
            if time.time() > task[3]:
                return
            yield run_seeds(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_seeds, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> State:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="triton", choices=tuple(kernels.KERNELS))
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 2000), metavar=("FIRST", "STOP"))
    parser.add_argument("--step", type=int, default=1, help="run every so many seeds only")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds")
    parser.add_argument("--jobs", type=int, default=1, help="processes: most of the time goes into compiling")
    parser.add_argument("--state", type=Path, help="JSON: where to go on, and to save after each variant")
    parser.add_argument(
        "--guard",
        type=int,
        default=agreement.GUARD,
        help="elements of NaN around each tensor (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "the interpreter"
    state = State(options.kernel, device)
    if options.state is not None and options.state.exists():
        state = State(**json.loads(options.state.read_text()))
        if (state.kernel, state.device) != (options.kernel, device):
            parser.error(f"{options.state} is of {state.kernel} on {state.device}")
    ranges = list(state.missing(*options.seeds, options.step))
    sweep(state, ranges, options.budget, options.jobs, options.state, options.guard)
    return state


if __name__ == "__main__":
    sys.exit(bool(main().failures))
