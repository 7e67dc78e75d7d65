"""FlashAttention 2 and 3 called by their own operators, as their packages and xformers register them.

Inputs are `[batch, seq, heads, head_dim]`, causality and windows end at the last key, and behind the output comes its LSE,
float32 `[batch, heads, q_len]`. Their arguments are known by name, so that a version with others is seen and left alone.

Packed sequences, given by `cu_seqlens_q` and `cu_seqlens_k`, are read in varlen_attention.py.

| operator | registered by |
|---|---|
| `flash_attn::_flash_attn_forward`, `_flash_attn_varlen_forward` | flash-attn 2 (flash_attn/flash_attn_interface.py) |
| `flash_attn_3::fwd`, `flash_attn_3::_flash_attn_forward` | flash-attn 3 (hopper/flash_api.cpp, flash_attn_interface.py) |
| the same two of `fa3_fwd` | the wheel fa3-fwd, flash-attn 3 without its backward pass (fa3_fwd_interface.py) |
| those of `_flash_attn2_...`, `_flash_attn3_...` | the kernels flash-attn2 and flash-attn3 of Hugging Face's hub, which add their build's hash |
| `_diffusers_flash_attn_3::_flash_attn_forward` | diffusers around flash-attn 3 (models/attention_dispatch.py) |
| `xformers_flash::flash_fwd` | xformers (ops/fmha/flash.py) |
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import (
    AttentionCall,
    Band,
    Expansion,
    Expr,
    LseForm,
    OpaquePattern,
    Pattern,
    Standing,
    example_tensor,
    example_value,
)
from sage_inductor.graph.sizes import is_dense, sizes_of
from sage_inductor.patterns.nodes import reads_nothing
from sage_inductor.torch_internals.operators import bound_arguments, operator_name
from sage_inductor.torch_internals.sizes import number_of

DIFFUSERS = "_diffusers_flash_attn_3::_flash_attn_forward"
OPERATORS = (
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    DIFFUSERS,
    "xformers_flash::flash_fwd",
)
# Builds of the same sources that register under a name of their own.
_BUILDS = (
    (re.compile(r"_flash_attn2_\w+(?=::)"), "flash_attn"),
    (re.compile(r"(fa3_fwd|_flash_attn3_\w+)(?=::)"), "flash_attn_3"),
)
# The names that the operators have for one thing.
_QUERY, _KEY, _VALUE = ("q", "query"), ("k", "key"), ("v", "value")
_DROPOUT, _SCALE, _CAUSAL = ("dropout_p", "p"), ("softmax_scale",), ("causal", "is_causal")
_LEFT, _RIGHT = ("window_size_left", "window_left"), ("window_size_right", "window_right")
# What says how to compute, not what; and the longest sequence, which without packing is the only one.
_HOW = (
    *("num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "zero_tensors", "deterministic"),
    *("max_seqlen_q", "max_seqlen_k", "rotary_interleaved", "is_rotary_interleaved"),
)
_READ = (*_QUERY, *_KEY, *_VALUE, *_DROPOUT, *_SCALE, *_CAUSAL, *_LEFT, *_RIGHT, *_HOW)
# Every other argument changes what is computed, unless it has this value.
_NEUTRAL: dict[str, Any] = {"softcap": 0.0, "attention_chunk": 0, "return_softmax": False}
_PACKED = ("cu_seqlens_q", "cu_seqlens_k")
_CACHE = (
    *(
        "k_new",
        "v_new",
        "page_table",
        "block_table",
        "block_tables",
        "kv_batch_idx",
        "leftpad_k",
        "seqused_k",
    ),
    *("cu_seqlens_k_new", "rotary_cos", "rotary_sin", "seqlens_rotary"),
)
_WHY = {
    "softcap": "0; no kernel here caps scores",
    "alibi_slopes": "None; as a mask it would be read for every score",
    "seqused_q": "None; lengths shorter than those of cu_seqlens_q",
    **dict.fromkeys(_CACHE, "None; a cache that is paged or appended to is read by its own kernel"),
}


@dataclass(frozen=True)
class PackedCall:
    """Attention of sequences that lie one behind the other: query, key and value `[total, heads, head_dim]`, or with a batch of 1
    in front. Sequence i ends in front of `ends[i + 1]`, its keys in front of `key_ends[i + 1]`.

    `window`: (left, right), ends at the last key of each sequence; a negative number is no bound. `reasons` speak against the
    call; where there are some, only they count."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    ends: fx.Node | None
    key_ends: fx.Node | None
    scale: float | fx.Node | None
    window: tuple[int, int]
    reasons: tuple[str, ...]


