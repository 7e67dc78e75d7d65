"""A whole model with and without `skip_threshold`: Wan, whose attention has scores of which a part can be left out.

    python benchmarks/skip_model.py --out skip_model.json             # Wan 14B, 720p, two layers; minutes of a GPU
    python benchmarks/skip_model.py --size 1.3B --patterns stripes none --thresholds 0.001 0.0001
    python benchmarks/skip_model.py --tiny                            # on a CPU, by the reference kernel: its times mean nothing

Needs `pip install diffusers`. The model is that of examples/wan_video.py with random weights. Random weights attend to everything alike, so
scores are planted as in skip.py: behind the rotary embedding, queries and keys of each self-attention are scaled to NOISE and get what
their block of 128 tokens is about, the same in all heads. The patterns are those of skip.py; "none" adds zeros. An attention processor
does it, in the compiled graph, so that all contenders do the same work beside attention:

    plain    torch.compile
    dense    backend="sage_inductor"
    scores   the same with skip_threshold, by all scores
    sample   the same by a sample of the queries

All are compiled once, and timed in turns for each pattern. Wanted of Wan 14B where half of the tiles can be left out: at most .86 of dense.

A row of the JSON has gpu, torch, triton, model, layers, tokens, pattern, of (one in so many blocks is high), contender, kernel (that was
asked for), precision, skip_threshold, skip_by, milliseconds (median), of_plain and of_dense (its time as a part of theirs), graph_breaks,
rewritten of sites, skipping (sites that have the threshold), kernels (of the sites), relative_l2 (of the model's output against plain's; of
plain, against the model run eagerly), share and added (of the self-attentions: the share of tiles that the oracle leaves out, and what
that costs by itself in float64, as in skip.py; first head, keys in one part, mean of the layers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import skip
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from found_sites import sites_found
from timing import machine
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.reference.algorithm import tile_margins
from sage_inductor.kernels.reference.tiles import skipped_share
from sage_inductor.kernels.skipping import DECIDERS, SAMPLED_TILE, SKIP_TILE
from sage_inductor.measurement.metrics import relative_l2

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import wan_video  # noqa: E402
from comparison import in_turns, run_and_count_breaks  # noqa: E402

PATTERNS = tuple(pattern for pattern in skip.PATTERNS if pattern != "video")
TINY_LATENTS = 16, 16, 16  # 1,024 tokens: 8 blocks of keys
TILES = {"scores": SKIP_TILE, "sample": SAMPLED_TILE}


class PlantedProcessor(WanAttnProcessor):  # type: ignore[misc]
    """Wan's self-attention, with scores that are planted."""

    def __init__(self, tokens: int, head_dim: int) -> None:
        super().__init__()
        self.queries, self.keys = (
            torch.zeros(tokens, 1, head_dim, device=skip.DEVICE, dtype=skip.DTYPE) for _ in range(2)
        )

    def plant(self, problem: skip.Problem) -> None:
        """In place: what is compiled reads it anew with each call."""
        for tensor in (self.queries, self.keys):
            tensor.zero_()
        if problem.pattern != "none":
            for tensor, planted in zip((self.queries, self.keys), problem.planted(), strict=True):
                tensor.copy_(planted[:, None])

    def inputs(
        self, attn: Any, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[batch, tokens, heads, head_dim]`."""
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (
            tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, attn.to_v(hidden_states))
        )
        query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        return query * skip.NOISE + self.queries, key * skip.NOISE + self.keys, value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        query, key, value = self.inputs(attn, hidden_states, rotary_emb)
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        result: Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))
        return result


def rotated(x: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """The rotary embedding as WanAttnProcessor writes it, in a function of its own that cannot be imported."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


@dataclass
class Contender:
    name: str
    call: Callable[..., Any]
    threshold: float | None = None
    skip_by: str | None = None
    compiled: dict[str, Any] = field(default_factory=dict)
    """What its first call says of what was compiled."""

    def run(self, inputs: dict[str, Any]) -> Tensor:
        """The model's output."""
        output: Tensor
        if self.compiled:
            output = self.call(**inputs)[0]
            return output
        with sites_found() as sites:
            output, breaks = run_and_count_breaks(self.call, inputs)
        rewritten = [site for site in sites if site.rewritten]
        asked = self.threshold, self.skip_by
        self.compiled = {
            "graph_breaks": breaks,
            "rewritten": len(rewritten),
            "sites": len(sites),
            "skipping": sum((site.skip_threshold, site.skip_by) == asked for site in rewritten),
            "kernels": list(dict.fromkeys(site.kernel for site in rewritten)),
        }
        return output


def contenders(model: Any, options: argparse.Namespace) -> list[Contender]:
    """Plain and dense first."""
    common = {"sage.kernel": options.kernel, "sage.precision": options.precision}

    def ours(**own: Any) -> Callable[..., Any]:
        named = common | {f"sage.{name}": value for name, value in own.items()}
        return torch.compile(model, backend="sage_inductor", options=named)

    found = [Contender("plain", torch.compile(model)), Contender("dense", ours())]
    for threshold in options.thresholds:
        for skip_by in options.by:
            call = ours(skip_threshold=threshold, skip_by=skip_by)
            found.append(Contender(skip_by, call, threshold, skip_by))
    return found


def run_eagerly(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[skip.Inputs]]:
    """The model's output, and for each layer query, key and value of the first head of its self-attention
    `[1, 1, tokens, head_dim]`."""
    heads: list[skip.Inputs] = []

    def keep(attn: Any, args: tuple[Any, ...], output: Tensor) -> None:
        hidden_states, _, _, rotary_emb = args
        q, k, v = (
            tensor[:, :, :1].transpose(1, 2).clone()
            for tensor in attn.processor.inputs(attn, hidden_states, rotary_emb)
        )
        heads.append((q, k, v))

    hooks = [block.attn1.register_forward_hook(keep) for block in model.blocks]
    try:
        output = model(**inputs)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return output, heads


def left_out(heads: Sequence[skip.Inputs], skip_by: str, threshold: float) -> dict[str, float]:
    """`share` and `added`, by the oracle."""
    shares, added = [], []
    for q, k, v in heads:
        margins = tile_margins(q, k, skip_by=skip_by)
        rows = torch.randperm(q.shape[2], device=q.device)[: skip.SAMPLES]
        shares.append(skipped_share(margins, threshold))
        added.append(skip.what_tiles_cost((q, k, v), margins, TILES[skip_by], threshold, rows)[1])
    return {"share": statistics.fmean(shares), "added": statistics.fmean(added)}


def measure(
    model: Any,
    inputs: dict[str, Any],
    found: Sequence[Contender],
    problem: skip.Problem,
    repeat: int,
) -> list[dict[str, Any]]:
    """What is known of each contender under the pattern of `problem`."""
    torch.manual_seed(0)
    for block in model.blocks:
        block.attn1.processor.plant(problem)
    expected, heads = run_eagerly(model, inputs)
    rows: list[dict[str, Any]] = []
    for contender in found:
        output = contender.run(inputs)
        rows.append({"contender": contender.name, "relative_l2": relative_l2(output, expected)})
        expected = output if contender is found[0] else expected
    times = in_turns([contender.call for contender in found], inputs, expected.device, repeat)
    for contender, row, ms in zip(found, rows, times, strict=True):
        row |= {"milliseconds": ms, "of_plain": ms / times[0], "of_dense": ms / times[1]}
        row |= {"skip_threshold": contender.threshold, "skip_by": contender.skip_by, **contender.compiled}
        if contender.threshold is not None and contender.skip_by is not None:
            row |= left_out(heads, contender.skip_by, contender.threshold)
    return rows


@torch.no_grad()
def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    size = wan_video.SIZES[options.size]
    latents = TINY_LATENTS if options.size == "tiny" else wan_video.LATENTS[size.resolution]
    frames, height, width = latents
    tokens = frames * (height // 2) * (width // 2)
    model, inputs = wan_video.build(size, latents, options.layers, skip.DEVICE, skip.DTYPE)
    for block in model.blocks:
        block.attn1.set_processor(PlantedProcessor(tokens, size.head_dim))
    found = contenders(model, options)
    about = {**machine(), "model": f"Wan {options.size}", "layers": options.layers, "tokens": tokens}
    rows: list[dict[str, Any]] = []
    sys.stdout.write(
        "| pattern | one in | contender | threshold | ms | of plain | of dense | left out | adds | relative L2 | breaks | "
        "rewritten | skipping |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    # Dynamo keeps what the backends made of one code object together and counts it as recompiling.
    with torch._dynamo.config.patch(recompile_limit=8 + len(found)):
        for pattern in options.patterns:
            for one_in in (1,) if pattern == "none" else options.one_in:
                problem = skip.Problem(tokens, size.heads, size.head_dim, options.precision, pattern, one_in)
                for row in measure(model, inputs, found, problem, options.repeat):
                    if row["contender"] != "plain":
                        row |= {"kernel": options.kernel, "precision": options.precision}
                    rows.append({**about, "pattern": pattern, "of": one_in, **row})
                    show(rows[-1])
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def show(row: dict[str, Any]) -> None:
    threshold, share, added = (
        "" if row.get(name) is None else format(row[name], form)
        for name, form in (("skip_threshold", "g"), ("share", ".1%"), ("added", ".5f"))
    )
    sys.stdout.write(
        f"| {row['pattern']} | {row['of']} | {row['contender']} | {threshold} | {row['milliseconds']:.1f} | "
        f"{row['of_plain']:.3f} | {row['of_dense']:.3f} | {share} | {added} | {row['relative_l2']:.5f} | "
        f"{row['graph_breaks']} | {row['rewritten']}/{row['sites']} | {row['skipping']} |\n"
    )
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", choices=tuple(wan_video.SIZES), default="14B", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["stripes", "blocks"])
    parser.add_argument("--one-in", type=int, nargs="+", default=[2], help="blocks, of which one is high")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[skip.THRESHOLD])
    parser.add_argument("--by", nargs="+", choices=DECIDERS, default=list(DECIDERS))
    parser.add_argument(
        "--kernel",
        choices=("auto", *kernels.KERNELS),
        default="auto" if skip.DEVICE == "cuda" else "reference",
        help="default here: %(default)s",
    )
    parser.add_argument("--precision", choices=kernels.PRECISIONS, default="fast")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs of each, taken in turns")
    parser.add_argument(
        "--tiny", action="store_true", help="two heads of 1,024 tokens, for a machine without a GPU"
    )
    options = parser.parse_args(argv)
    if options.tiny:
        options.size, options.repeat = "tiny", 1
    return run(options)


if __name__ == "__main__":
    main()
