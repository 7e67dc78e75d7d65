"""Checks that the inputs of attention fit together. As SDPA does, they raise RuntimeError, with the value and what is valid."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_inductor.graph.sizes import are_multiples, differ, known
from sage_inductor.kernels.base import (
    expanded_dim,
)


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    out: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> None:
    """Raise RuntimeError for inputs that do not fit together: `head_dim of query is 64, of key 80`. Works on real and
    on traced tensors; sizes that a trace leaves open are taken to fit."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not 2 <= tensor.dim() <= 4:
            raise misfit(f"{name} has {tensor.dim()} dimensions (valid: 2 to 4)")
        if tensor.dim() != query.dim():
            raise misfit(f"{name} has {tensor.dim()} dimensions, query has {query.dim()}")
        if tensor.dtype != query.dtype:
            raise misfit(f"{name} is {tensor.dtype}, query is {query.dtype}")
        if tensor.device != query.device:
            raise misfit(f"{name} is on {tensor.device}, query on {query.device}")
        if query.dim() == 4 and differ(tensor.shape[0], query.shape[0]):
            raise misfit(f"{name} has batch {tensor.shape[0]}, query {query.shape[0]}")
    if not query.is_floating_point():
        raise misfit(f"query, key and value are {query.dtype} (valid: a floating-point dtype)")
    if differ(query.shape[-1], key.shape[-1]):
        raise misfit(f"head_dim of query is {query.shape[-1]}, of key {key.shape[-1]}")
    if differ(key.shape[-2], value.shape[-2]):
        raise misfit(f"kv_len of key is {key.shape[-2]}, of value {value.shape[-2]}")
    if query.dim() >= 3:
        heads, kv_heads = known(query.shape[-3]), known(key.shape[-3])
        if differ(value.shape[-3], kv_heads):
            raise misfit(f"value has {value.shape[-3]} heads, key has {kv_heads}")
        are_known = isinstance(heads, int) and isinstance(kv_heads, int)
        if enable_gqa and are_known and not are_multiples(heads, kv_heads):
            raise misfit(f"{heads} query heads are not a multiple of {kv_heads} key heads")
        if not enable_gqa and differ(heads, kv_heads):
            raise misfit(f"query has {heads} heads, key has {kv_heads}; enable_gqa is False")
    if attn_mask is not None:
        _validate_mask(query, key, attn_mask)
    if query_segments is not None or key_segments is not None:
        validate_segments(query, key, query_segments, key_segments)
    if out is not None:
        expected = (*query.shape[:-1], value.shape[-1])
        if out.dim() != len(expected) or any(map(differ, out.shape, expected)):
            raise misfit(f"out is {tuple(out.shape)}, the output {expected}")
        if out.dtype != query.dtype:
            raise misfit(f"out is {out.dtype}, query is {query.dtype}")
        if out.device != query.device:
            raise misfit(f"out is on {out.device}, query on {query.device}")
        if (dim := expanded_dim(out)) is not None:
            raise misfit(f"out is expanded in dim {dim}: its {out.shape[dim]} elements are one in memory")


def _validate_mask(query: Tensor, key: Tensor, attn_mask: Tensor) -> None:
    if attn_mask.device != query.device:
        raise misfit(f"attn_mask is on {attn_mask.device}, query on {query.device}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        valid = dict.fromkeys(map(str, (torch.bool, torch.float32, query.dtype)))
        raise misfit(f"attn_mask is {attn_mask.dtype} (valid: {', '.join(valid)})")
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dim() > len(scores):
        raise misfit(f"attn_mask has {attn_mask.dim()} dimensions, the scores {scores}")
    for size, expected in zip(reversed(attn_mask.shape), reversed(scores), strict=False):
        if known(size) != 1 and differ(size, expected):
            raise misfit(f"attn_mask {tuple(attn_mask.shape)} does not broadcast to the scores {scores}")


def validate_segments(
    query: Tensor, key: Tensor, query_segments: Tensor | None, key_segments: Tensor | None
) -> None:
    """Raise RuntimeError for ids of another dtype, device or shape than query and key call for, and for ids of one of the two
    alone."""
    if query_segments is None or key_segments is None:
        missing, given = ("query", "key") if query_segments is None else ("key", "query")
        raise misfit(f"{given}_segments without {missing}_segments (valid: both, or neither)")
    for name, ids, rows in (("query", query_segments, query), ("key", key_segments, key)):
        if ids.dtype != torch.int32:
            raise misfit(f"{name}_segments is {ids.dtype} (valid: torch.int32)")
        if ids.device != query.device:
            raise misfit(f"{name}_segments is on {ids.device}, query on {query.device}")
        expected = (*query.shape[:-3], rows.shape[-2])
        if ids.dim() != len(expected) or any(map(differ, ids.shape, expected)):
            dims = "[batch, {0}]" if query.dim() == 4 else "[{0}]"
            length = {"query": "q_len", "key": "kv_len"}[name]
            raise misfit(f"{name}_segments is {tuple(ids.shape)} (valid: {dims.format(length)}, {expected})")


def misfit(message: str) -> RuntimeError:
    return RuntimeError(f"sage_inductor attention: {message}")
