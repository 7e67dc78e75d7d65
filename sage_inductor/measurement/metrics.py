"""Error metrics between two tensors, computed in float64 a slice at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

VALUES_AT_ONCE = 2**22  # values converted to float64 at a time: 32 MiB for each tensor that is held
SMALLEST = 1e-300  # the least divisor: keeps 0 / 0 out where `expected` is all zeros
SQNR_CEILING_DB = 300.0  # about float64's own rounding; equal tensors get it instead of infinity


@dataclass(frozen=True)
class Criterion:
    """How a tolerance of one metric is read.

    `default` is the value that a relative L2 error of .05 comes to in this metric, except for "output_rel_l2". It lies
    above the .04 that "fast" has on normal inputs, and below what outliers in K cause.
    """

    default: float
    lower_is_better: bool
    low: float  # a tolerance lies between low and high, both excluded
    high: float

    def holds(self, value: float | None, tolerance: float) -> bool:
        """Whether a site with this value may be replaced. False for a value that is None or not finite."""
        if value is None or not math.isfinite(value):
            return False
        return value <= tolerance if self.lower_is_better else value >= tolerance

    def worst(self, values: Sequence[float]) -> float:
        """The value that decides, the largest or the smallest; NaN where any is NaN."""
        if any(math.isnan(value) for value in values):
            return math.nan
        return max(values) if self.lower_is_better else min(values)


METRICS: dict[str, Criterion] = {
    "rel_l2": Criterion(0.05, True, 0.0, math.inf),
    "max_error": Criterion(0.05, True, 0.0, math.inf),
    "cosine": Criterion(0.99875, False, -1.0, 1.0),
    "sqnr_db": Criterion(26.0, False, 0.0, SQNR_CEILING_DB),
    "output_rel_l2": Criterion(0.01, True, 0.0, math.inf),
}


@dataclass(frozen=True)
class Errors:
    """`actual` against `expected`. All are NaN where either tensor holds one."""

    rel_l2: float
    """||actual - expected|| / ||expected||"""
    max_error: float
    """max |actual - expected| / max |expected|"""
    cosine: float
    """actual . expected / (||actual|| ||expected||)"""
    sqnr_db: float
    """10 log10(||expected||^2 / ||actual - expected||^2), at most 300"""


def worst_of(errors: Sequence[Errors]) -> Errors:
    """The worst of each metric."""
    return Errors(
        **{
            part.name: METRICS[part.name].worst([getattr(error, part.name) for error in errors])
            for part in fields(Errors)
        }
    )


@torch.no_grad()
def compare(actual: Tensor, expected: Tensor) -> Errors:
    """The errors of `actual` against `expected`, two tensors of one shape, of any dtypes and strides.

    At most about `VALUES_AT_ONCE` values of each are held in float64 at a time. Raises ValueError for shapes that differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual is {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.dim() == 0:
        actual, expected = actual[None], expected[None]
    longest = max(range(actual.dim()), key=lambda dim: actual.shape[dim])
    step = max(1, VALUES_AT_ONCE * actual.shape[longest] // max(1, actual.numel()))
    # Sums of (a - e)^2, e^2, a^2 and a e; maxima of |a - e| and |e|. On the tensors' device: one transfer at the end.
    sums = torch.zeros(4, dtype=torch.float64, device=actual.device)
    maxima = torch.zeros(2, dtype=torch.float64, device=actual.device)
    if actual.numel():
        for a, e in zip(actual.split(step, longest), expected.split(step, longest), strict=True):
            a, e = a.double(), e.double()
            difference = a - e
            pairs = ((difference, difference), (e, e), (a, a), (a, e))
            sums += torch.stack([(left * right).sum() for left, right in pairs])
            maxima = torch.maximum(maxima, torch.stack([difference.abs().max(), e.abs().max()]))
    difference_2, expected_2, actual_2, product = sums.tolist()
    largest_difference, largest = maxima.tolist()
    rel_l2 = math.sqrt(difference_2) / max(math.sqrt(expected_2), SMALLEST)
    if math.isnan(difference_2):  # from an infinity in both, which no single sum shows
        return Errors(math.nan, math.nan, math.nan, math.nan)
    norms = math.sqrt(actual_2) * math.sqrt(expected_2)
    return Errors(
        rel_l2=rel_l2,
        max_error=largest_difference / max(largest, SMALLEST),
        cosine=product / norms if norms else float(actual_2 == expected_2),
        sqnr_db=min(SQNR_CEILING_DB, -20 * math.log10(rel_l2)) if rel_l2 else SQNR_CEILING_DB,
    )


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN when either holds one."""
    return compare(actual, expected).rel_l2


def max_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, in float64."""
    return compare(actual, expected).max_error
