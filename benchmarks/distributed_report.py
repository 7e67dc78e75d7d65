"""What benchmarks/distributed.py measured, as a table and a plot; and what arithmetic says several GPUs should give.

    python benchmarks/distributed_report.py benchmarks/results/distributed_h100.json --plot scaling.svg
    python benchmarks/distributed_report.py --paper       # the tables of docs/distributed.md

On paper an attention takes 4 * q_len * kv_len * channels operations (half of them where it is causal), and a rank sends bf16:

Ulysses   all ranks exchange Q, K, V and the output: each sends 4 * tokens / ranks * channels * (ranks - 1) / ranks elements,
          before and behind its attention, which waits for them.
ring      a rank passes K and V of a part on while it attends to it, `ranks` times; what takes longer counts. Each part but the
          first is merged: the output is read twice and written once, in float32. By default torch and diffusers gather all K and
          V before the first part instead ("gathered"). With 8-bit wires a byte is sent for each element.
USP UxR   Ulysses among U ranks, around which a ring of R goes.

Every rank of a ring quantises the K and V that it is given, all of the sequence in the end: reading twice, writing a byte an
element; with 8-bit wires those of its own part only. It quantises its Q for each part. With Ulysses it quantises all of its heads
once. The power limit, ranks that wait for each other, and that kernels are slower on
short sequences are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """An H100 as it was measured (README, "Measured"; two GPUs over NVLink), and its data sheet's memory."""

    operations: float = 960e12  # of `hopper` fast, quantisation excluded, at 16,384 tokens and more
    link: float = 300e9  # bytes that leave a GPU in a second, in an all-to-all
    memory: float = 3.3e12  # bytes in a second
    latency: float = 20e-6  # seconds that a collective takes at least; assumed


