"""Leaving out tiles (`skip_threshold`): the attention kernel's time against the share of tiles that are left out.

    python benchmarks/skip.py --out benchmarks/results/skip_h200.json
    python benchmarks/skip.py --sizes 75600 --head-dims 128 --patterns none stripes
    python benchmarks/skip.py --tiny                     # through Triton's interpreter: that it runs, its times mean nothing

Scores are planted: where a query and a block of 128 keys are about the same, they are higher by HEIGHT. A pattern says where:

    none       nowhere: normal inputs, of which nothing can be left out. What the test itself costs
    stripes    every so many blocks of keys, for all queries
    blocks     at random, another choice for each 128 queries
    band       around the diagonal. Blocks in front of the band are met before it, so that about half of them stay
    sink+band  the same, and in the first block of keys

A row of the JSON has gpu, torch, triton, D, S, H, precision, pattern, of (one in so many blocks is high), skip_threshold, share (by the
oracle, of the first head), ms_off, ms_on, ratio, added (relative L2 of 128 rows against off). Off and on are timed in turns, the
kernel alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from timing import machine
from torch import Tensor

from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.reference.algorithm import tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import SkipTile
from sage_inductor.kernels.triton.launch import TritonAttention
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.tuning.measure import clock_of, interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BLOCK = 128
HEIGHT = 14.0  # natural log; normal noise takes up to 4 of it
NOISE = 0.5
THRESHOLD = 0.001
PATTERNS = ("none", "stripes", "blocks", "band", "sink+band")
ONE_IN = (2, 5, 10)
SAMPLES = 128
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    seq: int
    heads: int
    head_dim: int
    precision: str
    pattern: str
    one_in: int

    def inputs(self) -> Inputs:
        """Query, key and value `[1, heads, seq, head_dim]` in `[1, seq, heads, head_dim]` memory."""
        torch.manual_seed(0)
        shape = 1, self.seq, self.heads, self.head_dim
        noise = 1.0 if self.pattern == "none" else NOISE
        q, k, v = (torch.randn(shape, device=DEVICE) * size for size in (noise, noise, 1.0))
        if self.pattern != "none":
            amplitude = (HEIGHT * self.head_dim**0.5) ** 0.5
            for tensor, about in zip((q, k), self.directions(), strict=True):
                tensor += amplitude * about[torch.arange(self.seq, device=DEVICE) // BLOCK][None, :, None]
        q, k, v = (tensor.to(DTYPE).transpose(1, 2) for tensor in (q, k, v))
        return q, k, v

    def directions(self) -> tuple[Tensor, Tensor]:
        """What each block of queries, and each of keys, is about: `[blocks, head_dim]`, 1 in a channel of its own for each topic."""
        blocks = -(-self.seq // BLOCK)
        number = torch.arange(blocks, device=DEVICE)
        unit = torch.eye(self.head_dim, device=DEVICE)
        if self.pattern == "stripes":
            return unit[0].expand(blocks, -1), unit[0] * (number % self.one_in == 0)[:, None]
        if self.pattern == "blocks":
            topics = torch.randint(self.one_in, (2, blocks), device=DEVICE)
            return unit[topics[0]], unit[topics[1]]
        own = unit[1 + number * self.one_in // blocks]  # one stretch of the sequence after the other
        if self.pattern == "band":
            return own, own
        return own + unit[0], torch.where(number[:, None] == 0, unit[0], own)


def measure(problem: Problem, rounds: int) -> dict[str, Any]:
    q, k, v = problem.inputs()
    outputs, calls = {}, {}
    tile = SkipTile()
    for name, threshold in (("off", 0.0), ("on", THRESHOLD)):
        params = AttentionParams(precision=problem.precision, skip_threshold=threshold)
        out = outputs[name] = torch.empty_like(q)
        call = TritonAttention(q, k, v, None, params, out, None)
        workspace = call.quantize(q, k, v, None)
        calls[name] = lambda call=call, workspace=workspace, out=out: call.attend(workspace, None, out, None)
        tile = SkipTile(call.plan.config.block_m, call.plan.config.block_n)
        calls[name]()
    rows = torch.randperm(problem.seq, device=DEVICE)[:SAMPLES]
    added = relative_l2(outputs["on"][:, :, rows], outputs["off"][:, :, rows])
    share = skipped_share(tile_margins(q[:, :1], k[:, :1], skip_tile=tile), THRESHOLD)
    clock = clock_of(q.device)
    times = {name: [clock(call)] for name, call in calls.items()}
    for _ in range(rounds):
        for name, found in interleaved(calls, clock).items():
            times[name] += found
    off, on = (statistics.median(times[name]) for name in ("off", "on"))
    return {
        **machine(),
        "D": problem.head_dim,
        "S": problem.seq,
        "H": problem.heads,
        "precision": problem.precision,
        "pattern": problem.pattern,
        "of": problem.one_in,
        "skip_threshold": THRESHOLD,
        "share": share,
        "ms_off": off,
        "ms_on": on,
        "ratio": off / on,
        "added": added,
    }


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    for head_dim in options.head_dims:
        for seq in options.sizes:
            for precision in options.precisions:
                for pattern in options.patterns:
                    for one_in in (1,) if pattern == "none" else options.one_in:
                        yield Problem(seq, options.heads, head_dim, precision, pattern, one_in)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 32768, 75600])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", default=["fast"])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument(
        "--one-in", type=int, nargs="+", default=list(ONE_IN), help="blocks, of which one is high"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tiny", action="store_true", help="one head of 256 tokens, for a machine without a GPU"
    )
    options = parser.parse_args(argv)
    if options.tiny:
        options.sizes, options.head_dims, options.heads, options.one_in = [256], [32], 1, [2]
        options.rounds = 0
    rows = []
    sys.stdout.write(
        "| D | tokens | precision | pattern | one in | left out | off, ms | on, ms | ratio | adds |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for problem in problems(options):
        row = measure(problem, options.rounds)
        rows.append(row)
        sys.stdout.write(
            f"| {row['D']} | {row['S']} | {row['precision']} | {row['pattern']} | {row['of']} | {row['share']:.1%} | "
            f"{row['ms_off']:.3f} | {row['ms_on']:.3f} | {row['ratio']:.2f} | {row['added']:.5f} |\n"
        )
        sys.stdout.flush()
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
