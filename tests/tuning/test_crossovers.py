"""The lengths from which a kernel is taken without measuring, against the committed measurements."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from agreement import PRECISIONS

from sage_inductor.kernels.hopper import crossover as hopper
from sage_inductor.kernels.triton import crossover as triton

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [
    row
    for name in ("attention_h100", "attention_wide_h100")
    for row in json.loads((RESULTS / f"{name}.json").read_text())
]
SDPA = [("sdpa", "bf16"), ("cudnn", "bf16")]


@pytest.mark.parametrize(("kernel", "table"), [("hopper", hopper.MIN_KV_LEN), ("triton", triton.MIN_KV_LEN)])
def test_tables_are_what_was_measured(kernel: str, table: dict[tuple[str, int, bool], int]) -> None:
    speed = {
        (row["provider"], row["precision"], row["D"], row["causal"], row["S"]): row["tflops_e2e"]
        for row in ROWS
    }
    lengths: dict[tuple[int, bool], set[int]] = {}
    for row in ROWS:
        lengths.setdefault((row["D"], row["causal"]), set()).add(row["S"])
    expected = {}
    for precision, problem in itertools.product(PRECISIONS, lengths):
        # What is asked first must be faster than the kernel behind it, too.
        others = [*SDPA, ("triton", precision)] if kernel == "hopper" else SDPA
        for length in sorted(lengths[problem], reverse=True):
            own, *found = (
                speed.get((*provider, *problem, length)) for provider in ((kernel, precision), *others)
            )
            if own is None or None in found or own < 1.02 * max(found):
                break
            expected[(precision, *problem)] = length
    measured = {head_dim for head_dim, _ in lengths}
    assert expected and {key: length for key, length in table.items() if key[1] in measured} == expected


def test_masked_table_is_what_was_measured() -> None:
    """At least 2% faster than SDPA with it under every bool mask, at every length from there on, and at 8191, where a mask
    cannot be read in wide words; what was not measured under all of them does not count."""
    rows = json.loads((RESULTS / "masks_h100.json").read_text())
    gains: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in rows:
        if row["mask"] in ("causal", "random", "random, one a head"):
            by_length = gains.setdefault((row["precision"], row["D"]), {})
            by_length.setdefault(row["S"], []).append(row["ms"]["sdpa"] / row["ms"]["triton"])
    expected = {}
    for key, by_length in gains.items():
        faster = {length for length, found in by_length.items() if len(found) == 3 and min(found) >= 1.02}
        slower = set(by_length) - faster
        lengths = {length for length in faster if length % 16 == 0 and length > max(slower, default=0)}
        if {8191, 8192} <= faster and lengths:
            expected[key] = min(lengths)
    assert expected and expected == triton.MASKED_MIN_KV_LEN
