"""Tiny, randomly initialised models of transformers and diffusers, and what the pass must make of each.

The configurations keep what decides about attention (head dims where that is cheap, grouped heads, masks,
windows, caches) and shrink everything else. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TRANSFORMERS = "transformers/integrations/sdpa_attention.py"
DISPATCH = "diffusers/models/attention_dispatch.py"
PROCESSOR = "diffusers/models/attention_processor.py"


@dataclass(frozen=True)
class Attention:
    """One expected site: the file that calls SDPA, what the mask means, and the only reason against it (its
    beginning; None: rewritten)."""

    source: str
    mask: str
    reason: str | None = None


@dataclass(frozen=True)
class ModelCase:
    """A model, its inputs, and the attention it holds by module path, in the order of execution.

    `build` returns the model and keyword arguments. `training` runs it with dropout, `gradients` with
    gradients recorded.
    """

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    sites: dict[str, Attention]
    training: bool = False
    gradients: bool = False


def instantiate(case: ModelCase) -> tuple[nn.Module, dict[str, Any]]:
    """The model, with weights drawn so that attention carries a large part of the output, and its inputs."""
    torch.manual_seed(0)
    model, inputs = case.build()
    for module in model.modules():
        _draw_weights(module)
    return model.train(case.training), inputs


def _draw_weights(module: nn.Module) -> None:
    """Normal weights that keep the variance of what passes through. The models' own initialisation (0.02,
    zero gates) makes the attention branch vanish beside the residual, and no error would show."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            fan_in = 1 if isinstance(module, nn.Embedding) else parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5)
        elif name == "bias":
            nn.init.normal_(parameter, std=0.05)


def _ids(*shape: int, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, shape)


def _padding(batch: int, length: int, padded: int, left: bool = False) -> Tensor:
    """A tokenizer's mask `[batch, length]`; the last sequence begins or ends in `padded` padding tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(None, padded) if left else slice(length - padded, None)] = 0
    return mask


def llama(**inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": _ids(2, 140), **inputs}


def llama_with_cache(q_len: int, cached: int, static: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """`q_len` tokens behind `cached` ones. A static cache has room for 96."""
    from transformers import DynamicCache, StaticCache

    model, _ = llama()
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=96) if static else DynamicCache(config=config)
    if cached:
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(2, 2, cached, 64), torch.randn(2, 2, cached, 64), layer)
    return model, {"input_ids": _ids(2, q_len), "past_key_values": cache}


def qwen3() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config), {"input_ids": _ids(1, 70), "use_cache": False}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128, n_positions=96, n_embd=128, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config), {"input_ids": _ids(2, 70), "use_cache": False}


def bert(padded: int) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    inputs = {"input_ids": _ids(2, 40)}
    return BertModel(config), inputs | ({"attention_mask": _padding(2, 40, padded)} if padded else {})


def vit() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64,
        patch_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    return ViTModel(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=128, num_mel_bins=16, d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=48, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    inputs = {"input_features": torch.randn(1, 16, 96), "decoder_input_ids": _ids(1, 20), "use_cache": False}
    return WhisperForConditionalGeneration(config), inputs


def t5() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=128, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    return T5Model(config), {"input_ids": _ids(1, 40), "decoder_input_ids": _ids(1, 20), "use_cache": False}


def gemma3() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], attn_implementation="sdpa",
    )  # fmt: skip
    return Gemma3ForCausalLM(config), {"input_ids": _ids(1, 70), "use_cache": False}


def wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 24, 32),
        "return_dict": False,
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    image_ids = torch.zeros(64, 3)
    image_ids[:, 1:] = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    inputs = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(12, 3),
        "return_dict": False,
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    return model, inputs


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
        max_text_seq_length=12,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    return model, inputs


def ltx() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 48, 8),
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": _padding(2, 16, 6),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }
    return model, inputs


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, text_embed_dim=32,
        pooled_projection_dim=32, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 1, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 24, 32),
        "encoder_attention_mask": _padding(2, 24, 14),
        "pooled_projections": torch.randn(2, 32),
        "guidance": torch.tensor([6.0, 6.0]),
        "return_dict": False,
    }
    return model, inputs


def qwen_image(padded: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 48, 16),
        "encoder_hidden_states": torch.randn(2, 12, 32),
        "encoder_hidden_states_mask": _padding(2, 12, padded) if padded else None,
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 6, 8)]] * 2,
        "return_dict": False,
    }
    return model, inputs


def unet(attention: str = "CrossAttn") -> tuple[nn.Module, dict[str, Any]]:
    """Without `attention` in the blocks that go down and up, there is some in the middle."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, down_block_types=(f"{attention}DownBlock2D",),
        up_block_types=(f"{attention}UpBlock2D",), attention_head_dim=2,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "return_dict": False,
    }
    return model, inputs


def _sites(names: str, **attention: Any) -> dict[str, Attention]:
    return {name: Attention(**attention) for name in names.split()}


def _by_layer(name: str, **attention: Any) -> dict[str, Attention]:
    """The same attention in layers 0 and 1; `*` in the name stands for the number."""
    return {name.replace("*", str(layer)): Attention(**attention) for layer in range(2)}


ENCODER_LAYERS = "encoder.layer.*.attention.self"
Q_LEN_1 = "q_len=1 (supported: 2 and more;"

