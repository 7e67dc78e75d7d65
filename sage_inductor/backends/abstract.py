"""The interface of an attention backend, its implementation and its metadata."""

from __future__ import annotations

import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor

from sage_inductor.kernels.arguments import as_flag, as_number

log = logging.getLogger(__name__)

_warned_of: set[str] = set()  # names of arguments that hosts passed

# FastVideo's models pass these to every backend. They mean nothing to dense attention: rope_type belongs to the layer,
# nvfp4_fa4 to the FlashAttention backend.
IGNORED_IMPL_ARGS = ("rope_type", "nvfp4_fa4")
# What other hosts' interfaces (vLLM's, say) can ask of attention and these classes do not have, with the values that ask for nothing.
NEUTRAL_IMPL_ARGS: Mapping[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "alibi_slopes": (None,),
    "logits_soft_cap": (None, 0.0),
    "softcap": (None, 0.0),
    "sinks": (None,),
}


@dataclass
class AttentionMetadata:
    """What changes from call to call.

    current_timestep: step of the diffusion process; not used by these backends.
    VSA_sparsity: as FastVideo's metadata has it, for its sparse backends; not used by these.
    attn_mask: None; `[batch, key_len]` (as tokenizers make them), `[batch, q_len, key_len]` or
        `[batch or 1, heads or 1, q_len or 1, key_len]`. In bool and integer masks nonzero means attend;
        floating ones are added to the scores. A mask shorter than the keys covers the last of them; the keys
        before those are attended.
    is_causal: query i sees keys 0 .. i only, besides what attn_mask says.
    """

    current_timestep: int
    attn_mask: Tensor | None = None
    is_causal: bool = False
    VSA_sparsity: float = field(default=0.0, kw_only=True)

    def asdict_zerocopy(self, skip_fields: Collection[str] | None = None) -> dict[str, Any]:
        """`{name: value}` of the fields, without `skip_fields`. The mask is the tensor itself; `dataclasses.asdict` would copy
        it."""
        skipped = skip_fields or ()
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in skipped}


class AttentionMetadataBuilder:
    """Makes the metadata of one call."""

    def prepare(self) -> None:
        """Called before each batch; nothing to do."""

    def build(
        self,
        current_timestep: int,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        VSA_sparsity: float = 0.0,
        **others: Any,
    ) -> AttentionMetadata:
        """The arguments as `AttentionMetadata`. The mask stays as it was given. Hosts hand the same arguments to every
        builder: one that means nothing here (`raw_latent_shape`) gives a warning, once for each name."""
        for name in others:
            _warn_of_unused("build", name, name, tuple(item.name for item in fields(AttentionMetadata)), 2)
        return AttentionMetadata(current_timestep, attn_mask, is_causal, VSA_sparsity=VSA_sparsity)