class FlashAttention(Pattern, OpaquePattern):
    """A call of one of `OPERATORS` whose output is read, and its LSE or not."""

    name = "flash_attention"

    def match(self, node: fx.Node) -> AttentionCall | None:
        given = _dense(node)
        if given is None or self.closed_reasons(node):
            return None
        inputs = [_first(given, names) for names in (_QUERY, _KEY, _VALUE)]
        query, key, value = (Expr.of("transpose", item, 1, 2) for item in inputs)
        heads = [sizes_of(item.value)[1] for item in (query, key)]
        swap = (("transpose", (1, 2)),)
        reads_lse = 1 in items_read(node)
        return AttentionCall(
            node,
            self.name,
            query,
            key,
            value,
            dropout_p=_first(given, _DROPOUT, 0.0),
            scale=_first(given, _SCALE),
            enable_gqa=heads[0] != heads[1],
            restore=swap,
            undo=swap,
            lse=LseForm(reads_lse, (), example_value(node)[1] if reads_lse else None),
            band=Band(*_window(given)),
            standing=Standing(str(operator_name(node.target)), running(node, inputs)),
        )

    def expand(self, node: fx.Node) -> Expansion | None:
        return None

    def closed_reasons(self, node: fx.Node) -> list[str]:
        given = _dense(node)
        if given is None:
            return []
        return _reasons_of_arguments(node, given) or _reasons_of_values(node, given)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            options = (0.0, q.shape[-1] ** -0.5, True, -1, -1, 0.0, None, False)
            return torch.ops.flash_attn._flash_attn_forward(q, k, v, *options)[0]

        yield attend, tuple(torch.randn(1, 16, 2, 64) for _ in range(3))


def packed_call(node: fx.Node) -> PackedCall | None:
    """`node` as a call on packed sequences; None where it is none."""
    given = called(node, OPERATORS)
    if given is None or not _is_packed(given):
        return None
    reasons = _reasons_of_arguments(node, given)
    return PackedCall(
        _first(given, _QUERY),
        _first(given, _KEY),
        _first(given, _VALUE),
        given.get("cu_seqlens_q"),
        given.get("cu_seqlens_k"),
        scale=_first(given, _SCALE),
        window=(-1, -1) if reasons else _window(given),
        reasons=(*reasons, *dropout_reasons(_first(given, _DROPOUT, 0.0))),
    )


def called(node: fx.Node, operators: tuple[str, ...]) -> dict[str, Any] | None:
    """The arguments by name where `node` calls one of `operators`."""
    if node.op != "call_function" or _known_as(operator_name(node.target)) not in operators:
        return None
    return bound_arguments(_overload(node), node.args, node.kwargs)


def _known_as(name: str | None) -> str | None:
    """The operator's name in the package whose sources it was built from."""
    if name is None:
        return None
    for build, package in _BUILDS:
        name = build.sub(package, name, count=1) if build.match(name) else name
    return name


def dropout_reasons(dropout_p: Any) -> list[str]:
    if isinstance(dropout_p, fx.Node):  # a default argument of a model that is compiled for dynamic shapes
        dropout_p = number_of(example_value(dropout_p))
    return [] if dropout_p == 0 else [f"dropout_p={dropout_p} (supported: 0.0)"]


