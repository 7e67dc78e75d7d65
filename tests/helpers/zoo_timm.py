"""Models of timm, which needs torchvision. "eager" switches its fused attention off."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from zoo import Entry


def vision(name: str, size: int = 32, note: str = "", **config: Any) -> Entry:
    def build(implementation: str) -> tuple[nn.Module, dict[str, Any]]:
        set_fused_attn(implementation == "sdpa")
        model = timm.create_model(name, pretrained=False, num_classes=10, **config)
        return model, {"x": torch.randn(2, 3, size, size)}

    return Entry(name, build, note=note)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
}

ENTRIES = (
    vision("vit_tiny_patch16_224", **VIT),
    vision("deit_tiny_patch16_224", **VIT),
    vision("beit_base_patch16_224", **VIT),
    vision("eva02_tiny_patch14_224", **VIT),
    vision("vit_small_patch14_dinov2", **VIT),
    vision("cait_xxs24_224", note="class attention of one query; talking heads", **VIT),
    vision(
        "xcit_nano_12_p16_224",
        note="attention between channels, which has one of the tokens as head_dim",
        **{**VIT, "patch_size": 16},
    ),
    vision("swin_tiny_patch4_window7_224", **SWIN),
    vision("swinv2_tiny_window8_256", **SWIN),
    vision("maxvit_tiny_rw_224", 64, img_size=64),
    vision("mvitv2_tiny", 64, note="positions added to a part of the scores", img_size=64),
    vision("coatnet_0_rw_224", 64, img_size=64),
    vision("pvt_v2_b0"),
    vision("mobilevitv2_050", 64, note="separable attention: no scores"),
    vision("mobilevit_xxs", 64),
    vision("levit_128s", 64, img_size=64),
    vision("efficientformer_l1", 224),
    vision("twins_pcpvt_small", 64, img_size=64),
    vision("nest_tiny", 64, img_size=64),
    vision("hiera_tiny_224", 64, img_size=64),
)
