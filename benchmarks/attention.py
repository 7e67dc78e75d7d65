"""Attention: TFLOP/s and error of this package's kernel and its rivals, in one process on one GPU.

    python benchmarks/attention.py --out results.json           # measure all, print the table
    python benchmarks/attention.py --from results.json --plot attention.svg

A row of the JSON has gpu, torch, triton, provider, precision, D, causal, S, B, H, ms_kernel, ms_e2e,
tflops_kernel, tflops_e2e, rel_l2. TFLOP/s count 4 * B * H * S^2 * D operations, half of them when causal.
"e2e" is everything from bf16 query, key and value to bf16 output; "kernel" excludes the quantisation. rel_l2
is the relative L2 error of 128 rows of one head against float64. Inputs are normal, in [batch, seq, heads,
head_dim] memory as models have them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine, median_ms, sets_beyond_l2
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams
from sage_inductor.measurement.ground_truth import sampled_error

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (128, 64)
HEADS = 32
LONG = 8192  # tokens from which a call reaches the power limit
ROUNDS = 3

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    batch: int
    seq: int
    head_dim: int
    is_causal: bool

    @property
    def operations(self) -> float:
        total = 4.0 * self.batch * HEADS * self.seq**2 * self.head_dim
        return total / 2 if self.is_causal else total

    def inputs(self) -> Inputs:
        shape = self.batch, self.seq, HEADS, self.head_dim
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        return q, k, v


@dataclass(frozen=True)
class Prepared:
    """A provider on one set of inputs: its calls, and the output it has just written."""

    end_to_end: Callable[[], Tensor] | None
    kernel: Callable[[], Tensor] | None


Provider = Callable[[Problem, Tensor, Tensor, Tensor], Prepared]


def sdpa(backend: SDPBackend | None) -> Provider:
    def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        def call() -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=problem.is_causal)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=problem.is_causal)

        return Prepared(call, call)

    return prepare


def ours(kernel: str, precision: str) -> Provider:
    if kernel == "hopper":
        from sage_inductor.kernels.hopper.launch import HopperAttention as Attention
    else:
        from sage_inductor.kernels.triton.launch import TritonAttention as Attention

    def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        out = torch.empty_like(q)
        params = AttentionParams(is_causal=problem.is_causal, precision=precision)
        call = Attention(q, k, v, None, params, out, None)
        workspace = call.quantize(q, k, v, None)

        def kernel() -> Tensor:
            call.attend(workspace, None, out, None)
            return out

        def end_to_end() -> Tensor:
            call(q, k, v, None, out, None)
            return out

        return Prepared(end_to_end, kernel)

    return prepare


def flash_attention_3(fp8: bool) -> Provider:
    from fa3_fwd_interface import flash_attn_func

    def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        descale: dict[str, Tensor] = {}
        if fp8:
            quantised = []
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                scale = tensor.float().abs().amax((1, 3)) / 448
                descale[f"{name}_descale"] = scale
                quantised.append((tensor / scale[:, None, :, None]).to(torch.float8_e4m3fn))
            q, k, v = quantised

        def call() -> Tensor:
            result = flash_attn_func(q, k, v, causal=problem.is_causal, **descale)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return Prepared(None if fp8 else call, call)

    return prepare


def sageattention() -> Provider:
    from sageattention import sageattn

    def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        # 1.x writes to K, so it gets its own.
        own = k.clone()
        return Prepared(lambda: sageattn(q, own, v, is_causal=problem.is_causal), None)

    return prepare


def providers() -> Iterator[tuple[str, str, Provider]]:
    """(name, precision, provider) of all that can run here; a provider whose package is missing is left
    out."""
    yield "sdpa", "bf16", sdpa(None)
    yield "cudnn", "bf16", sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "flash", "bf16", sdpa(SDPBackend.FLASH_ATTENTION)
    for name in ("hopper", "triton"):
        if not kernels.get(name).unavailable_reasons(torch.device("cuda", 0)):
            for precision in kernels.PRECISIONS:
                yield name, precision, ours(name, precision)
    optional: list[tuple[str, str, Callable[[], Provider]]] = [
        ("fa3", "bf16", lambda: flash_attention_3(False)),
        ("fa3", "fp8", lambda: flash_attention_3(True)),
        ("sageattention", "installed version", sageattention),
    ]
    for name, precision, make in optional:
        try:
            yield name, precision, make()
        except (ImportError, OSError) as error:
            sys.stderr.write(f"{name} {precision}: {error}\n")


class Contender:
    """A provider on a problem: what it computes, how far it is from float64, and the times of its turns."""

    def __init__(self, problem: Problem, provider: Provider, sets: list[Inputs]) -> None:
        prepared = [provider(problem, *inputs) for inputs in sets]
        self.calls = {
            "kernel": [p.kernel for p in prepared if p.kernel is not None],
            "e2e": [p.end_to_end for p in prepared if p.end_to_end is not None],
        }
        self.same = prepared[0].end_to_end is prepared[0].kernel
        call = prepared[0].end_to_end or prepared[0].kernel
        assert call is not None
        self.error = sampled_error(*sets[0], call(), AttentionParams(is_causal=problem.is_causal))
        self.times: dict[str, list[float]] = {"kernel": [], "e2e": []}

    @property
    def timed(self) -> list[str]:
        """What of "kernel" and "e2e" there is to be timed."""
        return [name for name, calls in self.calls.items() if calls and not (name == "e2e" and self.same)]

    def take_turn(self, name: str, target_ms: float) -> None:
        self.times[name].append(median_ms(self.calls[name], target_ms=target_ms, least=3))

    def figures(self, operations: float) -> dict[str, float | None]:
        row: dict[str, float | None] = {"rel_l2": round(self.error, 5)}
        for name in ("kernel", "e2e"):
            times = self.times["kernel" if self.same else name]
            ms = statistics.median(times) if times else None
            row[f"ms_{name}"] = None if ms is None else round(ms, 5)
            row[f"tflops_{name}"] = None if ms is None else round(operations / ms / 1e9, 1)
        return row


def measure(
    problem: Problem, available: list[tuple[str, str, Provider]]
) -> list[tuple[str, str, dict[str, float | None]]]:
    """(name, precision, figures) of all that can compute it. Long calls reach the power limit, and how fast one is
    then depends on what ran in the 100 ms before it: so they take turns of about that long, each time in another
    order."""
    bytes_per_set = 3 * 2 * problem.batch * HEADS * problem.seq * problem.head_dim
    sets = [problem.inputs() for _ in range(sets_beyond_l2(bytes_per_set))]
    contenders = {}
    for name, precision, provider in available:
        try:
            contenders[name, precision] = Contender(problem, provider, sets)
        except RuntimeError as error:
            sys.stderr.write(f"{name} {precision} {problem}: {str(error).splitlines()[0]}\n")
    turns = [(contender, name) for contender in contenders.values() for name in contender.timed]
    target_ms = 15.0 if problem.seq < LONG else 80.0
    for _ in range(ROUNDS):
        random.shuffle(turns)
        for contender, name in turns:
            contender.take_turn(name, target_ms)
    return [(*key, contender.figures(problem.operations)) for key, contender in contenders.items()]


def problems(sizes: tuple[int, ...], head_dims: tuple[int, ...]) -> Iterator[Problem]:
    for head_dim in head_dims:
        for is_causal in (False, True):
            for seq in sizes:
                yield Problem(4 if seq <= 4096 else 1, seq, head_dim, is_causal)


def run(
    sizes: tuple[int, ...], head_dims: tuple[int, ...], names: list[str] | None, out: Path, budget: float
) -> list[dict[str, Any]]:
    """Measure everything, saving after each problem, until `budget` seconds are spent."""
    rows: list[dict[str, Any]] = []
    facts, deadline = machine(), time.monotonic() + budget
    available = [provider for provider in providers() if names is None or provider[0] in names]
    for problem in problems(sizes, head_dims):
        if time.monotonic() > deadline:
            sys.stderr.write(f"stopped before {problem}: {budget} s are spent\n")
            return rows
        for name, precision, figures in measure(problem, available):
            rows.append(
                {**facts, "provider": name, "precision": precision, "D": problem.head_dim}
                | {"causal": problem.is_causal, "S": problem.seq, "B": problem.batch, "H": HEADS}
                | figures
            )
        out.write_text(json.dumps(rows, indent=0) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per problem, a column per provider; kernel / e2e TFLOP/s where they differ."""
    columns = list(dict.fromkeys((row["provider"], row["precision"]) for row in rows))
    lines = ["| D, causal, S | " + " | ".join(" ".join(column) for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    cells: dict[tuple[Any, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        kernel, end_to_end = row["tflops_kernel"], row["tflops_e2e"]
        texts = [f"{value:.0f}" for value in (kernel, end_to_end) if value is not None]
        text = texts[0] if kernel == end_to_end else " / ".join(texts)
        problem = row["D"], row["causal"], row["S"]
        cells.setdefault(problem, {})[row["provider"], row["precision"]] = text
    for (head_dim, causal, seq), by_column in cells.items():
        values = " | ".join(by_column.get(column, "") for column in columns)
        lines.append(f"| {head_dim} {'yes' if causal else 'no'} {seq} | {values} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """End-to-end TFLOP/s (kernel only for FA3 FP8) over the sequence length, one panel per head dim and
    mask."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["D"], row["causal"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (head_dim, causal) in zip(axes[0], panels, strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if (row["D"], row["causal"]) == (head_dim, causal):
                name = f"{row['provider']} {row['precision']}" + ("" if row["tflops_e2e"] else " (kernel)")
                series.setdefault(name, []).append((row["S"], row["tflops_e2e"] or row["tflops_kernel"]))
        for name, points in series.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name,
                      linewidth=2 if name.startswith("hopper") else 1)  # fmt: skip
        axis.set(title=f"D={head_dim}" + (", causal" if causal else ""), xlabel="tokens", xscale="log")
        axis.set_xticks([row["S"] for row in rows if (row["D"], row["causal"]) == (head_dim, causal)])
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s, end to end")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(rows[0]["gpu"])
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("attention.json"))
    parser.add_argument("--from", dest="source", type=Path, help="read results instead of measuring")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--providers", nargs="+", help="only these (default: all that can run)")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    if options.source is not None:
        rows = json.loads(options.source.read_text())
    else:
        rows = run(
            tuple(options.sizes), tuple(options.head_dims), options.providers, options.out, options.budget
        )
    sys.stdout.write(table(rows) + "\n")
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
