"""The models of masks_table.py: made from their configurations with random weights, two layers each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


def on(device: str, model: nn.Module, inputs: dict[str, Any]) -> Built:
    """On a GPU in bfloat16, on a CPU in float32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return model.to(device, dtype).eval(), {name: moved(value) for name, value in inputs.items()}


def hunyuan_video(device: str, tiny: bool) -> Built:
    """720p, 129 frames: 33 x 45 x 80 patches. 256 tokens of text, of which 60 are there."""
    from diffusers import HunyuanVideoTransformer3DModel

    sizes: dict[str, Any] = {}
    latents, text, seen = (33, 90, 160), 256, 60
    if tiny:
        latents, text, seen = (1, 8, 8), 24, 14
        sizes = {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 64,
            "num_refiner_layers": 1, "mlp_ratio": 1.0, "text_embed_dim": 32, "pooled_projection_dim": 32,
            "rope_axes_dim": (16, 24, 24),
        }  # fmt: skip
    with torch.device(device):
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, **sizes)
    config = model.config
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, *latents),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": (torch.arange(text) < seen)[None].long(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6.0]),
        "return_dict": False,
    }
    return on(device, model, inputs)


def qwen_image(device: str, tiny: bool) -> Built:
    """1328 x 1328: 83 x 83 patches. 512 tokens of text, of which 300 are there."""
    from diffusers import QwenImageTransformer2DModel

    sizes: dict[str, Any] = {}
    side, text, seen = 83, 512, 300
    if tiny:
        side, text, seen = 6, 12, 7
        sizes = {
            "in_channels": 16, "out_channels": 4, "attention_head_dim": 64, "num_attention_heads": 2,
            "joint_attention_dim": 32, "axes_dims_rope": (16, 24, 24),
        }  # fmt: skip
    with torch.device(device):
        model = QwenImageTransformer2DModel(num_layers=2, **sizes)
    config = model.config
    inputs = {
        "hidden_states": torch.randn(1, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": (torch.arange(text) < seen)[None].long(),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }
    return on(device, model, inputs)


def qwen3(device: str, tiny: bool, by_hand: bool = False) -> Built:
    """Qwen3-8B's layers on 32,768 tokens. `by_hand`: no mask is made, and SDPA is told `is_causal=True`."""
    from transformers import AttentionInterface, AttentionMaskInterface, Qwen3Config, Qwen3Model

    AttentionInterface.register("causal_by_hand", _causal_by_hand)
    AttentionMaskInterface.register("causal_by_hand", lambda *args, **kwargs: None)
    tokens, sizes = 32_768, dict[str, Any](hidden_size=4096, intermediate_size=12_288, num_attention_heads=32)
    if tiny:
        tokens, sizes = 96, {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = Qwen3Config(
        num_hidden_layers=2, num_key_value_heads=sizes["num_attention_heads"] // 4,
        head_dim=32 if tiny else 128, vocab_size=512, max_position_embeddings=40_960, **sizes,
    )  # fmt: skip
    config._attn_implementation = "causal_by_hand" if by_hand else "sdpa"
    torch.manual_seed(0)  # the same weights either way
    with torch.device(device):
        model = Qwen3Model(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (1, tokens), generator=generator)
    return on(device, model, {"input_ids": ids, "use_cache": False, "return_dict": False})


def _causal_by_hand(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None
