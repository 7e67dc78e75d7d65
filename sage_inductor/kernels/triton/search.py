"""A search for better launch configurations on the GPU at hand: `rank_launch_configs` times them, `configs.override` applies one."""

# Triton has no type information.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from triton.testing import do_bench

from ..base import AttentionParams
from .configs import LaunchConfig
from .internals import OutOfResources
from .launch import TritonAttention


def rank_launch_configs(
    head_dim: int,
    precision: str,
    *,
    is_causal: bool = False,
    masked: bool = False,
    seq: int = 8192,
    heads: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    candidates: Iterable[LaunchConfig] | None = None,
) -> list[tuple[float, LaunchConfig]]:
    """Time launch configurations of the attention kernel on the current GPU: (TFLOP/s, configuration), best first.

    It is for a GPU, head dim or precision that the table was not made for; pass the best to `configs.override`. With
    `masked` there is a bool attn_mask of a row per query. Every candidate is compiled, which takes seconds each. Candidates
    that need more shared memory than the GPU has are left out.
    """
    if candidates is None:
        candidates = [
            LaunchConfig(block_m, block_n, warps, stages, registers)
            for block_m, warps in ((64, 4), (128, 8), *(((64, 8),) if masked else ()))
            for block_n in (64, 128)
            for stages in (1, 2, 3)
            for registers in ((None, 128, 168) if warps == 4 else (None,))
        ]
    query, key, value = (torch.randn(1, heads, seq, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    mask = torch.rand(seq, seq, device="cuda") > 0.5 if masked else None
    out = torch.empty_like(query)
    operations = 4 * heads * seq**2 * head_dim / (2 if is_causal else 1)
    results = []
    for config in candidates:
        params = AttentionParams(is_causal, precision=precision)
        call = TritonAttention(query, key, value, mask, params, out, None, config=config)
        try:
            workspace = call.quantize(query, key, value, mask)
            ms = do_bench(partial(call.attend, workspace, mask, out, None), return_mode="median")
        except OutOfResources:
            continue
        results.append((operations / ms / 1e9, config))
    return sorted(results, key=lambda result: -result[0])