CASES = (
    ModelCase("llama", llama, _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="causal")),
    ModelCase(
        "llama without cache",
        lambda: llama(use_cache=False),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="causal"),
    ),
    ModelCase(
        "llama padded left",
        lambda: llama(attention_mask=_padding(2, 140, 30, left=True)),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="causal + key_padding"),
    ),
    ModelCase(
        "llama chunked prefill",
        lambda: llama_with_cache(q_len=16, cached=64),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="causal bottom-right"),
    ),
    ModelCase(
        "llama decode step",
        lambda: llama_with_cache(q_len=1, cached=64),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="none", reason=Q_LEN_1),
    ),
    ModelCase(
        "llama static cache prefill",
        lambda: llama_with_cache(q_len=40, cached=0, static=True),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="causal"),
    ),
    ModelCase(  # how much of the cache is filled is data
        "llama static cache chunk",
        lambda: llama_with_cache(q_len=8, cached=40, static=True),
        _by_layer("layers.*.self_attn", source=TRANSFORMERS, mask="bool"),
    ),
    ModelCase("qwen3", qwen3, _by_layer("model.layers.*.self_attn", source=TRANSFORMERS, mask="causal")),
    ModelCase("gpt2", gpt2, _by_layer("transformer.h.*.attn", source=TRANSFORMERS, mask="causal")),
    ModelCase("bert", lambda: bert(0), _by_layer(ENCODER_LAYERS, source=TRANSFORMERS, mask="none")),
    ModelCase(
        "bert padded", lambda: bert(16), _by_layer(ENCODER_LAYERS, source=TRANSFORMERS, mask="key_padding")
    ),
    ModelCase(
        "bert with dropout",
        lambda: bert(0),
        _by_layer(ENCODER_LAYERS, source=TRANSFORMERS, mask="none", reason="dropout_p=0.1 (supported: 0.0)"),
        training=True,
    ),
    ModelCase(
        "bert with gradients",
        lambda: bert(16),
        _by_layer(
            ENCODER_LAYERS, source=TRANSFORMERS, mask="key_padding", reason="requires_grad=query, key, value"
        ),
        gradients=True,
    ),
    ModelCase("vit", vit, _by_layer("layers.*.attention", source=TRANSFORMERS, mask="none")),
    ModelCase(
        "whisper",
        whisper,
        {
            "model.encoder.layers.0.self_attn": Attention(TRANSFORMERS, "none"),
            "model.decoder.layers.0.self_attn": Attention(TRANSFORMERS, "causal"),
            "model.decoder.layers.0.encoder_attn": Attention(TRANSFORMERS, "none"),
        },
    ),
    ModelCase(
        "t5",  # a learned bias is an additive mask; that of the cross attention is all zeros
        t5,
        {
            "encoder.block.0.layer.0.SelfAttention": Attention(TRANSFORMERS, "additive"),
            "decoder.block.0.layer.0.SelfAttention": Attention(TRANSFORMERS, "additive"),
            "decoder.block.0.layer.1.EncDecAttention": Attention(TRANSFORMERS, "zero_bias"),
        },
    ),
    ModelCase(
        "gemma3",  # a window of 16 tokens is the token itself and 15 before it
        gemma3,
        {
            "model.layers.0.self_attn": Attention(TRANSFORMERS, "sliding_window left=15 right=0"),
            "model.layers.1.self_attn": Attention(TRANSFORMERS, "causal"),
        },
    ),
    ModelCase(
        "wan",
        wan,
        _sites("blocks.0.attn1 blocks.0.attn2 blocks.1.attn1 blocks.1.attn2", source=DISPATCH, mask="none"),
    ),
    ModelCase(
        "flux",
        flux,
        _sites("transformer_blocks.0.attn single_transformer_blocks.0.attn", source=DISPATCH, mask="none"),
    ),
    ModelCase(
        "sd3",
        sd3,
        _sites(
            "transformer_blocks.0.attn transformer_blocks.0.attn2 transformer_blocks.1.attn",
            source=PROCESSOR,
            mask="none",
        ),
    ),
    ModelCase("cogvideox", cogvideox, _by_layer("transformer_blocks.*.attn1", source=PROCESSOR, mask="none")),
    ModelCase(
        "ltx",
        ltx,
        {
            "transformer_blocks.0.attn1": Attention(DISPATCH, "none"),
            "transformer_blocks.0.attn2": Attention(DISPATCH, "key_padding"),
            "transformer_blocks.1.attn1": Attention(DISPATCH, "none"),
            "transformer_blocks.1.attn2": Attention(DISPATCH, "key_padding"),
        },
    ),
    ModelCase(
        "hunyuan_video",  # the refiner's mask also blocks queries
        hunyuan_video,
        {
            "context_embedder.token_refiner.refiner_blocks.0.attn": Attention(PROCESSOR, "bool"),
            "transformer_blocks.0.attn": Attention(DISPATCH, "key_padding"),
            "single_transformer_blocks.0.attn": Attention(DISPATCH, "key_padding"),
        },
    ),
    ModelCase(
        "qwen_image",
        lambda: qwen_image(0),
        _by_layer("transformer_blocks.*.attn", source=DISPATCH, mask="none"),
    ),
    ModelCase(
        "qwen_image padded",
        lambda: qwen_image(8),
        _by_layer("transformer_blocks.*.attn", source=DISPATCH, mask="key_padding"),
    ),
    ModelCase(
        "unet",
        unet,
        _sites(
            " ".join(
                f"{block}.transformer_blocks.0.{attention}"
                for block in (
                    "down_blocks.0.attentions.0",
                    "mid_block.attentions.0",
                    "up_blocks.0.attentions.0",
                    "up_blocks.0.attentions.1",
                )
                for attention in ("attn1", "attn2")
            ),
            source=PROCESSOR,
            mask="none",
        ),
    ),
)
BY_NAME = {case.name: case for case in CASES}
