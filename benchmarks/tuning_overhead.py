"""What choosing by measurement costs a compile: with a warm cache, against choosing by the table, and the first time.

    python benchmarks/tuning_overhead.py --json tuning_overhead.json

Each compile is a process of its own, with Inductor's graph cache off; the two ways take turns, so that a machine that
slows down slows both. `choice_s` is what the pass spends in `choose`, `compile_s` the whole first call. The model has
one attention in each layer, in as many shapes as `--shapes` says; sites whose choice is the same in both ways make
the compiles comparable (`rewritten`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        dim = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """`layers` layers; each of `shapes` groups sees the sequence at another length."""

    def __init__(self, layers: int, shapes: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            nn.Sequential(*(Layer(16, 64) for _ in range(layers // shapes))) for _ in range(shapes)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for index, group in enumerate(self.groups):
            total = total + group(x[:, : x.shape[1] // (index + 1)]).float().mean()
        return total


def compile_once(tune: str, cache: str, layers: int, shapes: int, seq: int, device: str) -> dict[str, Any]:
    """Figures of one compile in this process."""
    from sage_inductor.rewriting import decision

    spent, choices = 0.0, []
    choose = decision.choose

    def timed(*args: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        choices.append(choose(*args))
        spent += time.perf_counter() - start
        return choices[-1]

    decision.choose = timed
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Model(layers, shapes).eval().to(device, dtype)
    x = torch.randn(1, seq, 1024, device=device, dtype=dtype)
    options = {"sage.tune": tune, "sage.cache_dir": cache, "fx_graph_cache": False}
    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend="sage_inductor", options=options, dynamic=False)(x).item()
    total = time.perf_counter() - start
    rewritten = sum(choice.kernel is not None for choice in choices)
    return {"compile_s": total, "choice_s": spent, "sites": len(choices), "rewritten": rewritten}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shapes", type=int, default=4)
    parser.add_argument("--seq", type=int, default=16384)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--device", default="cuda", help="on a CPU nothing is chosen: that only tries the script"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("TUNE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = options.layers, options.shapes, options.seq, options.device
    if options.child:
        sys.stdout.write(json.dumps(compile_once(*options.child, *size)) + "\n")
        return
    passed = ["--layers", "--shapes", "--seq", "--device"]
    command = [
        sys.executable,
        __file__,
        *(str(part) for pair in zip(passed, size, strict=True) for part in pair),
    ]

    def child(tune: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, "--child", tune, cache], stdout=subprocess.PIPE, text=True, check=True
        )
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        sys.stderr.write(f"{tune}: {figures}\n")
        return figures

    with tempfile.TemporaryDirectory() as cache:
        child("table")  # fills the caches of Triton and of the C++ compiler
        cold = child("measure")
        runs = {tune: [] for tune in ("table", "measure")}
        for _ in range(options.runs):
            for tune, done in runs.items():
                done.append(child(tune))
    medians = {
        tune: {key: statistics.median(figures[key] for figures in done) for key in done[0]}
        for tune, done in runs.items()
    }
    result = {
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cold": cold,
        "warm": medians["measure"],
        "table": medians["table"],
        "warm_over_table": medians["measure"]["compile_s"] / medians["table"]["compile_s"],
        "choice_share": medians["measure"]["choice_s"] / medians["measure"]["compile_s"],
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
