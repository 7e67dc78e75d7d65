"""Whole models on several GPUs: plain torch.compile against backend="sage_inductor", by ways of dividing them.

    torchrun --nproc-per-node 4 benchmarks/distributed.py            # on each number of GPUs: 1, 2, 4, 8
    torchrun --nproc-per-node 2 benchmarks/distributed.py --models wan_14B --ways "Ulysses 2" "ring 2"
    torchrun --nproc-per-node 2 benchmarks/distributed.py --tiny     # small models, gloo on a CPU
    python benchmarks/distributed_report.py benchmarks/results/distributed_h100.json --plot scaling.svg

Needs `pip install diffusers transformers`. Models are those of distributed_workloads.py, two layers each, with random weights. A
row of the JSON has gpu, torch, triton, ranks, model, layers, tokens, way ("one GPU", "Ulysses 4", "ring 4", "ring 4, 8-bit wires",
whose plain side is that of "ring 4", "Ulysses 4, 8-bit wires", "USP 2x2", "TP 4"),
all_to_all_GB_s and p2p_GB_s (what leaves each rank in a second), and for `plain` and `ours`, timed in turns: milliseconds (the
median; the slowest rank counts), relative_l2 and max_error against one GPU without a compiler, graph_breaks, communication_ms and
hidden (the share of it that lies under computation) and idle_ms (when neither runs), both from a profile of rank 0, first_call_s; or the error. rewritten of sites says
what ours replaced. Both run in one process, so that a drifting clock favours none.

Rows that the file has are not measured again on the same kind of GPU with the same torch. A case that hangs ends the run after
--limit seconds: its row says so, and the next run leaves it out (--again measures all).
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_workloads import BACKENDS, TINY, WORKLOADS, Prepared, Spread, Workload, spreads
from timing import machine
from torch import Tensor

import sage_inductor
from sage_inductor.integrations import diffusers as sage
from sage_inductor.testing import RewritingBackend

Interval = tuple[float, float]
SIDES = ("plain", "ours")
LINK_BYTES = {"cuda": 512 << 20, "cpu": 1 << 20}


@dataclass(frozen=True)
class Ranks:
    """This rank among all, and a group of theirs for words, apart from that of the models."""

    rank: int
    ranks: int
    device: str
    words: Any

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32

    def gathered(self, said: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, said, group=self.words)
        return found

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        dist.barrier(group=self.words)


def join(device: str, limit: float) -> Ranks:
    """The ranks that torchrun started; one without it."""
    on_gpu = torch.device(device).type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=limit))
    words = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
    ranks = dist.get_world_size()
    if not on_gpu:
        torch.accelerator.device_count = lambda: ranks  # a CPU counts as none, and diffusers divides by it
    return Ranks(dist.get_rank(), ranks, f"cuda:{local}" if on_gpu else "cpu", words)


def links(ranks: Ranks, repeat: int = 5) -> dict[str, float]:
    """GB that leave each rank in a second, in an all-to-all, and to the next rank of a ring."""
    if ranks.ranks == 1:
        return {}
    kind = torch.device(ranks.device).type
    size = LINK_BYTES[kind] // ranks.ranks * ranks.ranks
    sent = torch.empty(size, device=ranks.device, dtype=torch.uint8)
    received = torch.empty_like(sent)
    after, before = (ranks.rank + 1) % ranks.ranks, (ranks.rank - 1) % ranks.ranks

    def to_all() -> None:
        dist.all_to_all_single(received, sent)

    def to_next() -> None:
        both = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    leaving = {"all_to_all_GB_s": size * (ranks.ranks - 1) / ranks.ranks, "p2p_GB_s": float(size)}
    found = {}
    for (name, amount), call in zip(leaving.items(), (to_all, to_next), strict=True):
        call()
        found[name] = amount / 1e6 / statistics.median(timed(call, ranks) for _ in range(repeat))
    return found


def timed(call: Callable[[], Any], ranks: Ranks) -> float:
    """The time of one call in ms, of the rank that took longest."""
    ranks.wait()
    start = time.perf_counter()
    call()
    if ranks.device.startswith("cuda"):
        torch.cuda.synchronize()
    return float(max(ranks.gathered(1e3 * (time.perf_counter() - start))))


def errors(output: Tensor, exact: Tensor, ranks: Ranks) -> dict[str, float]:
    """Of all ranks' outputs together, against their parts of the exact one."""
    parts = ranks.gathered(
        (
            (output.double() - exact.double()).square().sum().item(),
            exact.double().square().sum().item(),
            (output - exact).abs().max().item(),
            exact.abs().max().item(),
        )
    )
    wrong, right, *_ = (sum(part[index] for part in parts) for index in range(2))
    largest = [max(part[index] for part in parts) for index in (2, 3)]
    return {"relative_l2": (wrong / right) ** 0.5, "max_error": largest[0] / largest[1]}


