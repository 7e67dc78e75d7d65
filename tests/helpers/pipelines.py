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


def stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    """Latents of images, text and image in one sequence; with guidance, both prompts in one batch."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None, transformer=BY_NAME["sd3"].build()[0].eval(),
    )  # fmt: skip
    return pipeline, {
        **_pair("prompt_embeds", 1, 12, 32), **_pair("pooled_prompt_embeds", 1, 32, negative="negative_pooled_prompt_embeds"),
        "height": 128, "width": 128, "output_type": "latent",
    }  # fmt: skip


def chroma() -> tuple[Any, dict[str, Any]]:
    """Latents of images; the padding of each prompt is masked."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 12, 12), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=8,
    )  # fmt: skip
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer.eval()
    )  # fmt: skip
    return pipeline, {
        **_pair("prompt_embeds", 1, 12, 32), "prompt_attention_mask": _mask().bool(),
        "negative_prompt_attention_mask": _mask(9).bool(), "height": 64, "width": 64, "output_type": "latent",
    }  # fmt: skip


def ltx() -> tuple[Any, dict[str, Any]]:
    """Latents of videos; attention across reads masked prompts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    torch.manual_seed(0)
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=BY_NAME["ltx"].build()[0].eval(),
    )  # fmt: skip
    return pipeline, {
        **_pair("prompt_embeds", 1, 12, 32), **_masks("prompt_attention_mask"), "height": 128, "width": 128, "num_frames": 17,
        "output_type": "latent",
    }  # fmt: skip


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    """Latents of videos; the padding of the prompt is masked in one sequence with the video."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    torch.manual_seed(0)
    pipeline = HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=BY_NAME["hunyuan_video"].build()[0].eval(),
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(1, 12, 32), "pooled_prompt_embeds": torch.randn(1, 32),
        "prompt_attention_mask": _mask(), "height": 64, "width": 64, "num_frames": 5, "output_type": "latent",
    }  # fmt: skip


def qwen_image() -> tuple[Any, dict[str, Any]]:
    """Latents of images; the padding of the prompt is masked in one sequence with the image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    torch.manual_seed(0)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None, tokenizer=None,
        transformer=BY_NAME["qwen_image padded"].build()[0].eval(),
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(1, 12, 32), "prompt_embeds_mask": _mask(), "height": 64, "width": 64,
        "output_type": "latent",
    }  # fmt: skip


def pixart_sigma() -> tuple[Any, dict[str, Any]]:
    """Latents of images; attention across reads masked prompts."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=64, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    pipeline = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer.eval(), scheduler=DPMSolverMultistepScheduler()
    )  # fmt: skip
    return pipeline, {
        **_pair("prompt_embeds", 1, 12, 32), **_masks("prompt_attention_mask"), "negative_prompt": None, "height": 64,
        "width": 64, "use_resolution_binning": False, "output_type": "latent",
    }  # fmt: skip


def cogvideox() -> tuple[Any, dict[str, Any]]:
    """Latents of videos, by a model that calls SDPA itself."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    torch.manual_seed(0)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=BY_NAME["cogvideox"].build()[0].eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return pipeline, {
        **_pair("prompt_embeds", 1, 12, 32), "height": 64, "width": 64, "num_frames": 9, "output_type": "latent",
    }  # fmt: skip


def _pair(name: str, *shape: int, negative: str = "") -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of a negative one."""
    return {name: torch.randn(*shape), negative or f"negative_{name}": torch.randn(*shape)}


def _masks(name: str) -> dict[str, torch.Tensor]:
    return {name: _mask(), f"negative_{name}": _mask(9)}


def _mask(there: int = 7) -> torch.Tensor:
    """Of a prompt of 12 tokens."""
    return (torch.arange(12) < there)[None].long()