class AttentionImpl(ABC):
    """Attention of one layer, on `[batch, seq, heads, head_dim]` tensors."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool,
        softmax_scale: float | None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        """
        Args:
            num_heads, num_kv_heads: heads of query, and of key and value (num_heads when None). Tensors may
                have fewer (a rank's share under sequence parallelism), in the same proportion or not.
            head_size: size of the last dim.
            causal: query i sees keys 0 .. i (top-left alignment, as SDPA).
            softmax_scale: factor of the scores, `head_size ** -0.5` when None.
            prefix: the layer's name, for error messages.
            extra_impl_args: see the subclass.

        Raises:
            ValueError: a size that is no int or below 1, num_heads that is no multiple of num_kv_heads, a scale that is no
                finite number, a causality that is no bool.
        """
        num_heads, head_size, num_kv_heads = map(as_number, (num_heads, head_size, num_kv_heads))
        softmax_scale = as_number(softmax_scale)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"num_heads": num_heads, "num_kv_heads": kv_heads, "head_size": head_size}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} (valid: an int)")
        is_number = isinstance(softmax_scale, (int, float)) and not isinstance(softmax_scale, bool)
        if softmax_scale is not None and not (is_number and abs(softmax_scale) < math.inf):
            raise ValueError(f"softmax_scale={softmax_scale!r} (valid: a finite number, None)")
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads}, num_kv_heads={kv_heads} (valid: num_heads a multiple)")
        if head_size < 1:
            raise ValueError(f"head_size={head_size} (valid: 1 and above)")
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_size = head_size
        self.causal = as_flag("causal", causal)
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        self.prefix = prefix

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        """Called on q, k, v stacked along the batch, before `forward`; returns them unchanged."""
        return qkv

    def postprocess_output(self, output: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        """Called on the output of `forward`; returns it unchanged."""
        return output

    def check_inputs(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor | None = None) -> None:
        """Raise TypeError for what is no tensor, RuntimeError for inputs that do not have 4 dims, and for a query whose head_size is not
        the layer's: softmax_scale would be wrong for it."""
        for name, tensor in (("query", query), ("key", key), ("value", value), ("output", output)):
            if not isinstance(tensor, Tensor) and (tensor is not None or name != "output"):
                raise TypeError(
                    f"{self.prefix or type(self).__name__}: {name} is a {type(tensor).__name__} (valid: a tensor)"
                )
            if tensor is not None and tensor.dim() != 4:
                raise RuntimeError(
                    f"{self.prefix or type(self).__name__}: {name} has {tensor.dim()} dimensions "
                    "(valid: 4, [batch, seq, heads, head_size])"
                )
        if query.shape[-1] != self.head_size:
            raise RuntimeError(
                f"{self.prefix or type(self).__name__}: query has head_size {query.shape[-1]} (valid: {self.head_size})"
            )

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """Attention of query `[batch, q_len, heads, head_size]` to key and value `[batch, key_len, kv_heads,
        head_size]`.

        Any object serves as metadata. Its attributes `attn_mask` and `is_causal` are honoured where it has them.

        Returns:
            `[batch, q_len, heads, head_size]` in query's dtype: `output`, when given (any strides), else a
            new contiguous tensor.

        Raises:
            RuntimeError: tensors that do not fit together, or not to head_size.
            TypeError: metadata in a dict; an input, output or mask that is no tensor.
            ValueError: a mask that does not fit (see `AttentionMetadata`).
        """


class AttentionBackend(ABC):
    """The name of a backend, its limits, and its classes."""

    # Whether `forward` writes into a tensor that the caller provides.
    accept_output_buffer: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """The name by which the backend is requested."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """The class of a layer's attention."""

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """The class of the metadata that its impl reads."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """The class that builds that metadata."""
        return AttentionMetadataBuilder

    @staticmethod
    @abstractmethod
    def get_supported_head_sizes() -> list[int] | None:
        """The head sizes that its kernels run; None: any."""

    @classmethod
    def get_supported_dtypes(cls) -> tuple[torch.dtype, ...]:
        """The dtypes that it runs."""
        return (torch.float16, torch.bfloat16, torch.float32)


def take_dropout(extra_impl_args: Mapping[str, Any], valid: tuple[str, ...] = ()) -> float:
    """The dropout probability among `extra_impl_args`: `dropout_p`, or `dropout_rate` as FastVideo's models also spell it.

    Hosts pass arguments of their own to every backend. Those of `IGNORED_IMPL_ARGS` are logged. Any other one that is not
    in `valid` gives a warning, once for each name. Raises ValueError for a dropout that is no number from 0 to 1, and for an argument that
    asks for other weights than attention's own (`NEUTRAL_IMPL_ARGS`): ignored, it would give other results.
    """
    known = (*valid, "dropout_p", "dropout_rate")
    for name, value in extra_impl_args.items():
        if name in NEUTRAL_IMPL_ARGS:
            neutral = NEUTRAL_IMPL_ARGS[name]
            number = as_number(value)
            if not isinstance(number, (float, int, NoneType)) or number not in neutral:
                raise ValueError(f"{name}={value!r} (valid: {', '.join(map(repr, neutral))})")
        elif name in IGNORED_IMPL_ARGS:
            log.debug("%s=%r has no meaning for dense attention: ignored", name, value)
        elif name not in known:
            _warn_of_unused("extra_impl_args", name, f"{name}={value!r}", known, 4)
    most = 0.0
    for name in ("dropout_p", "dropout_rate"):
        value = extra_impl_args.get(name)
        number = 0.0 if value is None else as_number(value)
        if not isinstance(number, (int, float)) or not 0.0 <= number <= 1.0:
            raise ValueError(f"{name}={value!r} (valid: 0 to 1)")
        most = max(most, float(number))
    return most


def _warn_of_unused(where: str, name: str, shown: str, valid: tuple[str, ...], stacklevel: int) -> None:
    """Warn of an argument that is not used, once for each name."""
    if name not in _warned_of:
        _warned_of.add(name)
        warnings.warn(f"{where}: {shown} is not used (valid: {', '.join(valid)})", stacklevel=stacklevel + 1)
