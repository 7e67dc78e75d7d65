"""The lengths from which this kernel is faster than SDPA, as measured. `tune="table"`, and calls outside a graph, go by them.

Origin: one H100 (compute capability 9.0), torch 2.11.0+cu130, triton 3.6.0, bfloat16 in NHD memory, quantisation included. The
kernel was timed in one process with torch's default SDPA and with cuDNN, which is the default there:
benchmarks/results/attention_h100.json and, for head dims 96 and 192, attention_wide_h100.json. A limit is the least length at
which, and at all greater ones, the kernel gains 2%, the noise of the measurement. A test compares the tables with those files.
Head dim 160, other batch sizes, q_len != kv_len and masks over keys were measured on one H200 with the same versions and timer.

All of it is with K's mean alone, by kernels that quantised more slowly than today's. Calls whose channels are evened take no more than
2% longer than those did, from 4,096 tokens on (H200: benchmarks/notes.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...graph.sizes import known, size_hint
from ..base import AttentionProblem, TensorSpec

# (precision, head_dim, is_causal) -> the kv_len from which the kernel is faster. Combinations that are not listed are slower at
# every size measured (512 to 32768), or were not measured.
MIN_KV_LEN: dict[tuple[str, int, bool], int] = {
    ("fast", 64, False): 4096,
    ("fast", 64, True): 8192,
    ("fast", 96, False): 4096,
    ("fast", 96, True): 8192,
    ("fast", 128, False): 4096,
    ("fast", 128, True): 8192,
    ("fast", 160, False): 8192,
    ("fast", 192, False): 8192,
    ("balanced", 64, False): 8192,
    ("balanced", 64, True): 8192,
    ("balanced", 96, False): 8192,
    ("balanced", 96, True): 16384,
    ("balanced", 128, False): 4096,
    ("balanced", 128, True): 8192,
    ("balanced", 160, False): 8192,
    ("balanced", 192, False): 16384,
    ("accurate", 64, False): 16384,
    ("accurate", 64, True): 16384,
    ("accurate", 96, False): 16384,
    ("accurate", 96, True): 16384,
    ("accurate", 160, False): 8192,
}
# (precision, head_dim) -> the same with a bool mask of a row per query: benchmarks/results/masks_h100.json. It holds for the worst
# such mask, which each head has of its own, which leaves no block whole and rules none out, and which cannot be read in wide
# words. 2048 is the shortest length measured. With an additive mask the kernel is 1.5 to 7 times as fast as SDPA where the mask
# rules blocks out, but up to head dim 128 only .6 to 1.1 times where it does not: `tune="measure"` decides.
MASKED_MIN_KV_LEN: dict[tuple[str, int], int] = {
    (precision, head_dim): 2048
    for precision in ("fast", "balanced", "accurate")
    for head_dim in (64, 96, 128, 192)
}
MIN_Q_LEN = 4096  # queries times query heads per kv head: fewer do not pay for quantising the keys
# The least batch * heads * q_len * kv_len: 8 heads of 8192 tokens (0.5e9) are no faster, 4 x 32 heads of 4096 (2.1e9) are.
MIN_PAIRS = 10**9
MEASURED_CAPABILITY = (9, 0)


def slower_than_sdpa(
    problem: AttentionProblem,
    capability: tuple[int, int],
    min_kv_len: Mapping[tuple[str, int, bool], int] = MIN_KV_LEN,
) -> list[str]:
    """Why the kernel is slower than SDPA for `problem`, with the measured limits; empty where it is faster.

    GPUs before sm_90 go by the limits of sm_90. Newer GPUs are left to SDPA: theirs is faster, and nothing was measured.
    """
    if capability > MEASURED_CAPABILITY:
        return [f"compute capability={_dotted(capability)} (measured up to {_dotted(MEASURED_CAPABILITY)})"]
    params = problem.params
    is_causal = params.is_causal or params.window_right == 0
    head_dim = problem.query.shape[-1]
    limits = {
        dim: limit
        for (name, dim, causal), limit in min_kv_len.items()
        if (name, causal) == (params.precision, is_causal)
    }
    mask = problem.attn_mask
    kind, min_q_len = "causal " if is_causal else "", MIN_Q_LEN
    if (
        mask is not None
        and len(mask.shape) > 1
        and size_hint(mask.shape[-2]) != 1
        and known(mask.stride[-2]) != 0
    ):
        limits = {dim: limit for (name, dim), limit in MASKED_MIN_KV_LEN.items() if name == params.precision}
        if params.smoothing != "mean":
            # Measured with K's mean alone. At 2,048 the others take up to 4% longer, at 4,096 2%, from 16,384 on 1% (H200).
            limits = {dim: 2 * limit for dim, limit in limits.items()}
        kind, min_q_len = "masked ", min([MIN_Q_LEN, *limits.values()])
        reasons = _masked_reasons(problem, mask, capability)
        if reasons:
            return reasons
    if head_dim not in limits or problem.value.shape[-1] != head_dim:
        dims = ", ".join(map(str, sorted(limits))) or "none"
        return [
            f"head_dim={head_dim}, {problem.value.shape[-1]} "
            f"(faster than SDPA: {dims} for {kind}{params.precision!r} on sm_90)"
        ]
    batch, heads, q_len = (size_hint(size) for size in problem.query.shape[:3])
    kv_heads, kv_len = (size_hint(size) for size in problem.key.shape[1:3])
    if batch is None or heads is None or q_len is None or kv_heads is None or kv_len is None:
        return []
    reasons = []
    limit = limits[head_dim]
    if kv_len < limit:
        reasons.append(f"kv_len={kv_len} (faster than SDPA from {limit} on sm_90)")
    if q_len * (heads // max(kv_heads, 1)) < min_q_len:
        reasons.append(f"q_len={q_len} (faster than SDPA from {min_q_len} per kv head on sm_90)")
    pairs = batch * heads * q_len * kv_len
    if not reasons and pairs < MIN_PAIRS:
        reasons.append(f"batch * heads * q_len * kv_len={pairs} (faster than SDPA from {MIN_PAIRS} on sm_90)")
    return reasons


def _masked_reasons(problem: AttentionProblem, mask: TensorSpec, capability: tuple[int, int]) -> list[str]:
    """Why a problem with a mask of a row per query is left to SDPA: only bool masks without a window were measured, on sm_90."""
    params = problem.params
    if capability < MEASURED_CAPABILITY:
        return [f"attn_mask=one row per query (measured on sm_90 only, not on {_dotted(capability)})"]
    if mask.dtype != torch.bool:
        return [
            f"attn_mask dtype={str(mask.dtype).removeprefix('torch.')} (one row per query, faster than SDPA on sm_90: bool)"
        ]
    if params.is_causal or params.window_left >= 0 or params.window_right >= 0:
        return ["attn_mask=one row per query, and a window (faster than SDPA on sm_90: one of them)"]
    return []


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
