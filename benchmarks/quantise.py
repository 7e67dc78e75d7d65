"""Quantisation: time and bandwidth of everything before the attention kernel, beside a plain copy.

    python benchmarks/quantise.py
    python benchmarks/quantise.py --smoothings mean both

Bytes are those that must move: bf16 query, key and value read once, their 8-bit (value: 16-bit for
"accurate") forms written once. `share` is the part of the whole attention call that quantisation takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from timing import machine, median_ms, sets_beyond_l2

from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.smoothing import SMOOTHINGS
from sage_inductor.kernels.triton.launch import TritonAttention

HEADS = 32


def copy_bandwidth() -> float:
    """GB/s read plus written by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms([lambda: target.copy_(source)]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--smoothings", nargs="+", choices=tuple(SMOOTHINGS), default=["mean"])
    options = parser.parse_args()
    copy = copy_bandwidth()
    rows = []
    sys.stdout.write(
        "| D, S, precision, smoothing | us | GB/s | of a copy | share |\n|---|---|---|---|---|\n"
    )
    for head_dim in (64, 128):
        for seq in options.sizes:
            for precision, smoothing in product(("fast", "balanced", "accurate"), options.smoothings):
                batch = 4 if seq <= 4096 else 1
                shape = batch, seq, HEADS, head_dim
                elements = batch * seq * HEADS * head_dim
                calls, wholes = [], []
                for _ in range(sets_beyond_l2(6 * elements)):
                    q, k, v = (
                        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                        for _ in range(3)
                    )
                    out = torch.empty_like(q)
                    params = AttentionParams(precision=precision, smoothing=smoothing)
                    call = TritonAttention(q, k, v, None, params, out, None)
                    calls.append(partial(call.quantize, q, k, v, None))
                    wholes.append(partial(call, q, k, v, None, out, None))
                ms = median_ms(calls)
                share = ms / median_ms(wholes)
                gigabytes = elements * (6 + 2 + (2 if precision == "accurate" else 1)) / ms / 1e6
                rows.append(
                    {**machine(), "D": head_dim, "S": seq, "B": batch, "H": HEADS, "precision": precision}
                    | {"smoothing": smoothing}
                    | {"us": round(1000 * ms, 1), "gb_per_s": round(gigabytes), "copy_gb_per_s": round(copy)}
                    | {"share": round(share, 4)}
                )
                sys.stdout.write(
                    f"| {head_dim} {seq} {precision} {smoothing} | {1000 * ms:.0f} | {gigabytes:.0f} | {gigabytes / copy:.0%} "
                    f"| {share:.1%} |\n"
                )
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
