"""What one attention costs the host in a compiled model on a GPU: should the operator stay opaque to Inductor?

    python benchmarks/launch_overhead.py --json launch_overhead.json

Per sequence length, in us per call: "host" is until the call returns, "total" is the pace of calls in a row, the GPU's
work included; where total is well above host, the GPU hides the host. Forms: SDPA; the opaque operator; both
under mode="reduce-overhead" (CUDA graphs); and three kernels that do nothing, launched by Inductor's wrapper from a
triton_op with as many arguments as ours have: the least that a triton_op of our three kernels could cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine
from torch import Tensor

import sage_inductor  # noqa: F401  registers the operator

LENGTHS = (256, 1024, 4096, 8192)
HEADS, HEAD_DIM = 16, 128
CALLS = 40  # in a row: few enough that the queue of launches never fills up and holds the host


def host_and_total_us(call: Callable[[], Any], rounds: int = 9) -> tuple[float, float]:
    """Median over rounds of `CALLS` calls."""
    for _ in range(4):  # compiles, warms up, records CUDA graphs
        call()
    host, total = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        host.append((returned - start) / CALLS * 1e6)
        total.append((time.perf_counter() - start) / CALLS * 1e6)
    return median(host), median(total)


def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention between operations that Inductor compiles."""
    return F.scaled_dot_product_attention(q * 2, k, v) + 1


def three_launches() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same block, with a triton_op of three empty kernels for the attention."""
    import triton

    @triton.jit  # type: ignore[untyped-decorator]
    def nothing(  # type: ignore[no-untyped-def]
        p0, p1, p2, p3, p4, p5, p6, p7,
        n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15, n16, n17, n18, n19, n20, n21,
    ):  # fmt: skip
        pass

    @torch.library.triton_op("sage_inductor_benchmarks::three_launches", mutates_args={})
    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        work = [torch.empty(q.numel(), dtype=torch.int8, device=q.device) for _ in range(4)]
        for _ in range(3):
            torch.library.wrap_triton(nothing)[(1,)](q, k, v, out, *work, *range(2, 24))
        return out

    return lambda q, k, v: operator(q * 2, k, v) + 1


def forms(precision: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    ours = {"sage.kernel": "triton", "sage.precision": precision}
    graphs = {"mode": "reduce-overhead"}
    return {
        "SDPA": torch.compile(block),
        "opaque operator": torch.compile(block, backend="sage_inductor", options=ours),
        "SDPA, CUDA graph": torch.compile(block, mode="reduce-overhead"),
        "opaque operator, CUDA graph": torch.compile(block, backend="sage_inductor", options=ours | graphs),
        "triton_op of three empty kernels": torch.compile(three_launches()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    rows = []
    for tokens in LENGTHS:
        torch._dynamo.reset()
        q, k, v = (
            torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        for name, function in forms(options.precision).items():
            with torch.no_grad():
                host, total = host_and_total_us(partial(function, q, k, v))
            rows.append({**machine(), "tokens": tokens, "form": name, "host_us": host, "total_us": total})
            print(f"{tokens:6} tokens  {name:34}host {host:8.1f} us   total {total:8.1f} us", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
