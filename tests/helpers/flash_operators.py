"""Operators with the schemas of flash-attn 2 and 3 and of xformers, for tests: exact attention in PyTorch under their names.

Schemas: flash_attn/flash_attn_interface.py, hopper/flash_api.cpp and hopper/flash_attn_interface.py of
Dao-AILab/flash-attention; ops/fmha/flash.py and csrc/attention/attention.cpp of facebookresearch/xformers; the wheel fa3-fwd 0.0.3;
torch-ext/ of flash-attn2 and flash-attn3 in huggingface/kernels-community.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
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
_TAIL += "bool {interleaved}, Tensor? scheduler_metadata=None, int num_splits={splits}, bool? pack_gqa=None, "
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
        + _TAIL.format(
            causal="is_causal", interleaved="is_rotary_interleaved=False", splits=0, out="Tensor(out!)"
        ),
        f"_flash_attn_forward({_INPUTS}Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, "
        + _MIDDLE
        + _TAIL.format(causal="causal", interleaved="rotary_interleaved=True", splits=1, out="Tensor"),
    ),
    "xformers_flash": (
        "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, "
        "int window_left, int window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    ),
    "xformers": (
        "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, int? max_seqlen_q, int? max_seqlen_k, float dropout_p, int custom_mask_type, "
        "bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) "
        "-> (Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, SymInt max_seqlen_batch_q, "
        "SymInt max_seqlen_batch_k)",
    ),
}
# What `torch.library.custom_op` reads from a Python function: its ints may be symbolic.
for _package, _name in (("flash_attn", 0), ("flash_attn", 1), ("flash_attn_3", 1)):
    _written = list(SCHEMAS[_package])
    _written[_name] = re.sub(r"\bint(?=\?? )", "SymInt", _written[_name])
    SCHEMAS[_package] = tuple(_written)
# Other builds of the same sources.
SCHEMAS["_flash_attn2_cuda_1a2b3c"], SCHEMAS["_flash_attn3_cuda_1a2b3c_dirty"] = (
    SCHEMAS["flash_attn"], SCHEMAS["flash_attn_3"][1:],
)  # fmt: skip
if find_spec("fa3_fwd") is None:  # else it has them itself
    SCHEMAS["fa3_fwd"] = SCHEMAS["flash_attn_3"]
_libraries: list[Any] = []  # an operator lives as long as its library


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    left: int,
    right: int,
    scale: float | None,
    bias: Tensor | None = None,
    upper_left: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `[batch, q_len, heads, head_dim]` and LSE `[batch, heads, q_len]`, in float64 between. Causality and windows end at
    the last key, or begin at the first one (`upper_left`)."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    q_len, kv_len = scores.shape[-2:]
    if bias is not None:
        scores = scores + bias
    distance = torch.arange(kv_len) - torch.arange(q_len)[:, None] - (0 if upper_left else kv_len - q_len)
    right = 0 if causal else right
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(distance > right, -torch.inf)
    out = scores.softmax(-1).nan_to_num() @ value
    like = q if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
    return torch.empty_like(like).copy_(out.transpose(1, 2)), scores.logsumexp(-1).float()


def exact_packed(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """`exact` of each sequence by itself: output `[total, heads, head_dim]` and LSE `[heads, total]`."""
    bounds = zip(ends.tolist(), ends.tolist()[1:], key_ends.tolist(), key_ends.tolist()[1:], strict=False)
    parts = [exact(q[None, a:b], k[None, c:d], v[None, c:d], *options) for a, b, c, d in bounds]
    out = torch.cat([out[0] for out, _ in parts])
    return torch.empty_like(q).copy_(out), torch.cat([lse[0] for _, lse in parts], -1)


@cache
def register() -> None:
    """Make `torch.ops.flash_attn`, `flash_attn_3`, `xformers_flash`, `xformers` and the other names in `SCHEMAS`. Once for a
    process."""
    for namespace, schemas in SCHEMAS.items():
        library = torch.library.Library(namespace, "DEF")
        _libraries.append(library)
        for schema in schemas:
            name = schema.partition("(")[0]
            library.define(schema)
            operator = getattr(getattr(torch.ops, namespace), name).default
            if namespace == "xformers":
                library.impl(name, _cutlass, "CPU")
                torch.library.register_fake(f"{namespace}::{name}", _fake_cutlass, lib=library)
                continue
            library.impl(name, _implementation(operator), "CPU")
            torch.library.register_fake(f"{namespace}::{name}", _fake(operator), lib=library)


@cache
def give_diffusers_a_kernel() -> None:
    """Exact attention on a CPU for diffusers' own operator around flash-attn 3. Once for a process."""
    from diffusers.models import attention_dispatch

    def on_cpu(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = exact(q, k, v, causal, -1, -1, softmax_scale)
        return out, lse.transpose(1, 2).to(q.dtype)

    attention_dispatch._wrapped_flash_attn_3.register_kernel("cpu")(on_cpu)


def _cutlass(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ends: Tensor | None, key_ends: Tensor | None, longest: Any,
    longest_key: Any, dropout_p: float, kind: int, lse: bool = False, *, scale: Any = None, seqlen_k: Any = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    options = (False, window_size - 1 if window_size else -1, -1 if kind == 0 else 0, scale)
    if ends is None or key_ends is None:
        out, logsumexp = exact(q, k, v, *options, bias, kind == 1)
    else:
        out, logsumexp = exact_packed(q[0], k[0], v[0], ends, key_ends, *options, None, kind == 1)
        out, logsumexp = out[None], logsumexp[None]
    rows = -logsumexp.shape[-1] % 32
    logsumexp = torch.nn.functional.pad(logsumexp, (0, rows), value=torch.inf) if lse else q.new_empty(0)
    return out.contiguous(), logsumexp, torch.zeros(()), torch.zeros(()), q.shape[1], k.shape[1]


def _fake_cutlass(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    batch, length, heads, _ = q.shape
    wants_lse = args[7] if len(args) > 7 else kwargs.get("compute_log_sumexp", False)
    rows = (length + 31) // 32 * 32 if wants_lse else 0
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    one = q.new_empty(())
    return q.new_empty((batch, length, heads, v.shape[-1])), lse, one, one, length, k.shape[1]


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
        left, right = (
            given.get(f"window_size_{side}", given.get(f"window_{side}")) for side in ("left", "right")
        )
        options = (given.get("causal", given.get("is_causal")), left, right, given["softmax_scale"])
        if q.dim() == 3:
            return _items(
                operator, *exact_packed(q, k, v, given["cu_seqlens_q"], given["cu_seqlens_k"], *options)
            )
        out, lse = exact(q, k, v, *options)
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
