"""Every name of transformers that is not public."""

from __future__ import annotations

from typing import Any


def takes_sdpa_masks(model: Any) -> bool:
    """Whether a class of models promises to work with "sdpa", or with attention functions that transformers does not know."""
    return bool(model._supports_sdpa or model._supports_attention_backend)


def forget(interface: Any, name: str) -> None:
    """Take `name` off an `AttentionInterface` or `AttentionMaskInterface`, which have a way in only."""
    interface._global_mapping.pop(name, None)
