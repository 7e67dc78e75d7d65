"""A backend of diffusers' attention dispatcher: `model.set_attention_backend("sage_inductor")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from sage_inductor.config import Config
from sage_inductor.integrations.diffusers import internals
from sage_inductor.integrations.diffusers.context_parallel import attention_of_ranks
from sage_inductor.operators.functional import sage_attention

NAME = "sage_inductor"
# The rest of Config speaks of sites in a graph, or of how kernels are timed while one is compiled.
USED = ("kernel", "precision", "smoothing", "skip_threshold", "skip_by", "wires")

_registered: list[str] = []  # names that were added to diffusers' list


def register(config: Config | None = None, name: str = NAME) -> None:
    """Add 8-bit attention to diffusers' attention backends, for `model.set_attention_backend(name)` and
    `diffusers.attention_backend(name)`, eager and compiled.

    Masks (bool, additive, `[batch, key_len]`), causality and grouped heads are honoured, and the log-sum-exp that context
    parallelism needs is given: ring, Ulysses and both together run on it. What 8 bits cannot serve (gradients, dropout, sizes
    at which SDPA is faster, a CPU) gets exact attention. Called again, it replaces the config. `unregister` takes it out.

    In a compiled graph the operator stands where the model calls it. To have the compiler choose site by site, by
    measurement and by a plan, leave the model's backend alone and use `compile`.

    Args:
        config: `kernel`, `precision`, `smoothing`, `skip_threshold`, `skip_by` and `wires` are used, the last in a ring.
        name: in lower case, as diffusers spells names.

    Raises:
        ImportError: a diffusers that is not supported, with the versions that are.
        ValueError: a field of `config` that means nothing here, or a name that diffusers has already.
    """
    chosen = Config.of(config)
    default = Config()
    for field in fields(Config):
        if field.name not in USED and getattr(chosen, field.name) != getattr(default, field.name):
            raise ValueError(
                f"config.{field.name}={getattr(chosen, field.name)!r} (valid here: {', '.join(USED)}; the others: "
                "sage_inductor.integrations.diffusers.compile, or options of torch.compile)"
            )
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ValueError(f"name={name!r} (valid: an identifier in lower case)")
    attention = _attention(chosen)
    known = internals.backend_names()
    if name in _registered and name in known:
        internals.replace_backend(name, attention)
    elif name in known:
        raise ValueError(
            f"name={name!r} (valid: one that diffusers does not have: {', '.join(sorted(known))})"
        )
    else:
        internals.add_backend(name, attention)
        _registered.append(name)


def unregister(name: str = NAME) -> None:
    """Undo `register`. Models that were set to the backend need `model.reset_attention_backend()`.

    Raises ValueError for a name that was not registered.
    """
    if name not in _registered:
        raise ValueError(f"name={name!r} (valid: {', '.join(_registered) or 'none, nothing is registered'})")
    internals.remove_backend(name)
    _registered.remove(name)


def registered() -> tuple[str, ...]:
    """The names of backends that `register` added."""
    return tuple(_registered)


def _attention(config: Config) -> Callable[..., Any]:
    templated, ulysses_attention = internals.context_parallel_attention(), internals.ulysses_attention()

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        """Attention of `[batch, seq, heads, head_dim]` tensors, as the dispatcher calls it. With `return_lse` the
        log-sum-exp comes too, `[batch, seq, heads]`."""
        mask = over_keys(attn_mask, query, key)
        options: dict[str, Any] = {name: getattr(config, name) for name in USED}
        if _parallel_config is not None:
            return attention_of_ranks(
                query,
                key,
                value,
                mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                return_lse,
                _parallel_config,
                templated,
                ulysses_attention,
                options,
            )
        given = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        out = sage_attention(
            *given, dropout_p, is_causal, scale, enable_gqa, return_lse=return_lse, **options
        )
        if isinstance(out, tuple):
            return out[0].transpose(1, 2), out[1].transpose(1, 2)
        return out.transpose(1, 2)

    return attention


def over_keys(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask `[batch, key_len]` as `[batch, 1, 1, key_len]`; others as they are, as diffusers' own backends read them."""
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        return attn_mask[:, None, None, :]
    return attn_mask
