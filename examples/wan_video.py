"""Wan video transformer (diffusers) with random weights: plain torch.compile against 8-bit attention.

    python examples/wan_video.py                                        # tiny, any machine
    python examples/wan_video.py --size 1.3B --kernel all               # on a GPU: 480p, 32,760 tokens
    python examples/wan_video.py --size 14B --json wan_14b.json         # 720p, 75,600 tokens

Sizes and token counts are those of Wan 2.1 for 81 frames; the layers are all alike, so two of them tell the
time of all. Needs `pip install diffusers`; downloads nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison import Result, add_arguments, cast, run
from torch import nn


@dataclass(frozen=True)
class Size:
    """What sets the sizes of Wan apart; `resolution` is the default one."""

    heads: int
    ffn_dim: int
    layers_in_full: int
    resolution: str
    text_dim: int = 4096
    text_tokens: int = 512  # the pipeline pads every prompt to this
    head_dim: int = 128
    channels: int = 16


SIZES = {
    "tiny": Size(2, 512, 2, "tiny", text_dim=64, text_tokens=24),
    "1.3B": Size(12, 8960, 30, "480p"),
    "14B": Size(40, 13824, 40, "720p"),
}
# Latent frames, height, width: 81 frames are 21 latent ones, and the VAE shrinks each side by 8. The model
# makes a token of each 1 x 2 x 2 patch: 32,760 tokens at 480p, 75,600 at 720p.
LATENTS = {"tiny": (3, 16, 16), "480p": (21, 60, 104), "720p": (21, 90, 160)}


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Returns the rows of the table it prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--resolution", choices=tuple(LATENTS), help="default: 480p for 1.3B, 720p for 14B")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    add_arguments(parser)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    resolution = args.resolution or size.resolution

    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model, inputs = build(size, LATENTS[resolution], args.layers, args.device, dtype)
    frames, height, width = LATENTS[resolution]
    tokens = frames * (height // 2) * (width // 2)
    print(f"Wan {args.size}, {args.layers} of {size.layers_in_full} layers, {resolution}: {tokens:,} tokens")
    return run(
        model, inputs, args, resolution == "tiny", model=f"Wan {args.size}", layers=args.layers, tokens=tokens,
        dtype=str(dtype),
    )  # fmt: skip


def build(
    size: Size, latents: tuple[int, int, int], layers: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """The model from its configuration and one denoising step's inputs."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=size.heads, attention_head_dim=size.head_dim, in_channels=size.channels,
            out_channels=size.channels, text_dim=size.text_dim, ffn_dim=size.ffn_dim, num_layers=layers,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(1, size.channels, *latents, dtype=dtype),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, size.text_tokens, size.text_dim, dtype=dtype),
            "return_dict": False,
        }
    return cast(model, dtype), inputs


if __name__ == "__main__":
    main()
