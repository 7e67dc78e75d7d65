"""Writes the README's figures from the committed results: python benchmarks/readme.py [--check]."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPU = "h100"  # whose results the README shows
PIPELINES = RESULTS / "pipelines_h200.json"
PIPELINE_NAMES = {
    "wan": "Wan 2.1 1.3B, 832 x 480, 81 frames", "flux": "FLUX.1-dev, 1024 x 1024, decoded",
}  # fmt: skip
MODEL_GPUS = ("h100", "h200")  # whole models: those of the second where the first has none
START, END = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"
LENGTHS = (1024, 4096, 16384, 32768)
# Column -> (provider, precision, which figure)
COLUMNS: dict[str, tuple[str, str, str]] = {
    "cuDNN bf16 (torch's default)": ("cudnn", "bf16", "tflops_e2e"),
    "FA3 bf16": ("fa3", "bf16", "tflops_e2e"),
    "FA3 FP8, kernel": ("fa3", "fp8", "tflops_kernel"),
    "`hopper` fast, kernel": ("hopper", "fast", "tflops_kernel"),
    "`hopper` fast": ("hopper", "fast", "tflops_e2e"),
    "`hopper` balanced": ("hopper", "balanced", "tflops_e2e"),
    "`hopper` accurate": ("hopper", "accurate", "tflops_e2e"),
    "`triton` fast": ("triton", "fast", "tflops_e2e"),
    "`triton` balanced": ("triton", "balanced", "tflops_e2e"),
    "`triton` accurate": ("triton", "accurate", "tflops_e2e"),
}


def attention_table(rows: list[dict[str, Any]]) -> str:
    figures = {(row["provider"], row["precision"], row["D"], row["causal"], row["S"]): row for row in rows}
    lines = [
        "| head_dim | causal | tokens | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for dim in (128, 64):
        for causal in (False, True):
            for length in LENGTHS:
                cells = []
                for provider, precision, figure in COLUMNS.values():
                    row = figures.get((provider, precision, dim, causal, length))
                    value = row[figure] if row else None
                    cells.append(f"{value:.0f}" if value is not None else "")
                cells[4] = f"**{cells[4]}**"
                lines.append(
                    f"| {dim} | {'yes' if causal else 'no'} | {length} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines)


def error_sentence(rows: list[dict[str, Any]]) -> str:
    def largest(provider: str, precision: str) -> str:
        errors = [
            row["rel_l2"]
            for row in rows
            if (row["provider"], row["precision"]) == (provider, precision) and row["rel_l2"] is not None
        ]
        return f"{max(errors):.3f}".lstrip("0")

    ours = ", ".join(
        f"`{kernel}` {name} {largest(kernel, name)}"
        for kernel in ("hopper", "triton")
        for name in ("fast", "balanced", "accurate")
    )
    return (
        f"Largest relative L2 error over these sizes against float64 (rows of a sample): {ours}; FA3 FP8 "
        f"{largest('fa3', 'fp8')}, cuDNN bf16 {largest('cudnn', 'bf16')}."
    )


def model_table(rows: list[dict[str, Any]]) -> str:
    """A line per model and GPU, a column per kernel and precision that was timed on any of them."""
    timed = [row for row in rows if row["precision"] is not None and row["milliseconds"] is not None]
    columns = list(dict.fromkeys((row["kernel"], row["precision"]) for row in timed))
    by_model: dict[str, dict[tuple[str, str | None], dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["kernel"], row["precision"]] = row
    heads = " | ".join(f"`{kernel}`, {precision}" for kernel, precision in columns)
    lines = [
        f"| model, layers, tokens | GPU | plain, ms | {heads} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for model, results in by_model.items():
        plain = next(row for row in results.values() if row["precision"] is None)
        cells = [model_cell(results.get(column)) for column in columns]
        name = f"{model}, {plain['layers']}, {plain['tokens']:,}"
        gpu = plain["gpu"].removeprefix("NVIDIA ").split()[0]
        lines.append(f"| {name} | {gpu} | {plain['milliseconds']:.1f} | " + " | ".join(cells) + " |")
    breaks = sum(row["graph_breaks"] for row in timed)
    return "\n".join([*lines, "", f"Graph breaks in all of these together: {breaks}."])


def model_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return f"stays SDPA, {row['sites']} of {row['sites']}" if row["sites"] else "cannot run"
    speed = row["plain_milliseconds"] / row["milliseconds"]
    error = f"{row['relative_l2']:.4f}".lstrip("0")
    return f"{row['milliseconds']:.1f} ({speed:.2f}x; {row['rewritten']} of {row['sites']}; {error})"


def pipelines_section(rows: list[dict[str, Any]]) -> str:
    """A line per pipeline and contender, and what `calibrate_pipeline` takes. Contenders that failed are left out."""
    measured = [row for row in rows if "call_s" in row]
    first = measured[0]
    gpu, torch, steps = first["gpu"], first["torch"], first["steps"]
    lines = [
        f"Whole pipelines, all layers, random weights, {steps} steps, prompts given as embeddings (`benchmarks/pipelines.py`, {gpu}, torch",
        f"{torch}, diffusers {first['diffusers']}); medians of calls in turns:",
        "",
        "| pipeline | | a call, s | of plain | a call of the transformer, ms | peak above the weights while denoising, MiB | relative L2 of the latents | first call, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        above = row["peak_denoising_mib"] - row["weights_mib"]
        lines.append(
            f"| {PIPELINE_NAMES[row['pipeline']]} | `{row['contender']}` | {row['call_s']:.2f} | {row.get('ratio', 1):.3f} | "
            f"{row['denoiser_ms']:.1f} | {above:,.0f} | {row.get('relative_l2', 0):.4f} | {row['first_call_s']:.0f} |"
        )
    for row in rows:
        if "calibrate_s" in row:
            decisions = ", ".join(f"{name} {count}" for name, count in row["decisions"].items())
            lines += [
                "",
                f"`calibrate_pipeline` of the same Flux takes {row['calibrate_s']:.0f} s: {decisions} (attentions by ranges of steps).",
            ]
    return "\n".join(lines)


def overhead_sentence() -> str:
    data = json.loads((RESULTS / "overhead_cpu.json").read_text())
    return (
        f"What the package itself costs on a CPU (`benchmarks/overhead.py`, torch {data['torch']}): an eager call of the "
        f"operator\n{data['operator_call_us']:.1f} us beside its kernel's own host code (SDPA {data['sdpa_call_us']:.1f} us, "
        f"kernel included); rewriting 100 sites {data['rewrite_100_sites_s'] * 1000:.0f} ms; the pass "
        f"{data['pass_share']:.2%} of\ncompiling a 30-layer transformer."
    )


def never_slower_sentence() -> str:
    rows = json.loads((RESULTS / f"never_slower_{GPU}.json").read_text())
    checked = [row for row in rows if "slower_by" in row]
    gains = sorted(row["sdpa_ms"] / row["kernel_ms"] for row in checked if row["kernel"] != "sdpa")
    return (
        f"What `auto` chooses, timed again in a run of its own (`benchmarks/never_slower.py`, {checked[0]['gpu']}): of "
        f"{len(checked)} sites\n{len(gains)} have a kernel, {gains[0]:.2f} to {gains[-1]:.2f} times as fast as SDPA there, "
        f"{statistics.median(gains):.2f} in the middle; the others stay SDPA."
    )


def masks_sentence() -> str:
    rows = json.loads((RESULTS / f"masks_{GPU}.json").read_text())
    ms = {
        row["mask"]: row["ms"]
        for row in rows
        if (row["D"], row["S"], row["precision"]) == (128, 8192, "fast")
    }
    causal, padded, worst = ms["causal"], ms["padded on the left, additive"], ms["random"]
    gains = [row["ms"]["sdpa"] / row["ms"]["triton"] for row in rows if row["mask"] == "random"]
    return (
        "Under a mask that differs from query to query and comes as a tensor (`benchmarks/masks.py`; head_dim 128, 8,192 tokens, 32\n"
        "heads, quantisation and a look at the mask included; ms, SDPA with the same mask in brackets): causal "
        f"{causal['triton']:.2f} ({causal['sdpa']:.2f}; with\n`is_causal` instead it has {causal['sdpa is_causal']:.2f}), padded on the "
        f"left besides {padded['triton']:.2f} ({padded['sdpa']:.2f}), random, which leaves no block whole, {worst['triton']:.2f} "
        f"({worst['sdpa']:.2f}).\nUnder random bool masks, for which the kernel can do least, it is {min(gains):.2f} to "
        f"{max(gains):.2f} times as fast as SDPA, over all precisions,\nhead dims from 64 to 192 and 2,048 to 8,192 tokens."
    )


def figures() -> str:
    rows = json.loads((RESULTS / f"attention_{GPU}.json").read_text())
    first = rows[0]
    machine = f"{first['gpu']}, torch {first['torch']}, triton {first['triton']}"
    models: list[dict[str, Any]] = []
    for gpu in MODEL_GPUS:
        known = {row["model"] for row in models}
        found = json.loads((RESULTS / f"model_{gpu}.json").read_text())
        models += [row for row in found if row["model"] not in known]
    pipelines = f"{pipelines_section(json.loads(PIPELINES.read_text()))}\n\n" if PIPELINES.exists() else ""
    return f"""{START}

