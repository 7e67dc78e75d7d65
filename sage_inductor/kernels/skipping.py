"""What softmax makes nothing of, and kernels leave out: `skip_threshold`.

A kernel computes attention tile by tile: some rows of queries, a block of keys. When it has the scores of a tile it knows each
row's largest there, and the largest that the row has met so far (the running maximum of the online softmax). Where

    exp(largest here - largest so far) < skip_threshold        for every row of the tile

no weight of the tile can reach skip_threshold of the largest one, and the tile is left out: no exponential, no row sum, no
product with V, and V is not read where the kernel can help it. Source: BLASST (arXiv:2512.12087), which TensorRT-LLM has as
skip-softmax attention.

- Key blocks come in the order in which the kernel visits them, which is ascending, so that the running maximum is that of the
  keys in front.
- The first block that a row sees is kept, because nothing is in front of it. Blocks that the upper edge of a band cuts (the
  diagonal of a causal mask) are kept always.
- Where a kernel computes a row's keys in parts, each part stands by itself: its first block has nothing in front of it either
  (`SkipTile.starts`).
- A row that sees no key of the tile, by a mask, a window or segments, has no say; nor have rows behind the last query.
- The log-sum-exp is that of the weights that were summed.
- NaN in Q or K keeps a tile. NaN or infinity in V of a tile that is left out shows nowhere.

What it costs in accuracy depends on how many tiles are left out, so on the length too: for the same share, published thresholds
fall with the number of keys. `calibrate(skip=True)` measures it.

All that is `skip_by="scores"`: every score decides, so that no weight above the threshold is lost, but every score has to be computed.
With `skip_by="sample"` a sample of the queries decides before: one in SAMPLE_STEP is multiplied with all keys first, and a tile (of
SAMPLED_TILE) is left out where

    SAMPLE_LIFT * exp(largest here - largest of all keys) < skip_threshold        for every sampled row of the tile

Attention then reads neither K nor V of it. Differences to the above:

- It is an estimate. Other queries of the tile may have larger weights there; SAMPLE_LIFT is for what they mostly have, and where one has
  more, it loses a weight above the threshold. How often, and what that costs, is measured (benchmarks/notes.md); calibration measures it
  as it does the other form.
- The maximum is that of all keys that the row sees, wherever they lie, so that keys in front of a local band are left out, too.
- Kept always are the first block that a tile sees, and every block that some query of the tile sees in part: those that the edges
  of a band cut, and the last one where it is not full.
- It goes with masks over keys, but not with masks that differ from query to query nor with segments, where a query says little about
  its neighbours.
- A row whose scores in a block are NaN keeps that block.
- Heads differ: some attend to all keys. In a long call a sample would cost such a head some 3% of its time for nothing. So of each
  PROBE_STEP groups of GROUP_ROWS queries the last is looked at first; where it turns out that less than 1 in PROBE_SHARE of a head's
  blocks there can be left out, its other groups keep all blocks. A head that has fewer than PROBED_GROUPS is looked at as a whole.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor

from sage_inductor.kernels.base import AttentionProblem

FULLY_MASKED = -1e30  # stands for -inf in running maxima: keeps inf - inf out of the exponents
LEAST_STEP = 64  # the fewest keys that a kernel takes at a time
# A threshold is below it: at 1 a tile whose maximum equals the running one would be left out. An int: Dynamo makes a symbol of a float
# of a module with dynamic=True, and compiles again where that turns out to be none.
MOST = 1


class SkipTile(NamedTuple):
    """The rows that decide together, and the keys that they decide about."""

    rows: int = 64
    keys: int = 128  # a multiple of LEAST_STEP that divides 128
    starts: Tensor | None = None
    """Where a part of the keys begins that is computed by itself, bool `[batch, heads, tiles of queries, steps of keys]`; None
    where all keys are one part."""


SKIP_TILE = SkipTile()
SAMPLED_TILE = SkipTile(rows=128)
"""What a sample decides about."""
SAMPLE_STEP = 16  # queries of which one, the middle one, is in the sample
SAMPLE_LIFT = 10.0
"""How many times as large as in its sample a tile's largest weight is taken to be. Measured (benchmarks/notes.md): 4 to 6 times in the middle
tile of trained layers and smooth data, 1.3 of normal inputs; with 10 a threshold adds up to two or three times the error that it adds by all scores."""
GROUP_ROWS = 2048  # queries whose tiles are looked at together
PROBE_STEP = 8
PROBE_SHARE = 20
PROBED_GROUPS = 24  # with fewer, one round of all groups takes as long as two rounds of some
DECIDERS = ("scores", "sample")
Decider = Literal["scores", "sample"]

LADDER = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
"""The thresholds that calibration tries, the largest first."""


# The attention kernel's time with a threshold against that without, where nothing is left out, and how much of it a share of the
# tiles takes away: measured (H200, 75,600 tokens, "fast"; benchmarks/notes.md). By a sample, with its lists.
_TIMES = {"scores": (1.09, 0.55), "sample": (1.02, 0.94)}


def expected_time(skip_by: str, share: float) -> float:
    """The time of a long attention that leaves out `share` of its tiles against that of one that leaves out nothing."""
    at_rest, gain = _TIMES[skip_by]
    return at_rest - gain * share


def threshold_problem(value: object) -> str | None:
    """Why `value` is no skip_threshold; None where it is one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < MOST
    return (
        None
        if number
        else f"skip_threshold={value!r} (valid: a number from 0, which leaves nothing out, to below 1)"
    )


def decider_problem(value: object) -> str | None:
    """Why `value` is no skip_by; None where it is one."""
    if isinstance(value, str) and value in DECIDERS:
        return None
    return f"skip_by={value!r} (valid: {', '.join(DECIDERS)})"


def unmeasured_skipping(problem: AttentionProblem, kernel: str) -> list[str]:
    """Why the measurements shipped with a kernel say nothing about `problem`: nothing is left out in them."""
    threshold = problem.params.skip_threshold
    if not threshold:
        return []
    return [f'skip_threshold={threshold:g} (not measured yet: by tune="measure", or kernel="{kernel}")']


def log2_threshold(skip_threshold: float) -> float:
    """The distance below the running maximum, in units of log2, from which on nothing counts; -inf where nothing is left out."""
    return math.log2(skip_threshold) if skip_threshold > 0 else -math.inf


def probes(q_len: int) -> int:
    """How many groups of a head's queries decide whether the others are looked at; 0 where all are."""
    groups = -(-q_len // GROUP_ROWS)
    return groups // PROBE_STEP if groups >= PROBED_GROUPS else 0


def log2_sample_threshold(skip_threshold: float) -> float:
    """The same for the scores of a sample."""
    return log2_threshold(skip_threshold) - math.log2(SAMPLE_LIFT)
