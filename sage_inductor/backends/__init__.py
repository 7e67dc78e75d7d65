"""Attention layers for explicit use, behind the interface that attention layers of FastVideo and vLLM call.

A backend says what it can do, an impl runs it, metadata carries what changes from call to call.
"""

from sage_inductor.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from sage_inductor.backends.sage import SageAttentionBackend, SageAttentionImpl
from sage_inductor.backends.sdpa import SDPABackend, SDPAImpl
from sage_inductor.backends.selector import get_attn_backend

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "SDPABackend",
    "SDPAImpl",
    "SageAttentionBackend",
    "SageAttentionImpl",
    "get_attn_backend",
]
