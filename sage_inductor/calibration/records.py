"""What calibration keeps of its measurements until a plan is made."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sage_inductor.measurement.metrics import METRICS
from sage_inductor.plan.sites import Figure, Fingerprint, Measured

Key: TypeAlias = "tuple[str, Fingerprint]"


def figure(metric: str, values: Sequence[float]) -> Figure:
    """The worst and the mean of one metric over `values`; None for one that is not finite."""
    worst, mean = METRICS[metric].worst(values), statistics.fmean(values)
    return Figure(worst if math.isfinite(worst) else None, mean if math.isfinite(mean) else None)


class SkippingMeasurements:
    """What thresholds do at sites of which `decisions` has the form: the share of tiles left out, what that adds to the error
    (relative L2), and the errors against exact attention (`measured`, as for forms without a threshold)."""

    def __init__(self, decisions: Mapping[Key, str]) -> None:
        self.decisions = decisions
        self.measured: dict[Key, dict[str, Measured]] = {}
        self._shares: dict[tuple[Key, str], list[float]] = defaultdict(list)
        self._added: dict[tuple[Key, str], list[float]] = defaultdict(list)

    def add(self, at: tuple[Key, str], share: float, added: float) -> None:
        self._shares[at].append(share)
        self._added[at].append(added)

    def share(self, key: Key, form: str) -> float:
        return statistics.fmean(self._shares[key, form])

    def added(self, key: Key, form: str) -> Figure:
        return figure("rel_l2", self._added[key, form])