def _dense(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a call on `[batch, seq, heads, head_dim]`."""
    given = called(node, OPERATORS)
    return None if given is None or _is_packed(given) else given


def _is_packed(given: dict[str, Any]) -> bool:
    return any(given.get(name) is not None for name in _PACKED)


def _overload(node: fx.Node) -> Any:
    return getattr(node.target, "default", node.target)


def _first(given: dict[str, Any], names: tuple[str, ...], instead: Any = None) -> Any:
    return next((given[name] for name in names if name in given), instead)


def _window(given: dict[str, Any]) -> tuple[int, int]:
    left, right = (_first(given, names, -1) for names in (_LEFT, _RIGHT))
    return (left, 0) if _first(given, _CAUSAL) else (left, right)


def items_read(node: fx.Node) -> set[Any]:
    """The numbers of the items that are read; None among them where something reads the tuple itself."""
    users = [user for user in node.users if not (_is_item(user) and reads_nothing(user))]
    return {user.args[1] if _is_item(user) else None for user in users}


def _is_item(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target is operator.getitem


def _reasons_of_arguments(node: fx.Node, given: dict[str, Any]) -> list[str]:
    """What speaks against a call by the arguments that no other form of attention has."""
    reasons, defaults = [], bound_arguments(_overload(node), (), {})
    for name, value in given.items():
        neutral = _NEUTRAL.get(name, defaults.get(name))
        if name not in (*_READ, *_PACKED) and (isinstance(value, fx.Node) or value != neutral):
            shown = "a tensor" if isinstance(value, fx.Node) else value
            reasons.append(f"{name}={shown} (supported: {_WHY.get(name, neutral)})")
    for name, names in (("window_left", _LEFT), ("window_right", _RIGHT), ("causal", _CAUSAL)):
        if isinstance(_first(given, names), fx.Node):
            reasons.append(f"{name}=a number of the graph (supported: one known while compiling)")
    return reasons


def _reasons_of_values(node: fx.Node, given: dict[str, Any]) -> list[str]:
    """What speaks against a call by its inputs, or by what is read of it."""
    inputs = [example_tensor(_first(given, names)) for names in (_QUERY, _KEY, _VALUE)]
    items = example_value(node)
    if any(tensor is None or tensor.dim() != 4 for tensor in inputs) or not isinstance(items, (tuple, list)):
        return ["shapes=not those of query, key and value (supported: [batch, seq, heads, head_dim])"]
    reasons = []
    query, key, _ = inputs
    assert query is not None and key is not None
    if query.dtype != items[0].dtype:
        reasons.append(f"dtype={query.dtype} (supported: that of the output, {items[0].dtype})")
    if any(tensor is not None and tensor.requires_grad for tensor in inputs):
        # The operators have no gradient. Around them stands a function whose backward pass takes their output and LSE for exact.
        reasons.append("requires_grad=inputs (supported: none; torch.no_grad())")
    beyond = items_read(node) - {0, 1}
    if beyond:
        reasons.append("read=what belongs to a backward pass (supported: the output and its LSE)")
    if 1 in items_read(node) and operator_name(node.target) == DIFFUSERS:
        # It says that it has the dtype of the query, and gives float32.
        reasons.append("softmax_lse=read of diffusers' own operator (supported: its output alone)")
    elif 1 in items_read(node):
        reasons += _reasons_of_lse(items[1], query, key, given)
    return reasons


def _reasons_of_lse(lse: Any, query: Tensor, key: Tensor, given: dict[str, Any]) -> list[str]:
    rows = tuple(sizes_of(query)[dim] for dim in (0, 2, 1))
    if (
        not isinstance(lse, Tensor)
        or lse.dtype != torch.float32
        or sizes_of(lse) != rows
        or not is_dense(lse)
    ):
        return ["softmax_lse=of another form (supported: float32 [batch, heads, q_len], contiguous)"]
    lengths = sizes_of(query)[1], sizes_of(key)[1]
    bounded = _first(given, _CAUSAL) or max(_first(given, _LEFT, -1), _first(given, _RIGHT, -1)) >= 0
    shorter = all(isinstance(length, int) for length in lengths) and lengths[0] <= lengths[1]
    if bounded and not shorter and lengths[0] != lengths[1]:
        # Theirs is inf there, ours -inf.
        return ["softmax_lse=read where queries may see no key (supported: no more queries than keys)"]
    return []


def running(node: fx.Node, inputs: list[Any]) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """The call, of other query, key and value `[batch, heads, seq, head_dim]`, and without other tensors."""
    target: Any = node.target
    args, kwargs = node.args, node.kwargs

    def run(*tensors: Tensor) -> Any:
        replaced = dict(zip(inputs, (tensor.transpose(1, 2) for tensor in tensors), strict=True))

        def value(item: Any) -> Any:
            return replaced.get(item) if isinstance(item, fx.Node) else item

        return target(*map(value, args), **{name: value(item) for name, item in kwargs.items()})

    return run
