"""FastVideo: its backend SAGE_ATTN becomes the kernels of this package.

    import sage_inductor.integrations.fastvideo as sage
    sage.register()                     # at the top of the script, so that FastVideo's worker processes run it, too

    FASTVIDEO_ATTENTION_BACKEND=SAGE_ATTN python generate.py

FastVideo asks its platform for the name of a backend's class, and has no list to add to. `register` wraps that question
(`get_attn_backend_cls`): where a layer asks for SAGE_ATTN, the answer is the class here; every other answer is FastVideo's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from sage_inductor.backends.sage import SageAttentionBackend, SageAttentionImpl
from sage_inductor.config import Config

SUPPORTED = "0.2"
SELECTED = "SAGE_ATTN"
USED = ("kernel", "precision", "smoothing", "skip_threshold", "skip_by")

_config = Config()
_original: list[tuple[type, Callable[..., Any] | None]] = []  # the platform's class, and what stood in it
ABSENT = None  # what stood there: nothing, the function is inherited


class Impl(SageAttentionImpl):
    """`SageAttentionImpl` with the kernel, precision, smoothing, skip_threshold and skip_by that `register` was given."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool = False,
        softmax_scale: float | None = None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        chosen = {name: getattr(_config, name) for name in USED}
        super().__init__(
            num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix, **{**chosen, **extra_impl_args}
        )


class Backend(SageAttentionBackend):
    """What layers get that ask for SAGE_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl


def register(config: Config | None = None) -> None:
    """Let FastVideo's layers that ask for SAGE_ATTN have this package's kernels.

    Layers ask where FASTVIDEO_ATTENTION_BACKEND, or the configuration of a component, says so. Layers that exist already keep
    what they have. Called again, it replaces the config. FastVideo starts its workers as new processes: call it at the top
    level of the script, which they run as well.

    Args:
        config: `kernel`, `precision`, `smoothing`, `skip_threshold` and `skip_by` are used.

    Raises:
        ImportError: FastVideo is not installed, or of another form; names the version that is supported.
        ValueError: a field of `config` that means nothing here.
    """
    global _config
    chosen, default = Config.of(config), Config()
    for field in fields(Config):
        if field.name not in USED and getattr(chosen, field.name) != getattr(default, field.name):
            raise ValueError(
                f"config.{field.name}={getattr(chosen, field.name)!r} (valid here: {', '.join(USED)}; the others: options of "
                'torch.compile(backend="sage_inductor"))'
            )
    platform, selected, selector = _fastvideo()
    _config = chosen
    if not _original:
        inherited = platform.get_attn_backend_cls
        _original.append((platform, platform.__dict__.get("get_attn_backend_cls", ABSENT)))

        def get_attn_backend_cls(cls: Any, selected_backend: Any, head_size: int, dtype: torch.dtype) -> Any:
            if selected_backend is selected:
                return f"{Backend.__module__}.{Backend.__qualname__}"
            return inherited(selected_backend, head_size, dtype)

        platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    _forget_answers(selector)


def unregister() -> None:
    """Undo `register`. Raises ValueError where nothing is registered."""
    if not _original:
        raise ValueError("unregister() (valid: after register(); nothing is registered)")
    platform, stood = _original.pop()
    if stood is ABSENT:
        del platform.get_attn_backend_cls  # type: ignore[attr-defined]
    else:
        platform.get_attn_backend_cls = stood  # type: ignore[attr-defined]
    _forget_answers(_fastvideo()[2])


def _fastvideo() -> tuple[Any, Any, Any]:
    """(the class of the current platform, the member SAGE_ATTN of its backends, its module of the selector)."""
    try:
        from fastvideo import platforms
        from fastvideo.attention import selector
    except ImportError as error:
        raise ImportError(
            f"fastvideo cannot be imported (supported: {SUPPORTED}): {error}", name="fastvideo"
        ) from error
    platform = type(platforms.current_platform)
    selected = getattr(platforms.AttentionBackendEnum, SELECTED, None)
    if selected is None or not hasattr(platform, "get_attn_backend_cls"):
        raise ImportError(
            f"this fastvideo has no {SELECTED}, or no get_attn_backend_cls (supported: {SUPPORTED})",
            name="fastvideo",
        )
    return platform, selected, selector


def _forget_answers(selector: Any) -> None:
    """The selector keeps what it was answered, in a function of `functools.cache`."""
    for function in vars(selector).values():
        forget = getattr(function, "cache_clear", None)
        if callable(forget):
            forget()
