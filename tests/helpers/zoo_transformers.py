"""Models of transformers: language models, encoders, sequence to sequence, vision, audio, several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from zoo import Entry, ids, padding

EAGER = ("eager",)
Inputs = Callable[[], dict[str, Any]]


def auto(
    kind: str, inputs: Inputs, config: dict[str, Any]
) -> Callable[[str], tuple[nn.Module, dict[str, Any]]]:
    def build(implementation: str) -> tuple[nn.Module, dict[str, Any]]:
        model = AutoModel.from_config(
            AutoConfig.for_model(kind, **config), attn_implementation=implementation
        )
        return model, inputs()

    return build


TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
LATENT = {
    **TEXT, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
}  # fmt: skip
GPT2 = {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
SEQ2SEQ = {
    **TEXT, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "attention_type": "original_full",
}  # fmt: skip
T5 = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2
}  # fmt: skip
PYRAMID = {
    "image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
AUDIO = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "conv_dim": (16, 16),
    "conv_stride": (5, 4), "conv_kernel": (10, 5), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
}  # fmt: skip
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "out_features": ["stage2"], "layer_type": "basic",
    },
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6,
}  # fmt: skip
PAIR = {
    "text_config": {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 2,
    },
    "vision_config": {name: size for name, size in VISION.items() if name != "num_channels"},
    "projection_dim": 32,
}  # fmt: skip


def decoder() -> dict[str, Any]:
    """Padded on the left, as for generation: its first queries see no key."""
    return {"input_ids": ids(2, 24), "attention_mask": padding(2, 24, 5, left=True), "use_cache": False}


def encoder() -> dict[str, Any]:
    return {"input_ids": ids(2, 24), "attention_mask": padding(2, 24, 5)}


def seq2seq() -> dict[str, Any]:
    return {**encoder(), "decoder_input_ids": ids(2, 11), "use_cache": False}


def image(size: int = 32, batch: int = 2) -> Inputs:
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 4, 3, 32, 32)}


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800), "attention_mask": padding(2, 800, 200)}


def image_and_text() -> dict[str, Any]:
    return {
        "input_ids": ids(2, 12), "attention_mask": padding(2, 12, 3), "pixel_values": torch.randn(2, 3, 32, 32)
    }  # fmt: skip


def llava() -> dict[str, Any]:
    text = ids(1, 10, vocabulary=99)
    return {
        "input_ids": torch.cat([torch.full((1, 16), 100), text], 1), "pixel_values": torch.randn(1, 3, 32, 32),
        "use_cache": False,
    }  # fmt: skip


def sam(implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, output_channels=32,
        window_size=4, global_attn_indexes=[1], mlp_dim=64, use_rel_pos=True, attn_implementation=implementation,
    )  # fmt: skip
    return SamVisionModel._from_config(config, attn_implementation=implementation), image(64, 1)()


def _all(kinds: str, inputs: Inputs, config: dict[str, Any], *only: tuple[str, ...]) -> list[Entry]:
    return [Entry(kind, auto(kind, inputs, config), *only) for kind in kinds.split()]


def _one(
    kind: str,
    inputs: Inputs,
    config: dict[str, Any],
    implementations: tuple[str, ...] = ("eager", "sdpa"),
    note: str = "",
    name: str = "",
) -> Entry:
    return Entry(name or kind, auto(kind, inputs, config), implementations, note)


ENTRIES = (
    *_all("llama mistral phi3 gemma qwen2 qwen3 cohere olmo2 starcoder2 stablelm nemotron granite", decoder, GROUPED),
    *_all("gemma3_text diffllama doge lfm2", decoder, GROUPED),
    *_all("mixtral qwen3_moe", decoder, GROUPED),
    _one("gemma2", decoder, GROUPED, EAGER, "softcap"),
    _one("gpt_oss", decoder, GROUPED, EAGER),
    _one("deepseek_v3", decoder, LATENT),
    _one(
        "llama4_text", decoder,
        {**GROUPED, "attention_chunk_size": 8, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64,
         "layer_types": ["chunked_attention", "full_attention"]},
    ),
    _one("opt", decoder, {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 64}),
    _one("gpt_neox", decoder, TEXT),
    *_all("gpt2 gpt_bigcode", decoder, GPT2),
    _one("gptj", decoder, {**GPT2, "rotary_dim": 8}, EAGER),
    _one(
        "gpt_neo", decoder,
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}, EAGER,
    ),
    _one("openai-gpt", encoder, GPT2, EAGER, "scores times a buffer of floats"),
    _one("falcon", decoder, TEXT),
    _one(
        "falcon", decoder, {**TEXT, "alibi": True, "new_decoder_architecture": False, "multi_query": False},
        name="falcon, ALiBi",
    ),
    _one("bloom", decoder, {**TEXT, "n_layer": 2, "n_head": 4}, EAGER),
    _one("mpt", decoder, {**TEXT, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, EAGER),
    _one("xglm", decoder, {**TEXT, "d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, EAGER),
    *_all("bert roberta electra esm modernbert", encoder, {**TEXT, "mask_token_id": 3}),
    *_all("mpnet deberta-v2 rembert roformer big_bird nystromformer canine", encoder, TEXT, EAGER),
    _one("deberta", encoder, {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, EAGER,
         "the model breaks the graph between scores and softmax"),
    _one("albert", encoder, {**TEXT, "embedding_size": 32}),
    _one("distilbert", encoder, {**TEXT, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    _one("xlnet", encoder, {**TEXT, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64}, EAGER),
    _one("xlm", encoder, {**TEXT, "emb_dim": 64, "n_layers": 2, "n_heads": 4}, EAGER),
    _one("longformer", encoder, {**TEXT, "attention_window": 8}, EAGER, "sliding chunks by hand"),
    _one("fnet", lambda: {"input_ids": ids(2, 24)}, TEXT, EAGER),
    *_all("bart pegasus m2m_100 marian", seq2seq, SEQ2SEQ),
    *_all("bigbird_pegasus mvp", seq2seq, SEQ2SEQ, EAGER),
    *_all("t5 mt5", seq2seq, T5),
    *_all("vit deit dinov2 beit siglip_vision_model", image(), VISION),
    _one("videomae", video, {**VISION, "num_frames": 4, "tubelet_size": 2}),
    _one("vivit", video, {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    _one("timesformer", video, {**VISION, "num_frames": 4}, EAGER),
    _one("swin", image(), SWIN),
    _one("swinv2", image(), SWIN, EAGER),
    _one("pvt_v2", image(), PYRAMID, EAGER),
    _one("segformer", image(), PYRAMID),
    _one(
        "hiera", image(64, 1),
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "patch_size": [7, 7],
         "query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [8, 8]}, EAGER,
    ),
    _one(
        "vitdet", image(),
        {**VISION, "pretrain_image_size": 32, "use_relative_position_embeddings": True, "window_size": 2,
         "window_block_indices": [0]}, EAGER,
    ),
    Entry("sam", sam),
    *_all("clip siglip", image_and_text, PAIR),
    _one(
        "llava", llava,
        {"text_config": {"model_type": "llama", **GROUPED},
         "vision_config": {"model_type": "clip_vision_model", **PAIR["vision_config"]},  # type: ignore[dict-item]
         "image_token_index": 100, "image_token_id": 100, "vision_feature_select_strategy": "default"},
    ),
    *_all("detr conditional_detr", image(64, 1), DETR, EAGER),
    *_all("wav2vec2 hubert", wave, AUDIO),
    _one("wavlm", wave, AUDIO, EAGER),
    _one("wav2vec2-conformer", wave, {**AUDIO, "position_embeddings_type": "relative"}),
    _one(
        "whisper",
        lambda: {"input_features": torch.randn(1, 16, 96), "decoder_input_ids": ids(1, 20), "use_cache": False},
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 48, "max_target_positions": 32,
         "decoder_start_token_id": 1},
    ),
    _one(
        "perceiver", lambda: {"inputs": torch.randn(2, 20, 32), "attention_mask": padding(2, 20, 4)},
        {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
         "num_self_attention_heads": 2, "num_cross_attention_heads": 2}, EAGER,
    ),
)  # fmt: skip
