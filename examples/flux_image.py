"""Flux image transformer (diffusers) with random weights: plain torch.compile against 8-bit attention.

    python examples/flux_image.py                                       # tiny, any machine
    python examples/flux_image.py --size dev --kernel all               # on a GPU: 1024 x 1024 pixels

Image and text tokens attend to each other in one sequence: 4,096 + 512 of them at 1024 x 1024 pixels. Both
kinds of block are there, double (19 in FLUX.1 dev) and single (38); `--layers` counts each. Needs
`pip install diffusers`; downloads nothing.
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
    heads: int
    text_dim: int
    pooled_dim: int
    text_tokens: int
    side: int  # of the image in tokens, each 16 x 16 pixels
    head_dim: int = 128
    channels: int = 64

    @property
    def tokens(self) -> int:
        return self.side**2 + self.text_tokens


SIZES = {
    "tiny": Size(2, 64, 32, 24, 8),
    "dev": Size(24, 4096, 768, 512, 64),  # FLUX.1 dev at 1024 x 1024
}


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Returns the rows of the table it prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="double and single blocks (default: 2 and 2)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model, inputs = build(size, args.layers, args.device, dtype)
    print(f"Flux {args.size}, {args.layers} double and {args.layers} single blocks: {size.tokens:,} tokens")
    return run(
        model, inputs, args, args.size == "tiny", model=f"Flux {args.size}", layers=2 * args.layers,
        tokens=size.tokens, dtype=str(dtype),
    )  # fmt: skip


def build(size: Size, layers: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The model from its configuration and one denoising step's inputs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            in_channels=size.channels, num_layers=layers, num_single_layers=layers,
            attention_head_dim=size.head_dim, num_attention_heads=size.heads,
            joint_attention_dim=size.text_dim, pooled_projection_dim=size.pooled_dim, guidance_embeds=True,
        )  # fmt: skip
        row, column = torch.meshgrid(torch.arange(size.side), torch.arange(size.side), indexing="ij")
        inputs = {
            "hidden_states": torch.randn(1, size.side**2, size.channels, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, size.text_tokens, size.text_dim, dtype=dtype),
            "pooled_projections": torch.randn(1, size.pooled_dim, dtype=dtype),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "guidance": torch.tensor([3.5], dtype=torch.float32),
            "img_ids": torch.stack((torch.zeros_like(row), row, column), -1).reshape(-1, 3).to(dtype),
            "txt_ids": torch.zeros(size.text_tokens, 3, dtype=dtype),
            "return_dict": False,
        }
    return cast(model, dtype), inputs


if __name__ == "__main__":
    main()
