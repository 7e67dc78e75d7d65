"""Attention under masks that differ from query to query and come as tensors: ms of the kernels triton and hopper, and of SDPA.

    python benchmarks/masks.py --out results.json            # as it is launched
    python benchmarks/masks.py --tune --sizes 8191           # and in other launch configurations of triton
    python benchmarks/masks.py --masks random causal --sizes 2048 4096 8192 16384 --head-dims 64 128

Bool masks: causal; a window of 1,024 keys before and behind; documents of an eighth, a quarter, half and an eighth of the tokens
(block-diagonal); a prefix of a quarter that all see, causal behind it; random, of which no block is whole and none ruled out.
Additive ones (bfloat16): causal without the first eighth of the keys, as padding on the left leaves it (0 and -inf), and a bias
(normal numbers). They are shared by all heads, "random" and "bias" also one for each head of a sequence. A row of the JSON has gpu,
torch, triton, D, S, B, H, precision, mask and ms, by name: "sdpa" with the mask, "sdpa is_causal" without it, "triton" and its
configurations, and "hopper", where it runs, for bool masks; "hopper is_causal", "hopper no mask": without it. "read everywhere":
without a look at the blocks before. Everything from bf16 to bf16, quantisation included, medians of five calls in turns; beyond 10%
of SDPA's output a call counts as wrong and ends the run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.triton import launch
from sage_inductor.kernels.triton.configs import LaunchConfig
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.measurement.timers import gpu_ms, host_ms

HEADS = 32
PAIRS = 2**26  # of a query and a key, in all sequences together
ROUNDS = 5
CONFIGS = (
    LaunchConfig(64, 64, 4),
    LaunchConfig(64, 128, 4),
    LaunchConfig(64, 128, 4, max_registers=168),
    LaunchConfig(64, 64, 8),
    LaunchConfig(64, 128, 8),
    LaunchConfig(128, 64, 8),
    LaunchConfig(128, 128, 8),
)


def masks(size: int, device: str) -> Iterator[tuple[str, Tensor]]:
    i, j = torch.arange(size, device=device)[:, None], torch.arange(size, device=device)
    causal = i >= j
    yield "causal", causal
    yield "window", (i - j).abs() <= 1024
    ends = torch.tensor([size // 8, size * 3 // 8, size * 7 // 8], device=device)
    document = torch.bucketize(torch.arange(size, device=device), ends, right=True)
    yield "documents", document[:, None] == document
    yield "prefix", causal | (j < size // 4)
    bias = torch.zeros(size, size, device=device, dtype=torch.bfloat16)
    yield "padded on the left, additive", bias.masked_fill_(~(causal & (j >= size // 8)), -torch.inf)
    for name, shape in (("", (size, size)), (", one a head", (HEADS, size, size))):
        yield f"random{name}", torch.rand(shape, device=device) > 0.5
        yield f"bias{name}", torch.randn(shape, device=device, dtype=torch.bfloat16)


def contenders(
    q: Tensor, k: Tensor, v: Tensor, name: str, mask: Tensor, precision: str, tune: bool
) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, mask)}
    if name == "causal":
        calls["sdpa is_causal"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    limit = launch.MASK_BLOCKS_KEYS
    for config in (None, *(CONFIGS if tune else ())):
        label = "triton" if config is None else f"triton {described(config)}"
        for suffix, least in (("", limit), (", read everywhere", sys.maxsize)):
            launch.MASK_BLOCKS_KEYS = least
            out = torch.empty_like(q)
            call = launch.TritonAttention(
                q, k, v, mask, AttentionParams(precision=precision), out, None, config=config
            )

            def run(call: launch.TritonAttention = call, out: Tensor = out) -> Tensor:
                call(q, k, v, mask, out, None)
                return out

            calls[label + suffix] = run
            if not call.mask.by_blocks:
                break
    launch.MASK_BLOCKS_KEYS = limit
    if mask.dtype == torch.bool and not kernels.get("hopper").unavailable_reasons(q.device):
        calls |= on_hopper(q, k, v, name, mask, precision)
    # Rows that see no key are 0 in the one and may be NaN in the other.
    expected = calls["sdpa"]().nan_to_num()
    for label, call in calls.items():
        if label == "hopper no mask":
            continue
        if (error := relative_l2(call().nan_to_num(), expected)) > 0.1:
            raise SystemExit(f"{label} under {name}, {tuple(q.shape)}: relative L2 {error:.3f} from SDPA")
    return calls


def on_hopper(
    q: Tensor, k: Tensor, v: Tensor, name: str, mask: Tensor, precision: str
) -> dict[str, Callable[[], Tensor]]:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    def prepared(given: Tensor | None, is_causal: bool) -> Callable[[], Tensor]:
        out = torch.empty_like(q)
        params = AttentionParams(precision=precision, is_causal=is_causal)
        call = HopperAttention(q, k, v, given, params, out, None)

        def run() -> Tensor:
            call(q, k, v, given, out, None)
            return out

        return run

    calls = {"hopper": prepared(mask, False)}
    if name == "causal":
        calls["hopper is_causal"] = prepared(None, True)
    if name == "random":
        calls["hopper no mask"] = prepared(None, False)
    return calls


def described(config: LaunchConfig) -> str:
    registers = f" {config.max_registers} registers" if config.max_registers else ""
    return f"{config.block_m}x{config.block_n} {config.num_warps} warps{registers}"


def measure(
    calls: dict[str, Callable[[], Tensor]], timer: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in random.sample(list(calls.items()), len(calls)):
            call()
            times[name].append(timer(call))
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("masks.json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=(2048, 4096, 8191, 8192))
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 96, 128, 192))
    parser.add_argument("--precisions", nargs="+", default=("fast", "balanced", "accurate"))
    parser.add_argument("--masks", nargs="+", help="of these names only (default: all)")
    parser.add_argument("--tune", action="store_true", help="time other launch configurations, too")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    options = parser.parse_args(argv)
    timer = gpu_ms if options.device == "cuda" else host_ms
    torch.manual_seed(0)
    random.seed(0)
    deadline = time.monotonic() + options.budget
    rows: list[dict[str, Any]] = []
    for precision in options.precisions:
        for head_dim in options.head_dims:
            for size in options.sizes:
                batch = max(1, PAIRS // size**2)
                shape = batch, size, HEADS, head_dim
                q, k, v = (
                    torch.randn(shape, device=options.device, dtype=torch.bfloat16).transpose(1, 2)
                    for _ in range(3)
                )
                for name, mask in masks(size, options.device):
                    if options.masks is not None and name not in options.masks:
                        continue
                    if time.monotonic() > deadline:
                        sys.stderr.write(f"stopped: {options.budget} s are spent\n")
                        return rows
                    ms = measure(contenders(q, k, v, name, mask, precision, options.tune), timer)
                    rows.append(
                        {**machine(), "D": head_dim, "S": size, "B": batch, "H": HEADS}
                        | {"precision": precision, "mask": name, "ms": ms}
                    )
                    text = ", ".join(f"{label} {value:.3f}" for label, value in ms.items())
                    sys.stdout.write(f"{precision} {head_dim}, {batch} x {size}, {name}: {text}\n")
                    options.out.write_text(json.dumps(rows, indent=0) + "\n")
    return rows


if __name__ == "__main__":
    main()