## Measured

TFLOP/s on one {machine}; medians, side by side in one process, inputs rotated through more than the L2 cache. Batch times
heads is 128 up to 4096 tokens and 32 above. Figures include quantisation (end to end) unless the column says kernel.
Longer calls run at the power limit, which moves all of these by 5% and more, so that some are faster with quantisation than
without; the [notes](benchmarks/notes.md) have kernels timed in turns.

{attention_table(rows)}

{error_sentence(rows)}

![end-to-end speed against sequence length](benchmarks/results/attention_{GPU}.svg)

So 8 bits win on long sequences and lose on short ones, where quantising costs more than it saves. `auto` finds the
crossover, and the fastest kernel beyond it, and leaves the rest to SDPA; `explain()` says so at each site. sageattention 1.0.6
from PyPI is slower than cuDNN here at every size. Other head dims (96 to 256), what was tried for `hopper`, and what it
brought: [notes](benchmarks/notes.md).

Whole models, random weights, bf16, under `torch.compile`, two of their layers (`benchmarks/model.py`); on the H200 before
there was `hopper`. Cells: ms (speed against plain `torch.compile`, timed in turns with it; attentions rewritten; relative L2 error of the model's output):

{model_table(models)}

The Llama speed-up is more than the kernel's: transformers builds its causal mask as a tensor, which keeps SDPA off its causal
kernels; here the mask is recognised. Its error is that of random weights, where attention averages noise.

{pipelines}{masks_sentence()}

{never_slower_sentence()}

{overhead_sentence()}

{END}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README is not current")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    updated = before + figures() + after
    if arguments.check:
        sys.exit(0 if updated == text else "README.md is not what benchmarks/readme.py writes")
    readme.write_text(updated)


if __name__ == "__main__":
    main()