def hidden_share(
    communication: Iterable[Interval], computation: Iterable[Interval]
) -> tuple[float, float | None]:
    """(time of `communication`, the share of it during which something of `computation` runs; None without communication)."""
    sent, computed = _merged(communication), _merged(computation)
    total = sum(end - start for start, end in sent)
    under = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in sent
        for other_start, other_end in computed
    )
    return total, under / total if total else None


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def profiled(
    call: Callable[[], Any], ranks: Ranks, trace_file: Path | None = None
) -> dict[str, float | None]:
    """What a trace of one call says of this rank's communication: NCCL's kernels and copies to other GPUs beside all others, or gloo's work
    beside the operators of a CPU. NCCL's kernels wait for the other ranks, too; where copies are waited for, nothing runs (idle_ms)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = ranks.device.startswith("cuda")
    ranks.wait()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    if trace_file is not None:
        trace.export_chrome_trace(str(trace_file))
    communication, computation = [], []
    for event in trace.events():
        interval = event.time_range.start / 1e3, event.time_range.end / 1e3
        if on_gpu:
            if event.device_type != DeviceType.CUDA or event.name.startswith("nccl:"):
                continue  # "nccl:" is a note that spans kernels
            (communication if event.name.startswith(("nccl", "Memcpy PtoP")) else computation).append(
                interval
            )
        elif event.name.startswith("gloo:"):
            communication.append(interval)
        elif event.name.startswith(("aten::", "sage_inductor::")):
            computation.append(interval)
    total, share = hidden_share(communication, computation)
    busy = _merged([*communication, *computation])
    idle = sum(after[0] - before[1] for before, after in zip(busy, busy[1:], strict=False))
    return {"communication_ms": total, "hidden": share, "idle_ms": idle}


def compiled(
    side: str, prepared: Prepared, config: sage_inductor.Config, inductor: bool
) -> Callable[[], Tensor]:
    """The model as `side` runs it. Without Inductor graphs run as they are captured, and rewritten."""
    model = prepared.ours if side == "ours" else prepared.plain
    backend: Any = RewritingBackend(config) if side == "ours" else "eager"
    if not inductor:
        fast = torch.compile(model, backend=backend)
    elif side == "ours":
        names = ("kernel", "precision", "wires")
        options = {f"sage.{name}": getattr(config, name) for name in names}
        fast = torch.compile(model, backend="sage_inductor", options=options)
    else:
        fast = torch.compile(model)
    return lambda: fast(**prepared.inputs)[0]


def graph_breaks(side: str, prepared: Prepared) -> int:
    """How often Dynamo breaks the model's graph. No backend has a say in that. It counts a model's first call: warnings that come
    once are among the breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(prepared.ours if side == "ours" else prepared.plain, backend="eager")(**prepared.inputs)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _first(call: Callable[[], dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """What `call` gives, or the error where it raises on a rank."""
    found, said = {}, ""
    try:
        found = call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:500]
    failed = [text for text in ranks.gathered(said) if text]
    return {"error": failed[0]} if failed else found


@torch.no_grad()
def measure(
    workload: Workload,
    spread: Spread,
    exact: Tensor,
    ranks: Ranks,
    config: sage_inductor.Config,
    repeat: int,
    inductor: bool,
    traces: Path | None = None,
) -> dict[str, Any]:
    """The figures of a case, of both sides that run. Each rank's profiles go to the folder `traces`."""
    row: dict[str, Any] = {side: {} for side in SIDES}
    torch._dynamo.reset()
    prepared = workload.prepare(spread, ranks.device, ranks.dtype)
    config = dataclasses.replace(config, wires=spread.wires)
    calls: dict[str, Callable[[], Tensor]] = {}
    with prepared.inside:
        expected = prepared.mine(exact)
        for side in SIDES:
            if side == "ours" and prepared.ours is prepared.plain:
                row[side].update(row["plain"])
                continue
            row[side].update(_first(lambda side=side: {"graph_breaks": graph_breaks(side, prepared)}, ranks))
        torch._dynamo.reset()
        for side in SIDES:
            if "error" in row[side]:
                continue
            call = compiled(side, prepared, config, inductor)
            start = time.perf_counter()
            row[side].update(_first(lambda call=call: {"output": call()}, ranks))
            if "error" in row[side]:
                continue
            row[side]["first_call_s"] = time.perf_counter() - start
            row[side].update(errors(row[side].pop("output"), expected, ranks))
            calls[side] = call
        if "ours" in calls:
            report = sage_inductor.explain(prepared.ours, **prepared.inputs, config=config)
            # In a ring of diffusers the model calls our operator itself.
            own = sum(1 for found in report.operators if "sage_inductor" in found.operator)
            row["rewritten"], row["sites"] = len(report.rewritten) + own, len(report.sites) + own
        for call in calls.values():
            call()
        times = [[timed(call, ranks) for call in calls.values()] for _ in range(repeat)]
        for side, of_one in zip(calls, zip(*times, strict=True), strict=True):
            row[side]["milliseconds"] = statistics.median(of_one)
        if spread != Spread():
            for side, call in calls.items():
                about = re.sub(r"\W+", "_", f"{workload.model} {spread} {side} rank {ranks.rank}")
                row[side].update(profiled(call, ranks, traces and traces / f"{about}.json.gz"))
    return row


@torch.no_grad()
def exact_output(workload: Workload, ranks: Ranks) -> Tensor:
    """Of one GPU, without a compiler: every rank computes it for itself."""
    alone = workload.prepare(Spread(), ranks.device, ranks.dtype)
    output: Tensor = alone.plain(**alone.inputs)[0]
    return output


def run(
    workloads: Sequence[Workload], wanted: Sequence[Spread], out: Path, ranks: Ranks, config: sage_inductor.Config,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure what `out` lacks, saving after each case; returns all rows."""
    facts: dict[str, Any] = {**machine(), "ranks": ranks.ranks}
    rows = ranks.gathered(json.loads(out.read_text()) if ranks.rank == 0 and out.exists() else [])[0]
    if options.again:
        rows = [row for row in rows if any(row[name] != value for name, value in facts.items())]

    def save() -> None:
        if ranks.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(rows, indent=0) + "\n")

    deadline = time.monotonic() + options.budget
    facts.update(links(ranks))
    same = ("gpu", "torch", "ranks")
    for workload in workloads:
        known = {
            row["way"] for row in rows
            if row["model"] == workload.model and row["tokens"] == workload.tokens
            and all(row[name] == facts[name] for name in same)
        }  # fmt: skip
        missing = [spread for spread in wanted if str(spread) not in known]
        exact = None
        for spread in missing:
            if ranks.gathered(time.monotonic() > deadline)[0]:
                if ranks.rank == 0:
                    sys.stderr.write(
                        f"stopped before {workload.model}, {spread}: {options.budget} s are spent\n"
                    )
                return rows
            about = {
                "model": workload.model,
                "layers": workload.layers,
                "tokens": workload.tokens,
                "way": str(spread),
            }
            reason = workload.not_supported(spread)
            if reason is not None:
                rows.append({**facts, **about, "error": reason})
                save()
                continue
            rows.append({**facts, **about, "error": f"did not end within {options.limit} s"})
            save()
            faulthandler.dump_traceback_later(options.limit, exit=True)
            if exact is None:
                exact = exact_output(workload, ranks)
            row = measure(
                workload,
                spread,
                exact,
                ranks,
                config,
                options.repeat,
                not options.without_inductor,
                options.traces,
            )
            rows[-1] = {**facts, **about, "kernel": config.kernel, "precision": config.precision, **row}
            faulthandler.cancel_dump_traceback_later()
            save()
            if ranks.rank == 0:
                print(said(rows[-1]), flush=True)
            torch._dynamo.reset()
            gc.collect()
            if ranks.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return rows


def said(row: dict[str, Any]) -> str:
    """A row as a line."""
    words = [f"{row['model']}, {row['tokens']:,} tokens, {row['way']}:"]
    for side in SIDES:
        found = row[side]
        if "error" in found:
            words.append(f"{side}: {found['error']}")
            continue
        words.append(f"{side} {found['milliseconds']:.1f} ms, error {found['relative_l2']:.5f}")
        if found.get("hidden") is not None:
            words[-1] += f", {found['hidden']:.0%} of {found['communication_ms']:.1f} ms communication hidden"
    return "\n  ".join(words)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help=f"of {', '.join(WORKLOADS)}; tiny: {', '.join(TINY)}")
    parser.add_argument("--ways", nargs="+", help='such as "Ulysses 2" (default: all for so many ranks)')
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", help="default: auto on a GPU, elsewhere reference")
    parser.add_argument("--precision", default="fast", help="fast, balanced or accurate")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/distributed_<gpu>.json")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of each side, taken in turns")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a case, after which all ends")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, checked before each case")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--traces", type=Path, help="a folder for each rank's profile, as Chrome reads it")
    parser.add_argument(
        "--without-inductor",
        action="store_true",
        help="run graphs as they are captured: soon ready, times say nothing",
    )
    options = parser.parse_args(argv)
    known = TINY if options.tiny else WORKLOADS
    names = options.models or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--models {' '.join(unknown)} (valid: {', '.join(known)})")
    ranks = join(options.device, options.limit)
    ways = {str(spread): spread for spread in spreads(ranks.ranks)}
    wanted = options.ways or list(ways)
    if unknown := [name for name in wanted if name not in ways]:
        parser.error(f"--ways {', '.join(unknown)} (valid on {ranks.ranks} ranks: {', '.join(ways)})")
    kernel = options.kernel or ("auto" if ranks.device.startswith("cuda") else "reference")
    config = sage_inductor.Config(kernel=kernel, precision=options.precision)
    for wires, name in BACKENDS.items():
        sage.register(dataclasses.replace(config, wires=wires), name)
    out = options.out
    if out is None:
        gpu = machine()["gpu"].removeprefix("NVIDIA ").split()[0].lower()
        out = Path(__file__).parent / "results" / f"distributed_{'tiny_' if options.tiny else ''}{gpu}.json"
    rows = run([known[name] for name in names], [ways[name] for name in wanted], out, ranks, config, options)
    dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
