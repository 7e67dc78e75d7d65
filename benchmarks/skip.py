"""Leaving out tiles (`skip_threshold`): the attention kernel's time against the share of tiles that are left out.

    python benchmarks/skip.py --out benchmarks/results/skip_h200.json
    python benchmarks/skip.py --kernels hopper --sizes 75600 --head-dims 128 --by sample
    python benchmarks/skip.py --patterns none stripes blocks band sink+band video --one-in 2 5 10 --thresholds 0.001 0.0001
    python benchmarks/skip.py --tiny                     # through Triton's interpreter: that it runs, its times mean nothing

Scores are planted: where a query and a block of 128 keys are about the same, they are higher by HEIGHT. A pattern says where:

    none       nowhere: normal inputs, of which nothing can be left out. What the test itself costs
    stripes    every so many blocks of keys, for all queries
    blocks     at random, another choice for each 128 queries
    band       around the diagonal. Blocks in front of the band are met before it, so that about half of them stay
    sink+band  the same, and in the first block of keys
    video      nothing is planted: queries, keys and values change slowly along frames of 45 by 80 tokens, with noise

A row of the JSON has gpu, torch, triton, kernel, D, S, H, precision, pattern, of (one in so many blocks is high), skip_threshold, skip_by,
share (by the oracle, of the first head), missed (the share of all tiles that a sample leaves out although some query has a weight
above the threshold there), ms_off, ms_on and ratio (the kernel alone), ms_lists (what a sample costs before it: the lists), with_lists
(the ratio with them), e2e_off, e2e_on and e2e_ratio (with the quantisation and the lists), added, error_off and error_on. All are timed
in turns, as often as they fit into --limit seconds for each row.

The last three are relative L2 of 128 rows of the first head. `added` is what leaving out tiles costs by itself: attention in float64
without the oracle's tiles against that over all keys; no kernel has a part in it. error_off and error_on are the kernel's outputs
against attention in float64 over all keys: what 8 bits cost, and both together. (The two outputs against each other would not tell
what skipping adds: they visit keys in different orders, and their roundings differ.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from timing import machine
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.reference.algorithm import tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import DECIDERS, SkipTile, log2_threshold
from sage_inductor.kernels.triton.launch import TritonAttention
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.tuning.measure import clock_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BLOCK = 128
HEIGHT = 14.0  # natural log; normal noise takes up to 4 of it
NOISE = 0.5
THRESHOLD = 0.001
PATTERNS = ("none", "stripes", "blocks", "band", "sink+band", "video")
NOT_PLANTED = ("none", "video")
FRAME = (45, 80)
ONE_IN = (2, 5)  # half of the blocks can be left out, and four in five
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
    kernel: str = "triton"
    skip_by: str = "scores"
    threshold: float = THRESHOLD

    def inputs(self) -> Inputs:
        """Query, key and value `[1, heads, seq, head_dim]` in `[1, seq, heads, head_dim]` memory."""
        torch.manual_seed(0)
        if self.pattern == "video":
            return self.video()
        shape = 1, self.seq, self.heads, self.head_dim
        noise = 1.0 if self.pattern == "none" else NOISE
        q, k, v = (torch.randn(shape, device=DEVICE) * size for size in (noise, noise, 1.0))
        if self.pattern != "none":
            for tensor, planted in zip((q, k), self.planted(), strict=True):
                tensor += planted[None, :, None]
        q, k, v = (tensor.to(DTYPE).transpose(1, 2) for tensor in (q, k, v))
        return q, k, v

    def video(self) -> Inputs:
        """Query and key share a field that is smooth over some 4 frames and 4 tokens each way; scores have a deviation of 2 and more."""
        frames = -(-self.seq // (FRAME[0] * FRAME[1]))
        coarse = torch.randn(
            1, self.heads * self.head_dim, frames // 4 + 2, FRAME[0] // 4, FRAME[1] // 4, device=DEVICE
        )
        field = F.interpolate(coarse, size=(frames, *FRAME), mode="trilinear")
        smooth = field.reshape(self.heads, self.head_dim, -1)[..., : self.seq].mT / field.std()
        q, k, v = (
            (size * smooth + noise * torch.randn_like(smooth))[None].transpose(1, 2).to(DTYPE).contiguous()
            for size, noise in ((1.2, 0.7), (1.2, 0.7), (1.0, 0.5))
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def planted(self) -> tuple[Tensor, Tensor]:
        """What is added to the queries, and to the keys, of every head: `[seq, head_dim]`. Scores are HEIGHT where both are about the
        same."""
        amplitude = (HEIGHT * self.head_dim**0.5) ** 0.5
        block = torch.arange(self.seq, device=DEVICE) // BLOCK
        q, k = (amplitude * about[block] for about in self.directions())
        return q, k

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


def attention_of(kernel: str) -> type[TritonAttention]:
    """The calls of `kernel`."""
    if kernel == "triton":
        return TritonAttention
    from sage_inductor.kernels.hopper.launch import HopperAttention

    return HopperAttention


def what_tiles_cost(
    inputs: Inputs, margins: Tensor, tile: SkipTile, threshold: float, rows: Tensor
) -> tuple[Tensor, float]:
    """(attention of `rows` of the first head over all keys `[1, 1, rows, head_dim]`, and what leaving out the tiles below `threshold`
    costs: the relative L2 of attention without them against it). Both in float64. `margins` are the oracle's, of the first head."""
    q, k, v = (tensor[:1, :1] for tensor in inputs)
    # Whole blocks of keys: the last one may end behind the last key.
    kept = (margins[:1, :1] >= log2_threshold(threshold))[:, :, rows // tile.rows]
    mask = kept.repeat_interleave(tile.keys, 3)[..., : k.shape[2]]
    whole, _ = float64_attention(q, k, v, rows=rows)
    without, _ = float64_attention(q[:, :, rows], k, v, mask)
    return whole, relative_l2(without, whole)


def measure(problem: Problem, limit: float) -> dict[str, Any]:
    """Times the calls once, and then in turns for as long as another turn fits into `limit` seconds."""
    q, k, v = problem.inputs()
    outputs, calls = {}, {}
    by = {"skip_by": problem.skip_by}
    tile = None
    for name, threshold in (("off", 0.0), ("on", problem.threshold)):
        params = AttentionParams(precision=problem.precision, skip_threshold=threshold, **by)
        out = outputs[name] = torch.empty_like(q)
        call = attention_of(problem.kernel)(q, k, v, None, params, out, None)
        workspace = call.quantize(q, k, v, None)

        def attend(call: TritonAttention = call, workspace: Tensor = workspace, out: Tensor = out) -> None:
            call.attend(workspace, None, out, None)

        def whole(call: TritonAttention = call, out: Tensor = out) -> None:
            call.attend(call.quantize(q, k, v, None), None, out, None)

        calls[f"ms_{name}"], calls[f"e2e_{name}"] = attend, whole
        tile = call.skip_tile
        attend()  # compiles
        if threshold and problem.skip_by == "sample":
            calls["ms_lists"] = lambda call=call, workspace=workspace: call.list_blocks(workspace, None)
    assert tile is not None
    if tile.starts is not None:
        tile = tile._replace(starts=tile.starts[:, :1])
    margins = tile_margins(q[:, :1], k[:, :1], skip_tile=tile, **by)
    share, missed = skipped_share(margins, problem.threshold), 0.0
    rows = torch.randperm(problem.seq, device=DEVICE)[:SAMPLES]
    exact, added = what_tiles_cost((q, k, v), margins, tile, problem.threshold, rows)
    errors = {name: relative_l2(out[:1, :1, rows], exact) for name, out in outputs.items()}
    if problem.skip_by == "sample":
        of_all = tile_margins(q[:, :1], k[:, :1], skip_tile=tile, **by, sample_step=1)
        bound = log2_threshold(problem.threshold)
        missed = float(((margins < bound) & (of_all >= bound)).float().mean())
    clock = clock_of(q.device)
    began = time.perf_counter()
    times = {name: [clock(call)] for name, call in calls.items()}
    turn = time.perf_counter() - began
    while time.perf_counter() - began + turn <= limit:
        for name in reversed(calls) if len(times["ms_off"]) % 2 else calls:
            times[name].append(clock(calls[name]))
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {
        **machine(),
        "kernel": problem.kernel,
        "D": problem.head_dim,
        "S": problem.seq,
        "H": problem.heads,
        "precision": problem.precision,
        "pattern": problem.pattern,
        "of": problem.one_in,
        "skip_threshold": problem.threshold,
        "skip_by": problem.skip_by,
        "share": share,
        "missed": missed,
        **ms,
        "ratio": ms["ms_off"] / ms["ms_on"],
        "with_lists": ms["ms_off"] / (ms["ms_on"] + ms.get("ms_lists", 0.0)),
        "e2e_ratio": ms["e2e_off"] / ms["e2e_on"],
        "added": added,
        "error_off": errors["off"],
        "error_on": errors["on"],
    }


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    for head_dim in options.head_dims:
        for seq in options.sizes:
            for precision in options.precisions:
                for pattern in options.patterns:
                    for one_in in (1,) if pattern in NOT_PLANTED else options.one_in:
                        for kernel in options.kernels:
                            for threshold in options.thresholds:
                                for skip_by in options.by:
                                    yield Problem(
                                        seq,
                                        options.heads,
                                        head_dim,
                                        precision,
                                        pattern,
                                        one_in,
                                        kernel,
                                        skip_by,
                                        threshold,
                                    )


def available() -> list[str]:
    """The kernels that can be timed here."""
    return [name for name in ("hopper", "triton") if not kernels.get(name).unavailable_reasons()]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 32768, 75600])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", default=["fast"])
    parser.add_argument("--kernels", nargs="+", choices=("hopper", "triton"), default=available())
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["none", "stripes"])
    parser.add_argument("--by", nargs="+", choices=DECIDERS, default=list(DECIDERS))
    parser.add_argument("--thresholds", type=float, nargs="+", default=[THRESHOLD])
    parser.add_argument(
        "--one-in", type=int, nargs="+", default=list(ONE_IN), help="blocks, of which one is high"
    )
    parser.add_argument(
        "--limit", type=float, default=4.0, help="seconds that a row is timed for (default: %(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="one head of 256 tokens, for a machine without a GPU"
    )
    options = parser.parse_args(argv)
    if options.tiny:
        options.sizes, options.head_dims, options.heads, options.one_in = [256], [32], 1, [2]
        options.limit = 0.0
    rows = []
    sys.stdout.write(
        "| kernel | D | tokens | precision | pattern | one in | by | threshold | left out | missed | off, ms | on, ms | lists, ms | "
        "ratio | with lists | end to end | adds | error off | on |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for problem in problems(options):
        row = measure(problem, options.limit)
        rows.append(row)
        sys.stdout.write(
            f"| {row['kernel']} | {row['D']} | {row['S']} | {row['precision']} | {row['pattern']} | {row['of']} | "
            f"{row['skip_by']} | {row['skip_threshold']:g} | {row['share']:.1%} | {row['missed']:.2%} | "
            f"{row['ms_off']:.3f} | {row['ms_on']:.3f} | {row.get('ms_lists', 0.0):.3f} | {row['ratio']:.2f} | "
            f"{row['with_lists']:.2f} | {row['e2e_ratio']:.2f} | {row['added']:.5f} | {row['error_off']:.4f} | {row['error_on']:.4f} |\n"
        )
        sys.stdout.flush()
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
