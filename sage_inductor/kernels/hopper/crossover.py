"""The lengths from which this kernel is the fastest, as measured. `tune="table"`, and calls outside a graph, go by them.

Origin: one H100, torch 2.11.0+cu130, triton 3.6.0, bfloat16 in NHD memory, quantisation included. The kernel was timed in one
process with torch's default SDPA, with cuDNN (which is the default there, so timed twice) and with the Triton kernel:
benchmarks/results/attention_h100.json and, for head dims 96 and 192, attention_wide_h100.json. A limit is the least length at
which, and at all greater ones, the kernel gains 2% over all three. A test compares the table with those files.
"""

from __future__ import annotations

# (precision, head_dim, is_causal) -> the least such kv_len. Combinations that are not listed are left to the next kernel.
MIN_KV_LEN: dict[tuple[str, int, bool], int] = {
    ("fast", 64, False): 4096,
    ("fast", 64, True): 16384,
    ("fast", 96, False): 4096,
    ("fast", 96, True): 4096,
    ("fast", 128, False): 4096,
    ("fast", 128, True): 4096,
    ("balanced", 64, False): 8192,
    ("balanced", 64, True): 32768,
    ("balanced", 96, False): 4096,
    ("balanced", 96, True): 8192,
    ("balanced", 128, False): 8192,
    ("balanced", 128, True): 16384,
    ("accurate", 64, False): 4096,
    ("accurate", 64, True): 8192,
    ("accurate", 96, False): 4096,
    ("accurate", 96, True): 4096,
    ("accurate", 128, False): 4096,
    ("accurate", 128, True): 8192,
    ("accurate", 192, False): 16384,
}
