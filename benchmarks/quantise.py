"""Quantisation: time and bandwidth of everything before the attention kernel, beside a plain copy, and what smoothing adds.

    python benchmarks/quantise.py
    python benchmarks/quantise.py --smoothings mean equalise rotate both --out quantise.json

Bytes are those that must move: bf16 query, key and value read once, their 8-bit (value: 16-bit for
"accurate") forms written once. `us` is quantisation alone, `e2e_us` the whole attention call, `share` the first's part of the
second. The smoothings of a row's problem take turns; `of_mean` and `e2e_of_mean` are the medians of their ratios to the first.
The attention kernel is the GPU's own: hopper's where it has one, else Triton's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import machine, median_ms, sets_beyond_l2

from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.smoothing import SMOOTHINGS
from sage_inductor.kernels.triton.launch import TritonAttention

HEADS = 32
ROUNDS = 5  # of the smoothings, in turns
TARGET_MS = 15.0  # of a smoothing's calls in one round

Calls = list[Callable[[], Any]]


def copy_bandwidth() -> float:
    """GB/s read plus written by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms([lambda: target.copy_(source)]) / 1e6


def attention() -> type[TritonAttention]:
    """The attention of this GPU."""
    if torch.cuda.get_device_capability()[0] != 9:
        return TritonAttention
    from sage_inductor.kernels.hopper.launch import HopperAttention

    return HopperAttention


def calls_of(batch: int, seq: int, head_dim: int, params: AttentionParams) -> tuple[Calls, Calls]:
    """(quantisations, whole calls) on as many sets of inputs as keep them out of the L2 cache."""
    quantisations: Calls = []
    wholes: Calls = []
    for _ in range(sets_beyond_l2(6 * batch * seq * HEADS * head_dim)):
        q, k, v = (
            torch.randn(batch, seq, HEADS, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        out = torch.empty_like(q)
        call = attention()(q, k, v, None, params, out, None)
        quantisations.append(partial(call.quantize, q, k, v, None))
        wholes.append(partial(call, q, k, v, None, out, None))
    return quantisations, wholes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--precisions", nargs="+", default=["fast", "balanced", "accurate"])
    parser.add_argument("--smoothings", nargs="+", choices=tuple(SMOOTHINGS), default=["mean"])
    options = parser.parse_args()
    copy = copy_bandwidth()
    rows = []
    sys.stdout.write(
        "| D, S, precision, smoothing | us | of the first | GB/s | of a copy | end to end us | of the first | share |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    for head_dim, seq, precision in product(options.head_dims, options.sizes, options.precisions):
        batch = 4 if seq <= 4096 else 1
        elements = batch * seq * HEADS * head_dim
        contenders = [
            calls_of(batch, seq, head_dim, AttentionParams(precision=precision, smoothing=smoothing))
            for smoothing in options.smoothings
        ]
        # [round][smoothing] = (quantisation, whole call)
        times = [
            [tuple(median_ms(calls, TARGET_MS) for calls in contender) for contender in contenders]
            for _ in range(ROUNDS)
        ]
        for i, smoothing in enumerate(options.smoothings):
            ms, whole = (statistics.median(row[i][part] for row in times) for part in range(2))
            of_mean, e2e_of_mean = (
                statistics.median(row[i][part] / row[0][part] for row in times) for part in range(2)
            )
            gigabytes = elements * (6 + 2 + (2 if precision == "accurate" else 1)) / ms / 1e6
            rows.append(
                {**machine(), "D": head_dim, "S": seq, "B": batch, "H": HEADS, "precision": precision}
                | {"smoothing": smoothing, "us": round(1000 * ms, 1), "of_mean": round(of_mean, 4)}
                | {"gb_per_s": round(gigabytes), "copy_gb_per_s": round(copy)}
                | {"e2e_us": round(1000 * whole, 1), "e2e_of_mean": round(e2e_of_mean, 4)}
                | {"share": round(ms / whole, 4)}
            )
            sys.stdout.write(
                f"| {head_dim} {seq} {precision} {smoothing} | {1000 * ms:.0f} | {of_mean:.3f} | {gigabytes:.0f} "
                f"| {gigabytes / copy:.0%} | {1000 * whole:.0f} | {e2e_of_mean:.4f} | {ms / whole:.1%} |\n"
            )
            sys.stdout.flush()
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
