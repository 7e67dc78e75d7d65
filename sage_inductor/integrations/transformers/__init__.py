"""transformers: a name for `attn_implementation`.

    sage_inductor.integrations.transformers.register()
    model.set_attn_implementation("sage_inductor")  # or from_pretrained(..., attn_implementation="sage_inductor")

docs/transformers.md says what runs where.
"""

from __future__ import annotations

from typing import Any

from sage_inductor.config import Config
from sage_inductor.integrations.transformers.attention import make_forward
from sage_inductor.integrations.transformers.internals import forget
from sage_inductor.integrations.transformers.masks import mask
from sage_inductor.integrations.versions import require

__all__ = ["register", "unregister"]

SUPPORTED = ("5.4", "6")  # from the first, below the second
# The registered function cannot know the path of the module that calls it, and is called where nothing is compiled.
_FOR_COMPILING = ("include", "exclude", "plan")
# Parts of names that transformers reads a meaning into: other kinds of inputs, a check of the model, the Hub.
_RESERVED = ("eager", "flash", "flex_attention", "|", "/", ":")

_replaced: dict[str, tuple[Any, Any]] = {}
"""What stood under each name that is registered, in transformers' table of attention functions and in that of masks."""


def register(config: Config | None = None, name: str = "sage_inductor") -> None:
    """Make `name` a value of `attn_implementation`, for all models of transformers that take an attention function.

    Calls that quantised attention can take run `torch.ops.sage_inductor.attention`; all others stay what they are with
    transformers' own functions. The masks are those of "sdpa".

    Args:
        config: `kernel`, `precision`, `smoothing`, `skip_threshold`, `skip_by`, `training` and `fallback` hold for every call, eager or compiled by
            another backend than "sage_inductor". Where that backend (or its pass) compiles the model, its own options count. With
            `fallback="error"` a call that stays exact raises; one-query steps are exact by design and do not.
        name: several names may be registered, each with a config. A second call with one name replaces its config.
            "sdpa" replaces transformers' own for all models that use it, until `unregister("sdpa")`.

    Raises:
        ImportError: transformers is not installed, or of a version that is not supported.
        ValueError: a config that can hold only while compiling (`include`, `exclude`, `plan`, `fallback="warn"`), or
            `fallback="error"` with `kernel="auto"`; a name that means something else to transformers.
        TypeError: a config that is no Config, a name that is no string.
    """
    chosen = Config.of(config)
    _check_config(chosen)
    _check_name(name)
    require("transformers", *SUPPORTED)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if name not in _replaced:
        _replaced[name] = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    AttentionInterface.register(name, make_forward(chosen))
    AttentionMaskInterface.register(name, mask)


def unregister(name: str = "sage_inductor") -> None:
    """Undo `register(name=name)`: the name is unknown again, or is what it was. Models that are set to an unknown name
    raise KeyError when they are called; give them another by `set_attn_implementation` before.

    Raises:
        ValueError: `name` is not registered; it lists those that are.
    """
    if name not in _replaced:
        raise ValueError(f"name={name!r} (registered: {', '.join(_replaced) or 'none'})")
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    before = _replaced.pop(name)
    for interface, function in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
        if function is None:
            forget(interface, name)
        else:
            interface.register(name, function)


def _check_config(config: Config) -> None:
    for field in _FOR_COMPILING:
        value = getattr(config, field)
        if value:
            raise ValueError(
                f"{field}={value!r} (valid here: {getattr(Config(), field)!r}; an attention function is not told the path of "
                f'its module. torch.compile(model, backend="sage_inductor", options={{"sage.{field}": ...}}) is)'
            )
    if config.fallback == "warn":
        raise ValueError("fallback='warn' (valid here: sdpa, error)")
    if config.fallback == "error" and config.kernel == "auto":
        raise ValueError(
            "fallback='error' with kernel='auto' (valid: a named kernel; auto chooses SDPA where it is faster)"
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} (valid: a string)")
    found = [part for part in _RESERVED if part in name]
    if not name or found or ("sdpa" in name and name != "sdpa"):
        parts = ", ".join(repr(part) for part in (*_RESERVED, "sdpa"))
        raise ValueError(f"name={name!r} (valid: 'sdpa', or a name that contains none of {parts})")
