"""xDiT: its backend SAGE becomes the kernels of this package.

    import sage_inductor.integrations.xdit as sage
    sage.register()                     # in the script that each rank runs
    ... --attention_backend sage        # or get_runtime_state().set_attention_backend("sage")

xDiT keeps a function for each member of its list of backends. `register` puts another one in SAGE's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sage_inductor.config import Config
from sage_inductor.operators.functional import sage_attention
from sage_inductor.torch_internals.distributed import waited_for

SUPPORTED = "0.4.5"
SELECTED = "SAGE"
USED = ("kernel", "precision", "smoothing", "skip_threshold", "skip_by")

_replaced: list[Callable[..., Any] | None] = []  # what xDiT had there


def register(config: Config | None = None) -> None:
    """Let xDiT's backend SAGE be this package's kernels. In its ring they give the log-sum-exp that it merges by.

    Masks among `attention_kwargs` are honoured, as `attn_mask` or as the indices of the keys that count; not in a ring, where
    xDiT passes those of a rank's own keys. Called again, it replaces the config.

    Args:
        config: `kernel`, `precision`, `smoothing`, `skip_threshold` and `skip_by` are used.

    Raises:
        ImportError: xDiT is not installed, or of another form; names the version that is supported.
        ValueError: a field of `config` that means nothing here.
    """
    chosen, default = Config.of(config), Config()
    for field in fields(Config):
        if field.name not in USED and getattr(chosen, field.name) != getattr(default, field.name):
            raise ValueError(
                f"config.{field.name}={getattr(chosen, field.name)!r} (valid here: {', '.join(USED)})"
            )
    functions, member, ring_degree = _xdit()
    if not _replaced:
        _replaced.append(functions.get(member))
    functions[member] = _attention(chosen, ring_degree)


def unregister() -> None:
    """Undo `register`. Raises ValueError where nothing is registered."""
    if not _replaced:
        raise ValueError("unregister() (valid: after register(); nothing is registered)")
    functions, member, _ = _xdit()
    before = _replaced.pop()
    if before is None:
        del functions[member]
    else:
        functions[member] = before


def _xdit() -> tuple[dict[Any, Any], Any, Callable[[], int]]:
    """(functions by backend, the member SAGE, the degree of the ring)."""
    try:
        from xfuser.core.distributed import attention_backend, get_ring_parallel_world_size

        functions, backends = (
            attention_backend.ATTENTION_FUNCTION_REGISTRY,
            attention_backend.AttentionBackendType,
        )
        return functions, backends[SELECTED], get_ring_parallel_world_size
    except (ImportError, AttributeError, KeyError) as error:
        raise ImportError(
            f"xfuser cannot be used (supported: {SUPPORTED}): {error!r}", name="xfuser"
        ) from error


def _attention(config: Config, ring_degree: Callable[[], int]) -> Callable[..., Any]:
    options: dict[str, Any] = {name: getattr(config, name) for name in USED}

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `[batch, heads, seq, head_dim]` tensors. The log-sum-exp, `[batch, heads, seq]`, only in a ring."""
        query, key, value = (waited_for(tensor) for tensor in (query, key, value))
        mask, in_ring = _mask_of(attention_kwargs or {}, key), ring_degree() > 1
        if in_ring and mask is not None:
            raise ValueError("attn_mask or indices_k in a ring (valid: none there; Ulysses alone takes them)")
        out = sage_attention(query, key, value, mask, dropout_p, is_causal, return_lse=in_ring, **options)
        return out if isinstance(out, tuple) else (out, None)

    return attention


def _mask_of(attention_kwargs: dict[str, Any], key: Tensor) -> Tensor | None:
    """`attn_mask`; or of `indices_k`, places in `[batch * seq]` of the keys that count, the mask `[batch, 1, 1, seq]`."""
    mask: Tensor | None = attention_kwargs.get("attn_mask")
    indices = attention_kwargs.get("indices_k")
    if mask is not None or indices is None:
        return mask
    counts = torch.zeros(key.shape[0] * key.shape[2], dtype=torch.bool, device=key.device)
    return counts.index_fill(0, indices, True).view(key.shape[0], 1, 1, key.shape[2])
