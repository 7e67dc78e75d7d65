"""Tiny pipelines of diffusers with random weights and no text encoders: their prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from models import BY_NAME


def flux() -> tuple[Any, dict[str, Any]]:
    """Images of 16 x 16, decoded; 64 tokens and 12 of text."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0, sample_size=16
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=BY_NAME["flux"].build()[0].eval(),
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(1, 12, 32), "pooled_prompt_embeds": torch.randn(1, 32), "height": 16, "width": 16,
    }  # fmt: skip


def wan() -> tuple[Any, dict[str, Any]]:
    """Latents of videos, by two transformers, one for the first steps; with guidance, which calls each twice a step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 64, "num_layers": 1,
    }  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), boundary_ratio=0.6,
        transformer=WanTransformer3DModel(**config).eval(), transformer_2=WanTransformer3DModel(**config).eval(),
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(1, 24, 32), "negative_prompt_embeds": torch.randn(1, 24, 32), "height": 64, "width": 64,
        "num_frames": 5, "output_type": "latent",
    }  # fmt: skip


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """Latents of images, by a UNet whose `processor` is none of the dispatcher's."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(1, 12, 32), "negative_prompt_embeds": torch.randn(1, 12, 32), "height": 64, "width": 64,
        "output_type": "latent",
    }  # fmt: skip