@dataclass(frozen=True)
class Attention:
    """One attention of one layer, batch 1."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    is_causal: bool = False

    def with_tokens(self, tokens: int) -> Attention:
        return Attention(self.name, tokens, self.heads, self.kv_heads, self.head_dim, self.is_causal)


WAN = Attention("Wan 14B, 720p", 75_600, 40, 40)
HUNYUAN = Attention("HunyuanVideo, 720p", 119_056, 24, 24)
LLAMA = Attention("Llama 8B, 128k, causal", 131_072, 32, 8, is_causal=True)


@dataclass(frozen=True)
class Way:
    name: str
    ulysses: int
    ring: int
    gathered: bool = False
    eight_bits: bool = False  # on the wire


def ways(ranks: int) -> list[Way]:
    if ranks == 1:
        return [Way("one GPU", 1, 1)]
    half = ranks // 2
    both = [Way(f"USP {half}x2", half, 2)] if ranks > 2 else []
    rings = [Way("ring", 1, ranks), Way("ring, gathered", 1, ranks, True)]
    rings.append(Way("ring, 8-bit wires", 1, ranks, eight_bits=True))
    return [Way("Ulysses", ranks, 1), *rings, *both]


def expected_ms(attention: Attention, way: Way, gpu: Gpu = Gpu()) -> float:
    """What one rank takes for one attention, in ms."""
    ranks = way.ulysses * way.ring
    channels, kv_channels = (
        heads * attention.head_dim / way.ulysses for heads in (attention.heads, attention.kv_heads)
    )
    queries = attention.tokens / way.ring  # of `channels`, between the all-to-alls
    operations = 4.0 * attention.tokens * queries * channels / (2 if attention.is_causal else 1)
    compute = operations / gpu.operations
    # Around the ring: a part's keys and values.
    part = 2 * (1 if way.eight_bits else 2) * queries * kv_channels / gpu.link + gpu.latency
    if way.gathered:
        around = (way.ring - 1) * part + compute
    else:
        step = compute / way.ring
        around = (way.ring - 1) * max(step, part) + step
    merged = (way.ring - 1) * 3 * 4 * queries * channels / gpu.memory
    keys = queries if way.eight_bits else attention.tokens
    quantised = (2 * 2 + 1) * (way.ring * queries * channels + 2 * keys * kv_channels) / gpu.memory
    mine = attention.tokens / ranks * attention.head_dim * (2 * attention.heads + 2 * attention.kv_heads)
    exchanged = 2 * mine * (way.ulysses - 1) / way.ulysses / gpu.link
    if way.ulysses > 1:
        exchanged += 4 * gpu.latency
    return 1e3 * (around + merged + quantised + exchanged)


def gain(attention: Attention, way: Way) -> float:
    """How many times as fast as one GPU."""
    return expected_ms(attention, ways(1)[0]) / expected_ms(attention, way)


def pays_from(attention: Attention, way: Way, share: float) -> int:
    """The least number of tokens, a multiple of 256, at which `way` is `share` of its ranks times as fast as one GPU."""
    ranks = way.ulysses * way.ring
    return next(
        tokens
        for tokens in range(256, 1 << 22, 256)
        if gain(attention.with_tokens(tokens), way) >= max(1.0, share * ranks)
    )


def paper() -> str:
    """Two tables in Markdown: how many times as fast as one GPU; and the tokens from which that is so at all, and to 90%."""
    lines = ["| attention | one GPU, ms | way | 2 GPUs | 4 GPUs | 8 GPUs |", "|---|---|---|---|---|---|"]
    for attention in (WAN, HUNYUAN, LLAMA):
        one = f"{expected_ms(attention, ways(1)[0]):.0f}"
        for name in NAMES[:-1] if attention.is_causal else NAMES:
            cells = [f"{gain(attention, way):.2f}" if way else "" for way in _named(name)]
            lines.append(f"| {attention.name} | {one} | {name} | {' | '.join(cells)} |")
    lines += ["", "| way | 2 GPUs | 4 GPUs | 8 GPUs |", "|---|---|---|---|"]
    for name in NAMES:
        cells = [
            f"{pays_from(WAN, way, 0):,}; {pays_from(WAN, way, 0.9):,}" if way else "" for way in _named(name)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


NAMES = ("Ulysses", "ring", "ring, gathered", "ring, 8-bit wires", "USP 2x2, 4x2")


def _named(name: str) -> list[Way | None]:
    """The way of that name on 2, 4 and 8 GPUs."""
    kind = name.split(" 2x2")[0]
    return [
        next((way for way in ways(ranks) if way.name == kind or way.name.startswith(f"{kind} ")), None)
        for ranks in (2, 4, 8)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured rows in Markdown; speed-ups are against one GPU of the same run, and against plain on as many."""
    lines = [
        "| model, tokens | way | GPUs | plain, ms | ours, ms | ours : plain | plain : 1 GPU | ours : 1 GPU | rel. L2 | hidden | "
        "all-to-all, p2p, GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        about = f"| {row['model']}, {row['tokens']:,} | {row['way']} | {row['ranks']} |"
        if "error" in row:
            lines.append(f"{about} {row['error']} |" + " |" * 7)
            continue
        plain, ours = row["plain"].get("milliseconds"), row["ours"].get("milliseconds")
        alone = _of_one(rows, row)
        cells = [_number(plain, 1), _number(ours, 1), _ratio(plain, ours)]
        cells += [_ratio(one, now) for one, now in zip(alone, (plain, ours), strict=True)]
        hidden = row["ours"].get("hidden")
        cells += [_number(row["ours"].get("relative_l2"), 4), "" if hidden is None else f"{hidden:.0%}"]
        speeds = [row.get(name) for name in ("all_to_all_GB_s", "p2p_GB_s")]
        cells.append(", ".join(f"{speed:.0f}" for speed in speeds if speed is not None))
        lines.append(f"{about} {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_one(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> tuple[float | None, float | None]:
    """(plain, ours) on one GPU in ms: of the run with as many ranks if it is there."""
    same = ("gpu", "torch", "model", "tokens")
    found = [
        one for one in rows
        if one["way"] == "one GPU" and "error" not in one and all(one[name] == row[name] for name in same)
    ]  # fmt: skip
    found.sort(key=lambda one: one["ranks"] != row["ranks"])
    return (
        (found[0]["plain"].get("milliseconds"), found[0]["ours"].get("milliseconds"))
        if found
        else (None, None)
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ratio(before: float | None, now: float | None) -> str:
    return "" if before is None or now is None else f"{before / now:.2f}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed against one plain GPU, by number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys((row["model"], row["tokens"]) for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4), squeeze=False)
    for axis, (model, tokens) in zip(axes[0], models, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            alone = _of_one(rows, row)[0]
            if (row["model"], row["tokens"]) != (model, tokens) or "error" in row or alone is None:
                continue
            for side in ("plain", "ours"):
                if "milliseconds" in row[side]:
                    # "ring" of "ring 2", "ring, 8-bit wires" of "ring 2, 8-bit wires"
                    kind = re.sub(r" [\dx]+", "", row["way"])
                    ways_of = [kind] if row["way"] != "one GPU" else []
                    for name in ways_of:
                        point = row["ranks"], alone / row[side]["milliseconds"]
                        lines.setdefault(f"{name}, {side}", []).append(point)
        for name, points in sorted(lines.items()):
            style = "--" if name.endswith("plain") else "-"
            axis.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=name)
        axis.set_title(f"{model}, {tokens:,} tokens", fontsize=9)
        axis.set_xlabel("GPUs")
        axis.set_ylabel("times one GPU with plain torch.compile")
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="a file that distributed.py wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--paper", action="store_true", help="what arithmetic says")
    options = parser.parse_args(argv)
    if options.paper:
        print(paper())
    if options.results is not None:
        rows = json.loads(options.results.read_text())
        print(table(rows))
        if options.plot is not None:
            plot(rows, options.plot)
    elif not options.paper:
        parser.error("no results (valid: a file, --paper, or both)")


if __name__ == "__main__":
    main()
