"""Random programs with attention in them, from fixed seeds: rewritten, they give what eager torch does.

`python tests/helpers/random_programs.py --seeds 0 20000` runs more of them.
"""

from __future__ import annotations

import pytest
import torch
from program_check import check

from sage_inductor.rewriting import substitution

# A fifth to a third of a second each, most of it for the tracing of symbolic sizes: always a quarter of a minute of one core,
# and ten minutes where the slow ones are asked for.
ALWAYS, SLOW, AT_ONCE = 50, 2000, 25


@pytest.mark.parametrize(
    "first",
    [
        *range(0, ALWAYS, AT_ONCE),
        *(pytest.param(first, marks=pytest.mark.slow) for first in range(ALWAYS, SLOW, AT_ONCE)),
    ],
)
def test_programs(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        outcome = check(seed)
        assert outcome.difference is None, f"seed {seed}, {outcome.way}: {outcome.difference}\n{outcome.text}"


def test_they_find_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are laid out as NHD whatever reads them, as they once were."""
    monkeypatch.setattr(substitution, "is_dense", lambda tensor: True)
    outcomes = (check(seed, "traced") for seed in range(5000, 5400))
    found = next(outcome.difference for outcome in outcomes if outcome.difference)
    assert found.startswith("strides of output"), found


def test_programs_are_the_same_each_time() -> None:
    before = check(7)
    torch.manual_seed(1)
    assert check(7) == before
