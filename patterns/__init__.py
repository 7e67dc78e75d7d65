"""The ways in which attention is written, one idiom per file; `ALL` lists them in the order tried."""

if __name__ != "sage_inductor.patterns":
    raise ImportError(
        f"this folder is the package sage_inductor.patterns but was imported as {__name__!r}: a second copy "
        "of the patterns would not be the one in use. Import sage_inductor.patterns."
    )

from sage_inductor.graph.call import OpaquePattern, Pattern
from sage_inductor.patterns.efficient_attention import EfficientAttention
from sage_inductor.patterns.flash_attention import FlashAttention
from sage_inductor.patterns.flex_attention import FlexAttention
from sage_inductor.patterns.fused_attention import FusedAttention
from sage_inductor.patterns.multi_head_attention import MultiHeadAttention, TransformerEncoderLayer
from sage_inductor.patterns.sdpa import ManyDims, ScaledDotProductAttention
from sage_inductor.patterns.softmax_matmul import SoftmaxMatmul
from sage_inductor.patterns.varlen_attention import VarlenAttention

_FLASH_ATTENTION, _EFFICIENT_ATTENTION = FlashAttention(), EfficientAttention()
ALL: tuple[Pattern, ...] = (
    ManyDims(),
    ScaledDotProductAttention(),
    FusedAttention(),
    _FLASH_ATTENTION,
    _EFFICIENT_ATTENTION,
    SoftmaxMatmul(),
)
OPAQUE: tuple[OpaquePattern, ...] = (
    MultiHeadAttention(),
    TransformerEncoderLayer(),
    FlexAttention(),
    VarlenAttention(),
    _FLASH_ATTENTION,  # those of their calls that stay
    _EFFICIENT_ATTENTION,
)

__all__ = [
    "ALL",
    "OPAQUE",
    "EfficientAttention",
    "FlashAttention",
    "FlexAttention",
    "FusedAttention",
    "ManyDims",
    "MultiHeadAttention",
    "ScaledDotProductAttention",
    "SoftmaxMatmul",
    "TransformerEncoderLayer",
    "VarlenAttention",
]
