"""Whole models: plain torch.compile against backend="sage_inductor", each kernel in each precision.

    python benchmarks/model.py                        # all models on a GPU; goes on where it stopped
    python benchmarks/model.py --models wan_1.3B --variants auto/fast hopper/balanced --budget 300
    python benchmarks/model.py --tiny                 # small models, any machine

Needs `pip install diffusers transformers`; the models are those of examples/, made from their configurations with
random weights, two layers each (Flux: two of each kind), which tell the time of all. A row of the JSON has gpu, torch,
triton, model, layers, tokens, kernel, precision, milliseconds (median; null with the reasons where every attention
stays SDPA), plain_milliseconds (of plain torch.compile, timed in turns with it), graph_breaks, rewritten of sites,
relative_l2 and max_error of the model's output against plain torch.compile's. Rows that the file has are not measured
again, on the same GPU with the same torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn

from sage_inductor import kernels

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import flux_image  # noqa: E402
import llama_prefill  # noqa: E402
import wan_video  # noqa: E402
from comparison import compare, show  # noqa: E402


@dataclass(frozen=True)
class Workload:
    """A model with its inputs; `build(device, dtype)` makes them."""

    model: str
    layers: int
    tokens: int
    build: Callable[[str, torch.dtype], tuple[nn.Module, dict[str, Any]]]


def wan(name: str, layers: int = 2) -> Workload:
    size = wan_video.SIZES[name]
    latents = frames, height, width = wan_video.LATENTS[size.resolution]
    tokens = frames * (height // 2) * (width // 2)
    return Workload(f"Wan {name}", layers, tokens, lambda *to: wan_video.build(size, latents, layers, *to))


def flux(name: str, layers: int = 2) -> Workload:
    size = flux_image.SIZES[name]
    return Workload(f"Flux {name}", 2 * layers, size.tokens, lambda *to: flux_image.build(size, layers, *to))


def llama(name: str, layers: int = 2) -> Workload:
    size = llama_prefill.SIZES[name]
    return Workload(
        f"Llama {name}", layers, size.tokens,
        lambda *to: llama_prefill.build(size, layers, 1, size.tokens, *to),
    )  # fmt: skip


WORKLOADS = {"wan_1.3B": wan("1.3B"), "wan_14B": wan("14B"), "flux": flux("dev"), "llama_8B": llama("8B")}
TINY = {"wan": wan("tiny", 1), "flux": flux("tiny", 1), "llama": llama("tiny", 1)}


def variants(device: str, tiny: bool) -> list[tuple[str, str]]:
    """(kernel, precision): "auto" in all precisions, then every kernel that can run in its own; the reference
    for tiny models only."""
    found = [("auto", precision) for precision in kernels.PRECISIONS]
    for name, reasons in kernels.available(device).items():
        if not reasons and (tiny or name != "reference"):
            found += [
                (name, precision)
                for precision in kernels.PRECISIONS
                if precision in kernels.get(name).precisions
            ]
    return found


def run(
    workloads: Sequence[Workload],
    out: Path,
    device: str,
    wanted: Sequence[tuple[str, str]],
    repeat: int,
    budget: float,
) -> list[dict[str, Any]]:
    """Measure what `out` lacks of the `wanted` variants, saving after each row, until `budget` seconds are spent;
    returns all rows."""
    facts, deadline = machine(), time.monotonic() + budget
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    for workload in workloads:
        known = {
            (row["kernel"], row["precision"])
            for row in rows
            if row["model"] == workload.model and all(row[name] == facts[name] for name in ("gpu", "torch"))
        }
        missing = [variant for variant in wanted if variant not in known]
        if not missing:
            continue
        if time.monotonic() > deadline:
            sys.stderr.write(f"stopped before {workload.model}: {budget} s are spent\n")
            break
        torch._dynamo.reset()
        model, inputs = workload.build(device, dtype)
        results = []
        for result in compare(model, inputs, missing, repeat):
            results.append(result)
            if (result.kernel, result.precision) not in known:
                about = {"model": workload.model, "layers": workload.layers, "tokens": workload.tokens}
                rows.append({**facts, **about, **asdict(result)})
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(rows, indent=0) + "\n")
            if time.monotonic() > deadline and len(results) <= len(missing):
                sys.stderr.write(f"stopped in {workload.model}: {budget} s are spent\n")
                break
        show(results, None)
        del model, inputs
        torch._dynamo.reset()
        gc.collect()
        if dtype == torch.bfloat16:
            torch.cuda.empty_cache()
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help=f"of {', '.join(WORKLOADS)}; tiny: {', '.join(TINY)}")
    parser.add_argument("--tiny", action="store_true", help="small models, and the reference kernel too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", metavar="KERNEL/PRECISION", help="default: all that can run")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/model_<gpu>.json")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of each, taken in turns")
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds, checked before each model and row"
    )
    options = parser.parse_args(argv)
    known = TINY if options.tiny else WORKLOADS
    names = options.models or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--models {' '.join(unknown)} (valid: {', '.join(known)})")
    out = options.out
    if out is None:
        out = Path(__file__).parent / "results" / f"model_{'tiny_' if options.tiny else ''}{gpu_name()}.json"
    wanted = variants(options.device, options.tiny)
    if options.variants is not None:
        by_name = {"/".join(variant): variant for variant in wanted}
        if unknown := [name for name in options.variants if name not in by_name]:
            parser.error(f"--variants {' '.join(unknown)} (valid here: {', '.join(by_name)})")
        wanted = [by_name[name] for name in options.variants]
    workloads = [known[name] for name in names]
    return run(workloads, out, options.device, wanted, options.repeat, options.budget)


def gpu_name() -> str:
    """ "h100" of "NVIDIA H100 80GB HBM3"; "cpu" without a GPU."""
    return machine()["gpu"].removeprefix("NVIDIA ").split()[0].lower()


if __name__ == "__main__":
    main()
