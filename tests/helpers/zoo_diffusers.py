"""Models of diffusers. "eager" sets the attention processors of before SDPA, where a model takes them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor
from models import BY_NAME
from torch import nn
from zoo import Entry, padding

SDPA = ("sdpa",)
LATENT = torch.Size([1, 4, 8, 8])
TOKENS = torch.Size([1, 12, 32])


def net(
    cls: str,
    config: dict[str, Any],
    inputs: dict[str, Any],
    implementations: tuple[str, ...] = ("eager", "sdpa"),
    note: str = "",
) -> Entry:
    """`inputs`: a torch.Size stands for a random tensor of that shape."""

    def build(implementation: str) -> tuple[nn.Module, dict[str, Any]]:
        model = getattr(diffusers, cls)(**config)
        if implementation == "eager":
            model.set_attn_processor(AttnProcessor())
        drawn = {
            name: torch.randn(item) if isinstance(item, torch.Size) else item for name, item in inputs.items()
        }
        return model, {**drawn, "return_dict": False}

    return Entry(cls, build, implementations, note)


def known(name: str) -> Entry:
    """A model that tests/helpers/models.py has."""
    return Entry(name, lambda implementation: BY_NAME[name].build(), SDPA)


STEP = torch.tensor([500])
UNET = {
    "sample_size": 8, "block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8,
    "cross_attention_dim": 32,
}  # fmt: skip
DIT = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}

ENTRIES = (
    *(known(name) for name in ("wan", "flux", "sd3", "cogvideox", "ltx", "hunyuan_video", "qwen_image padded")),
    net(
        "UNet2DConditionModel",
        {**UNET, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
         "attention_head_dim": 2},
        {"sample": LATENT, "timestep": torch.tensor(5), "encoder_hidden_states": TOKENS,
         "encoder_attention_mask": padding(1, 12, 3)},
    ),
    net(
        "UNet3DConditionModel",
        {**UNET, "down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",),
         "attention_head_dim": 16},
        {"sample": torch.Size([1, 4, 2, 8, 8]), "timestep": torch.tensor(5), "encoder_hidden_states": TOKENS},
    ),
    net("AutoencoderKL", {"block_out_channels": (32,), "norm_num_groups": 8, "sample_size": 16},
        {"sample": torch.Size([1, 3, 16, 16])}),
    net("DiTTransformer2DModel", {**DIT, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero"},
        {"hidden_states": LATENT, "timestep": STEP, "class_labels": torch.tensor([3])}, SDPA),
    net(
        "PixArtTransformer2DModel",
        {**DIT, "cross_attention_dim": 64, "caption_channels": 64, "num_embeds_ada_norm": 10,
         "use_additional_conditions": False},
        {"hidden_states": LATENT, "timestep": STEP, "encoder_hidden_states": torch.Size([1, 12, 64]),
         "encoder_attention_mask": padding(1, 12, 3),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    net(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "axes_dim_rope": (8, 8, 8), "axes_lens": (32, 32, 32),
         "cap_feat_dim": 32, "multiple_of": 16},
        {"hidden_states": torch.Size([2, 4, 8, 8]), "timestep": torch.tensor([0.5, 0.5]),
         "encoder_hidden_states": torch.Size([2, 12, 32]), "encoder_attention_mask": padding(2, 12, 3).bool()}, SDPA,
    ),
    net(
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 64,
         "pos_embed_max_size": 64},
        {"hidden_states": LATENT, "timestep": torch.tensor([0.5]), "encoder_hidden_states": TOKENS}, SDPA,
    ),
    net(
        "SanaTransformer2DModel",
        {**DIT, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
         "cross_attention_dim": 64, "caption_channels": 32},
        {"hidden_states": LATENT, "timestep": STEP, "encoder_hidden_states": TOKENS,
         "encoder_attention_mask": padding(1, 12, 3)}, SDPA, "its self-attention is linear",
    ),
    net(
        "AllegroTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2,
         "cross_attention_dim": 64, "caption_channels": 32, "sample_height": 8, "sample_width": 8, "sample_frames": 2},
        {"hidden_states": torch.Size([1, 4, 2, 8, 8]), "timestep": STEP, "encoder_hidden_states": TOKENS,
         "encoder_attention_mask": padding(1, 12, 3), "attention_mask": torch.ones(1, 2, 8, 8),
         "image_rotary_emb": None}, SDPA,
    ),
    net(
        "StableAudioDiTModel",
        {"sample_size": 16, "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 64,
         "num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 32,
         "cross_attention_input_dim": 32, "global_states_input_dim": 64, "time_proj_dim": 32},
        {"hidden_states": torch.Size([1, 8, 16]), "timestep": STEP, "encoder_hidden_states": torch.Size([1, 6, 32]),
         "global_hidden_states": torch.Size([1, 1, 64]),
         "rotary_embedding": (torch.ones(17, 32).cos(), torch.ones(17, 32).sin())}, SDPA,
    ),
    net(
        "ChromaTransformer2DModel",
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 2,
         "joint_attention_dim": 32, "axes_dims_rope": (16, 24, 24), "approximator_hidden_dim": 32,
         "approximator_layers": 1, "approximator_num_channels": 16},
        {"hidden_states": torch.Size([1, 64, 16]), "encoder_hidden_states": TOKENS, "timestep": torch.tensor([0.5]),
         "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(12, 3),
         "attention_mask": torch.cat([padding(1, 12, 3), torch.ones(1, 64, dtype=torch.long)], 1).bool()}, SDPA,
    ),
    net(
        "CogView4Transformer2DModel",
        {**DIT, "in_channels": 4, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 8,
         "rope_axes_dim": (64, 64)},
        {"hidden_states": LATENT, "encoder_hidden_states": TOKENS, "timestep": STEP,
         "original_size": torch.tensor([[64.0, 64.0]]), "target_size": torch.tensor([[64.0, 64.0]]),
         "crop_coords": torch.tensor([[0.0, 0.0]])}, SDPA,
    ),
    net(
        "LatteTransformer3DModel",
        {**DIT, "patch_size": 2, "caption_channels": 32, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 64,
         "num_embeds_ada_norm": 10, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
         "video_length": 2},
        {"hidden_states": torch.Size([1, 4, 2, 8, 8]), "timestep": STEP, "encoder_hidden_states": TOKENS}, SDPA,
    ),
    net(
        "PriorTransformer",
        {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "embedding_dim": 32, "num_embeddings": 7,
         "additional_embeddings": 4},
        {"hidden_states": torch.Size([1, 32]), "timestep": torch.tensor([5]), "proj_embedding": torch.Size([1, 32]),
         "encoder_hidden_states": torch.Size([1, 7, 32]), "attention_mask": torch.ones(1, 7, dtype=torch.bool)},
    ),
    net(
        "UNetSpatioTemporalConditionModel",
        {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 32,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_attention_heads": 2,
         "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96,
         "transformer_layers_per_block": 1},
        {"sample": torch.Size([1, 2, 8, 8, 8]), "timestep": torch.tensor(5),
         "encoder_hidden_states": torch.Size([1, 1, 32]), "added_time_ids": torch.Size([1, 3])}, SDPA,
    ),
)  # fmt: skip
