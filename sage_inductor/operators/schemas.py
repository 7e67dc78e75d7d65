"""The schemas of the inference operators. Those of training.py are made of the same parts."""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "sage_inductor"
INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, *"
# kernel_name is not called kernel: Inductor's lowering has an argument of that name.
# min_q_len, min_kv_len: calls with fewer queries or keys get exact attention. One graph serves lengths on both sides.
# or_exact: sizes that the kernel does not take get exact attention, too, instead of an error. Sizes of a graph may change from
# call to call.
# wires: how keys and values travel where DTensors ring.
PARAMS = (
    "float? scale=None, bool enable_gqa=False, bool bottom_right=False, SymInt window_left=-1, "
    "SymInt window_right=-1, str kernel_name='auto', str precision='fast', int min_q_len=0, int min_kv_len=0, "
    "bool or_exact=False, str smoothing='auto', str wires='inputs'"
)
WIRES = ("inputs", "8-bit")
EXACT = "sdpa"  # the kernel_name of attention that is not quantised, which calibration compares with
# Strides are part of the contract: the kernels read any, so Inductor must not copy inputs into another layout.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

_Library: Any = torch.library.Library  # torch leaves it untyped
LIBRARY = _Library(NAMESPACE, "FRAGMENT")
# sink: a logit beside those of the keys. It takes weight and has no value; sinks broadcast to `[batch, heads, q_len]`.
# query_segments, key_segments: int32 ids, `[batch, q_len]` and `[batch, kv_len]`, without batch where query has none
# (`Segments`).
SEGMENTS = "Tensor? query_segments=None, Tensor? key_segments=None"
# A window that a graph computes may turn out to be negative, which is no bound otherwise: with left_is_bound, beside causality, a
# negative window_left says that queries see no key.
BOUND = "bool left_is_bound=False"
# What softmax makes nothing of is left out (kernels/skipping.py). Training has no such argument.
SKIP = "float skip_threshold=0.0, str skip_by='scores'"
LIBRARY.define(
    f"attention({INPUTS}, {PARAMS}, int[]? memory_order=None, Tensor? sink=None, {SEGMENTS}, {BOUND}, "
    f"{SKIP}) -> Tensor",
    tags=TAGS,
)
LIBRARY.define(f"attention.out({INPUTS}, {PARAMS}, Tensor(a!) output, {SEGMENTS}, {SKIP}) -> ()", tags=TAGS)
LIBRARY.define(
    f"attention_lse({INPUTS}, {PARAMS}, int[]? memory_order=None, {SEGMENTS}, {BOUND}, {SKIP}) -> (Tensor, Tensor)",
    tags=TAGS,
)
