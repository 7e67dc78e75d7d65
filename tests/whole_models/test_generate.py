"""`model.generate` under compile: prefill is rewritten, decode steps stay SDPA, the tokens are the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend


def llama(implementation: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=256, attn_implementation=implementation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # far from the default 0.02, so that the greedy choice is not a tie
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


# Slow: a dynamic cache with padding by one implementation and without by the other, and "eager" with a static one and padding.
SELDOM = (("dynamic", 0, "eager"), ("dynamic", 7, "sdpa"), ("static", 7, "eager"))


@pytest.mark.parametrize(
    ("cache", "padded", "implementation"),
    [
        pytest.param(*way, marks=[pytest.mark.slow] if way in SELDOM else [])
        for way in itertools.product(("dynamic", "static"), (0, 7), ("sdpa", "eager"))
    ],
)
def test_generate(cache: str, padded: int, implementation: str) -> None:
    model = llama(implementation)
    prompt = torch.randint(3, 100, (2, 30))
    attention_mask = torch.ones_like(prompt)
    attention_mask[0, :padded] = 0  # generation pads on the left
    options: dict[str, Any] = {
        "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": attention_mask
    }  # fmt: skip
    expected = model.generate(prompt, **options)
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}  # we compile forward ourselves
    backend = RewritingBackend(Config(kernel="reference", precision="accurate"))
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(prompt, **options), expected)

    prefill = [site for site in backend.sites if site.query is not None and site.query.shape[2] == 30]
    decode = [site for site in backend.sites if site not in prefill]
    mask = "causal + key_padding" if padded else "causal"
    if cache == "static" and (padded or implementation == "eager"):
        # How much of the cache is filled, which the mask starts from, is data.
        mask = "bool" if implementation == "sdpa" else "additive"
    assert len(prefill) == 1 and all(site.rewritten and site.mask == mask for site in prefill), prefill
    assert decode and all(site.reasons[0].startswith("q_len=1 (supported: 2 and more") for site in decode)
