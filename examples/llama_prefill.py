"""Llama (transformers) with random weights, reading a prompt: plain torch.compile against 8-bit attention.

    python examples/llama_prefill.py                                    # tiny, any machine
    python examples/llama_prefill.py --size 8B --kernel all             # on a GPU: 2 layers, 8,192 tokens

Only the prefill is a case for 8-bit attention: a decode step reads K and V once for a single query, and stays
as it is. Needs `pip install transformers`; downloads nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison import Result, add_arguments, run
from torch import nn


@dataclass(frozen=True)
class Size:
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocabulary: int
    layers_in_full: int
    tokens: int


SIZES = {
    "tiny": Size(4, 2, 64, 256, 256, 2, 256),
    "8B": Size(32, 8, 128, 14336, 128256, 32, 8192),  # Llama 3.1 8B
}
LOGITS = 64  # tokens at the end of the prompt whose logits are computed and compared


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Returns the rows of the table it prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, help="length of the prompt (default: 8192 for 8B)")
    parser.add_argument("--batch", type=int, default=1, help="prompts of that length")
    add_arguments(parser)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    tokens = args.tokens or size.tokens

    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model, inputs = build(size, args.layers, args.batch, tokens, args.device, dtype)
    print(
        f"Llama {args.size}, {args.layers} of {size.layers_in_full} layers: {args.batch} x {tokens:,} tokens; "
        f"errors: logits of the last {LOGITS} tokens"
    )
    return run(
        model, inputs, args, args.size == "tiny", model=f"Llama {args.size}", layers=args.layers,
        batch=args.batch, tokens=tokens, dtype=str(dtype),
    )  # fmt: skip


def build(
    size: Size, layers: int, batch: int, tokens: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """The model from its configuration and a random prompt; it fills a KV cache as generation does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.heads * size.head_dim, intermediate_size=size.ffn_dim,
        num_hidden_layers=layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(tokens, 8192), attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
        prompt = torch.randint(0, size.vocabulary, (batch, tokens))
    inputs = {"input_ids": prompt, "use_cache": True, "logits_to_keep": LOGITS, "return_dict": False}
    return model, inputs


if __name__ == "__main__":
    main()
