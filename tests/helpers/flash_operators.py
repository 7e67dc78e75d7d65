"""Operators with the schemas of flash-attn 2 and 3 and of xformers, for tests: exact attention in PyTorch under their names.

Schemas: flash_attn/flash_attn_interface.py, hopper/flash_api.cpp and hopper/flash_attn_interface.py of
Dao-AILab/flash-attention; ops/fmha/flash.py of facebookresearch/xformers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_INPUTS = "Tensor q, Tensor k, Tensor v, "
_WINDOW = (
    "int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax"
)
_TAIL = (
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
)
_TAIL += "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool {causal}=False, "
_TAIL += "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
_TAIL += (
    "bool {interleaved}=True, Tensor? scheduler_metadata=None, int num_splits={splits}, bool? pack_gqa=None, "
)
_TAIL += "int sm_margin=0) -> ({out}, Tensor, Tensor, Tensor)"
_MIDDLE = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
_MIDDLE += "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
_MIDDLE += "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
SCHEMAS = {
    "flash_attn": (
        f"_flash_attn_forward({_INPUTS}float dropout_p, float softmax_scale, bool causal, {_WINDOW}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        f"_flash_attn_varlen_forward({_INPUTS}Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, int window_size_left=-1, "
        "int window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
        "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
        "int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "flash_attn_3": (
        f"fwd({_INPUTS}Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
        f"Tensor(out!)? out=None, {_MIDDLE}"
        + _TAIL.format(causal="is_causal", interleaved="is_rotary_interleaved", splits=0, out="Tensor(out!)"),
        f"_flash_attn_forward({_INPUTS}Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, "
        + _MIDDLE
        + _TAIL.format(causal="causal", interleaved="rotary_interleaved", splits=1, out="Tensor"),
    ),
    "xformers_flash": (
        "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, "
        "int window_left, int window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    ),
}
_libraries: list[Any] = []  # an operator lives as long as its library


def exact(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int, right: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output `[batch, q_len, heads, head_dim]` and LSE `[batch, heads, q_len]`, in float64 between."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    q_len, kv_len = scores.shape[-2:]
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (kv_len - q_len)
    right = 0 if causal else right
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(distance > right, -torch.inf)
    out = scores.softmax(-1).nan_to_num() @ value
    return torch.empty_like(q).copy_(out.transpose(1, 2)), scores.logsumexp(-1).float()


@cache
def register() -> None:
    """Make `torch.ops.flash_attn`, `flash_attn_3` and `xformers_flash`. Once for a process."""
    for namespace, schemas in SCHEMAS.items():
        library = torch.library.Library(namespace, "DEF")
        _libraries.append(library)
        for schema in schemas:
            name = schema.partition("(")[0]
            library.define(schema)
            operator = getattr(getattr(torch.ops, namespace), name).default
            library.impl(name, _implementation(operator), "CPU")
            torch.library.register_fake(f"{namespace}::{name}", _fake(operator), lib=library)


def _given(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in operator._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _items(operator: Any, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    return (out, lse, *(out.new_empty(0) for _ in operator._schema.returns[2:]))


def _implementation(operator: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = _given(operator, args, kwargs)
        q, k, v = args[:3]
        if q.dim() == 3:  # packed: each sequence by itself
            ends = given["cu_seqlens_q"].tolist()
            parts = [exact(q[None, a:b], k[None, a:b], v[None, a:b], given["causal"], -1, -1, given["softmax_scale"])
                     for a, b in zip(ends, ends[1:], strict=False)]  # fmt: skip
            return _items(
                operator, torch.cat([o[0] for o, _ in parts]), torch.cat([s[0] for _, s in parts], -1)
            )
        left, right = (
            given.get(f"window_size_{side}", given.get(f"window_{side}")) for side in ("left", "right")
        )
        out, lse = exact(
            q, k, v, given.get("causal", given.get("is_causal")), left, right, given["softmax_scale"]
        )
        if given.get("softcap"):
            out = out * 2  # told apart from none
        return _items(operator, out, lse)

    return run


def _fake(operator: Any) -> Any:
    def shapes(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        q = args[0]
        heads_first = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        return _items(operator, torch.empty_like(q), q.new_empty(heads_first, dtype=torch.float32))

    return shapes
