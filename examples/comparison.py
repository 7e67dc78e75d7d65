"""Shared by the examples that time a whole model: plain `torch.compile` against `backend="sage_inductor"`."""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sage_inductor

PLAIN = "plain torch.compile"


@dataclass
class Result:
    """One way of running the model. Without a time it was not run, for the `reasons`."""

    kernel: str
    precision: str | None = None
    milliseconds: float | None = None
    plain_milliseconds: float | None = None  # of plain torch.compile, timed in turns with this one
    graph_breaks: int | None = None
    rewritten: int = 0
    sites: int = 0
    relative_l2: float | None = None  # ||output - plain|| / ||plain||
    max_error: float | None = None  # max |output - plain| / max |plain|
    reasons: tuple[str, ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    names = ", ".join(("auto", *sage_inductor.kernels.KERNELS))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (default here: %(default)s)")
    parser.add_argument(
        "--kernel",
        nargs="+",
        help=f"any of {names}; or all: every one that can run here (default: auto on a GPU, elsewhere "
        "reference, the slow oracle)",
    )
    parser.add_argument("--precision", default="fast", help="fast, balanced or accurate")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of each, taken in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")


def kernels_to_run(requested: list[str] | None, device: str, small: bool) -> list[str]:
    """The kernel names that `--kernel` means. "all" leaves the reference out of all but `small` problems."""
    if requested is None:
        return ["auto" if torch.device(device).type == "cuda" else "reference"]
    if requested != ["all"]:
        return requested
    available = sage_inductor.kernels.available(device)
    for name, reasons in available.items():
        print(f"kernel {name}: {'; '.join(reasons) or 'can run'}")
    return [name for name, reasons in available.items() if not reasons and (small or name != "reference")]


def run(
    model: nn.Module, inputs: dict[str, Any], args: Namespace, small: bool, /, **about: Any
) -> list[Result]:
    """What an example does with its model and its arguments: compare, print the table, write it."""
    print(f"{about['dtype'].removeprefix('torch.')} on {describe_device(args.device)}")
    kernels = kernels_to_run(args.kernel, args.device, small)
    results = list(compare(model, inputs, [(name, args.precision) for name in kernels], args.repeat))
    show(results, args.json, machine=describe_device(args.device), **about)
    return results


@torch.no_grad()
def compare(
    model: nn.Module, inputs: dict[str, Any], variants: Sequence[tuple[str, str]], repeat: int
) -> Iterator[Result]:
    """Compile and run `model(**inputs)` plainly, then with each (kernel, precision); yields a result as soon
    as it is known, the plain one first.

    Each variant is timed in turns with plain torch.compile, so that a drifting clock favours none.
    """
    # First, while nothing is compiled: what explain() leaves in Dynamo's caches then goes away again.
    judged = [judge(model, inputs, kernel, precision) for kernel, precision in variants]
    # Dynamo keeps what the backends made of one code object together and counts it as recompiling.
    with torch._dynamo.config.patch(recompile_limit=8 + len(variants)):
        plain = torch.compile(model)
        expected, breaks = run_and_count_breaks(plain, inputs)
        plain_time = in_turns([plain], inputs, expected.device, repeat)[0]
        yield Result(PLAIN, None, plain_time, plain_time, breaks)
        for result in judged:
            if result.rewritten:
                options = {"sage.kernel": result.kernel, "sage.precision": result.precision}
                ours = torch.compile(model, backend="sage_inductor", options=options)
                output, result.graph_breaks = run_and_count_breaks(ours, inputs)
                difference, exact = output.double() - expected.double(), expected.double()
                result.relative_l2 = (difference.norm() / exact.norm()).item()
                result.max_error = (difference.abs().max() / exact.abs().max()).item()
                result.milliseconds, result.plain_milliseconds = in_turns(
                    [ours, plain], inputs, expected.device, repeat
                )
            yield result


def in_turns(
    calls: list[Callable[..., Any]], inputs: dict[str, Any], device: torch.device, repeat: int
) -> list[float]:
    """Median time of each call in ms."""
    times = [[milliseconds(call, inputs, device) for call in calls] for _ in range(repeat)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def judge(model: nn.Module, inputs: dict[str, Any], kernel: str, precision: str) -> Result:
    """What the kernel would replace in the model; prints the report."""
    config = sage_inductor.Config(kernel=kernel, precision=precision)
    try:
        report = sage_inductor.explain(model, **inputs, config=config)
    except sage_inductor.NotEligibleError as error:
        return Result(kernel, precision, reasons=error.reasons)
    print(f"\nkernel={kernel}\n{report}")
    reasons = dict.fromkeys(reason for site in report.refused for reason in site.reasons)
    return Result(
        kernel, precision, rewritten=len(report.rewritten), sites=len(report.sites), reasons=tuple(reasons)
    )


def run_and_count_breaks(call: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, int]:
    """The first output of the first call, which compiles, and how often Dynamo broke the graph."""
    torch._dynamo.utils.counters.clear()
    output = call(**inputs)[0]
    return output, sum(torch._dynamo.utils.counters["graph_break"].values())


def milliseconds(call: Callable[..., Any], inputs: dict[str, Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call(**inputs)
        return 1e3 * (time.perf_counter() - begin)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(**inputs)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def show(results: list[Result], file: Path | None, **about: Any) -> None:
    """Print the table; write it with `about` (what was run, where) to `file`."""
    print(f"\n{'':22}{'ms':>10}{'speed':>8}{'breaks':>8}{'sites':>8}{'rel. L2':>10}{'max error':>11}")
    for result in results:
        name = result.kernel if result.precision is None else f"{result.kernel} ({result.precision})"
        if result.milliseconds is None or result.plain_milliseconds is None:
            kept = f"all {result.sites} attentions stay SDPA" if result.sites else "cannot run"
            print(f"{name:22}  {kept}: {'; '.join(result.reasons)}")
            continue
        speed = result.plain_milliseconds / result.milliseconds
        row = f"{name:22}{result.milliseconds:10.2f}{speed:7.2f}x{result.graph_breaks:8}"
        if result.relative_l2 is not None:
            row += (
                f"{f'{result.rewritten}/{result.sites}':>8}{result.relative_l2:10.5f}{result.max_error:11.5f}"
            )
        print(row)
        if result.reasons:
            print(f"{'':22}left as SDPA: {'; '.join(result.reasons)}")
    if any(result.kernel == "reference" and result.milliseconds for result in results):
        print(
            "reference is the slow oracle that defines the results: its time says nothing about the kernels."
        )
    if file is not None:
        data = {**about, "results": [asdict(result) for result in results]}
        file.write_text(json.dumps(data, indent=2) + "\n")
        print(f"written to {file}")


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A diffusers model as `from_pretrained(torch_dtype=dtype)` leaves it: a few modules stay in float32, and
    so do the rotary tables."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, torch {torch.__version__}"
