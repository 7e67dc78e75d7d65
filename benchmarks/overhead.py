"""What the package itself costs on the CPU: an eager operator call, the pass over 100 sites, its share of a compile.

    python benchmarks/overhead.py

The operator call is timed with a kernel that does nothing, so that what remains is dispatch, checks and the output's
allocation; SDPA's call on the same small inputs is shown beside it. On a GPU the calls of the package's own kernels are timed
too, with their launches and without, and with new lengths each time, for which everything is worked out anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, kernels
from sage_inductor.operators import inference as ops
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import capture


def microseconds(function: Callable[[], Any], calls: int = 5000, rounds: int = 7) -> float:
    """Median over `rounds` of the time of one call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return median(times)


def operator_call() -> dict[str, float]:
    kernel = kernels.get("reference")
    run = type(kernel).run
    q, k, v = (torch.randn(1, 1, 2, 16).transpose(1, 2) for _ in range(3))
    try:
        type(kernel).run = lambda *args: None  # type: ignore[method-assign]
        with torch.no_grad():
            ours = microseconds(lambda: ops.attention(q, k, v, kernel_name="reference"))
    finally:
        type(kernel).run = run  # type: ignore[method-assign]
    with torch.no_grad():
        sdpa = microseconds(lambda: F.scaled_dot_product_attention(q, k, v))
    return {"operator_call_us": ours, "sdpa_call_us": sdpa}


def kernel_calls() -> dict[str, float]:
    """Host time of eager calls on a GPU, per kernel: of a call, of it without its launches, and of one with lengths that
    are new."""
    if not torch.cuda.is_available():
        return {}
    q, k, v = (
        torch.randn(1, 2048, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    lengths = itertools.count(64)

    def new_lengths(name: str) -> Tensor:
        n = next(lengths)
        return ops.attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], kernel_name=name)

    short = [tensor[:, :, :256] for tensor in (q, k, v)]
    figures = {}
    with torch.no_grad():
        figures["sdpa_gpu_call_us"] = microseconds(lambda: F.scaled_dot_product_attention(*short), calls=200)
        for name in ("triton", "hopper"):
            if kernels.available("cuda:0")[name]:
                continue
            call = partial(ops.attention, *short, kernel_name=name)
            figures[f"{name}_call_us"] = microseconds(call, calls=200)
            with without_launches(name):
                figures[f"{name}_own_us"] = microseconds(call, calls=200)
            figures[f"{name}_new_lengths_us"] = microseconds(partial(new_lengths, name), calls=100)
    return figures


@contextmanager
def without_launches(name: str) -> Iterator[None]:
    """Calls do all but launch."""
    from sage_inductor.kernels.triton.launcher import Launch

    def nothing(*args: Any) -> None:
        pass

    with ExitStack() as patches:
        patches.enter_context(patch.object(Launch, "__call__", nothing))
        if name == "hopper":
            from sage_inductor.kernels.hopper import driver

            patches.enter_context(patch.object(driver, "launch", nothing))
        yield


def hundred_sites() -> dict[str, float]:
    def deep(q: Tensor) -> Tensor:
        for _ in range(100):
            q = F.scaled_dot_product_attention(q, q, q)
        return q

    times = []
    for _ in range(5):
        with torch.no_grad():
            graph = capture(deep, torch.randn(1, 2, 16, 64)).graph
        start = time.perf_counter()
        assert len(rewrite_graph(graph, Config(kernel="reference"))) == 100
        times.append(time.perf_counter() - start)
    return {"rewrite_100_sites_s": median(times)}


class Layer(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, seq, 3, 2, -1).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, seq, dim)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def share_of_a_compile() -> dict[str, float]:
    """The pass against the whole of compiling a 30-layer transformer, the graph cache off."""
    from sage_inductor import backend

    model, x = nn.Sequential(*(Layer() for _ in range(30))).eval(), torch.randn(1, 32, 64)
    spent = 0.0
    original = backend.rewrite_graph

    def timed(*args: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return original(*args)
        finally:
            spent += time.perf_counter() - start

    backend.rewrite_graph = timed  # type: ignore[assignment]
    torch._dynamo.reset()
    options = {"sage.kernel": "reference", "fx_graph_cache": False}
    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend="sage_inductor", options=options)(x)
    total = time.perf_counter() - start
    backend.rewrite_graph = original  # type: ignore[assignment]
    return {"compile_30_layers_s": total, "pass_s": spent, "pass_share": spent / total}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    figures = {
        "torch": torch.__version__,
        **operator_call(),
        **kernel_calls(),
        **hundred_sites(),
        **share_of_a_compile(),
    }
    for name, value in figures.items():
        print(f"{name:24}{value:.4g}" if isinstance(value, float) else f"{name:24}{value}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
