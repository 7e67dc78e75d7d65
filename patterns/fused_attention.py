"""The fused kernels behind SDPA, called by their own names: `aten._scaled_dot_product_flash_attention` and its like.

Rings of several GPUs call them for the LSE that SDPA does not give, by which they merge parts of the keys. Each gives it in a
form of its own:

| kernel | LSE of `[batch, heads, q_len, head_dim]` queries, float32 |
|---|---|
| flash, overrideable | `[batch, heads, q_len]` |
| flash for the CPU | the same, lying in memory as `[batch, q_len, heads]` |
| efficient | `[batch, heads, q_len rounded up to 32]`, inf behind q_len; none without compute_log_sumexp |
| cuDNN | `[batch, heads, q_len, 1]` |
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.graph.call import (
    AttentionCall,
    LseForm,
    Pattern,
    example_tensor,
    example_value,
    laid_out_as,
)
from sage_inductor.graph.sizes import is_dense, sizes_of
from sage_inductor.torch_internals.operators import bound_arguments

_KERNELS = (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu", "fused_attention_overrideable",
)  # fmt: skip
# Each kernel's operator, by itself and by all of its overloads together. One that a build of torch lacks is not called either.
_OPERATORS: dict[Any, Any] = {
    target: packet.default
    for name in _KERNELS
    if (packet := getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)) is not None
    for target in (packet, packet.default)
}


class FusedAttention(Pattern):
    """A call of a fused kernel whose output is read, and its LSE or not. Where anything else of it is read (the random state
    or the lengths, for a backward pass), it stays."""

    name = "fused_sdpa"

    def match(self, node: fx.Node) -> AttentionCall | None:
        kernel = _OPERATORS.get(node.target) if node.op == "call_function" else None
        if kernel is None:
            return None
        given = bound_arguments(kernel, node.args, node.kwargs)
        read = {user.args[1] for user in node.users if user.target is operator.getitem}
        if len(read) != len(set(node.users)) or not read <= {0, 1} or given.get("return_debug_mask"):
            return None
        items = example_value(node)
        query, key = (example_tensor(given[name]) for name in ("query", "key"))
        if not isinstance(items, (tuple, list)) or query is None or key is None or query.dim() != 4:
            return None
        form = LseForm(is_read=False)
        if 1 in read:
            steps = lse_steps(items[1], query)
            if steps is None:
                return None
            form = LseForm(True, steps, items[1])
        return AttentionCall(
            node,
            self.name,
            given["query"],
            given["key"],
            given["value"],
            attn_mask=given.get("attn_mask", given.get("attn_bias")),
            dropout_p=given["dropout_p"],
            is_causal=given["is_causal"],
            scale=given["scale"],
            enable_gqa=sizes_of(query)[1] != sizes_of(key)[1],
            lse=form,
        )

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            return out * torch.sigmoid(lse)[..., None]  # beside a logit of 0

        yield attend, tuple(torch.randn(1, 2, 16, 64) for _ in range(3))


def lse_steps(lse: Any, query: Tensor) -> tuple[tuple[Any, tuple[Any, ...]], ...] | None:
    """What turns a contiguous float32 LSE `[batch, heads, q_len]` into one like `lse`; None for one of no known form."""
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        return None
    rows, found = sizes_of(query)[:-1], sizes_of(lse)
    if found == rows:
        return () if is_dense(lse) else laid_out_as(lse)
    if found == (*rows, 1) and is_dense(lse):
        return (("unsqueeze", (-1,)),)
    if found[:-1] == rows[:-1] and len(found) == len(rows) and is_dense(lse):
        missing = found[-1] - rows[-1]
        if isinstance(missing, int) and missing > 0:
            return ((F.pad, ((0, missing), "constant", math.inf)),)
    return None
