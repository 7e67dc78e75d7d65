"""How an attention is computed, as one text: a precision alone, or with a smoothing and a skip_threshold behind a plus: "fast",
"fast+mean", "fast+skip=0.01", "fast+mean+skip=0.01"; "fast+skip=sample:0.001" where a sample of the queries decides (skip_by)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sage_inductor.kernels.base import PRECISIONS
from sage_inductor.kernels.skipping import DECIDERS, decider_problem, threshold_problem
from sage_inductor.kernels.smoothing import SMOOTHINGS

_SKIP = "+skip="
_BY_SCORES = DECIDERS[0]  # goes without saying


class Form(NamedTuple):
    """The parts of the text."""

    precision: str
    smoothing: str = "auto"
    skip_threshold: float = 0.0
    skip_by: str = _BY_SCORES

    def __str__(self) -> str:
        return form_of(*self)

    def options(self) -> dict[str, Any]:
        """The parts as the operators' arguments, and the fields of AttentionParams."""
        return {
            "precision": self.precision,
            "smoothing": self.smoothing,
            "skip_threshold": self.skip_threshold,
            "skip_by": self.skip_by,
        }


def form_of(
    precision: str, smoothing: str = "auto", skip_threshold: float = 0.0, skip_by: str = _BY_SCORES
) -> str:
    rounded = precision if smoothing == "auto" else f"{precision}+{smoothing}"
    decider = "" if skip_by == _BY_SCORES else f"{skip_by}:"
    return f"{rounded}{_SKIP}{decider}{skip_threshold!r}" if skip_threshold else rounded


def parts_of(form: str) -> Form:
    """The parts of a form. Raises ValueError for a skip_threshold that is no number."""
    rounded, _, skipping = form.partition(_SKIP)
    precision, _, smoothing = rounded.partition("+")
    skip_by, _, threshold = skipping.rpartition(":")
    return Form(precision, smoothing or "auto", float(threshold or 0), skip_by or _BY_SCORES)


def is_form(text: str) -> bool:
    """Whether `text` is a form as `form_of` writes it: there is one text for each."""
    try:
        parts = parts_of(text)
    except ValueError:
        return False
    return (
        form_of(*parts[:2]) in FORMS
        and threshold_problem(parts.skip_threshold) is None
        and decider_problem(parts.skip_by) is None
        and str(parts) == text
    )


def most_careful(forms: Iterable[str]) -> str:
    """The form that is at least as careful as each of these: the slowest in which Q, K, P and V are rounded, with the least
    skip_threshold, and by all scores unless all leave it to a sample."""
    parts = [parts_of(form) for form in forms]
    rounded = max((form_of(*part[:2]) for part in parts), key=FORMS.index)
    skip_by = min((part.skip_by for part in parts), key=DECIDERS.index)
    return form_of(*parts_of(rounded)[:2], min(part.skip_threshold for part in parts), skip_by)


def forms_of(smoothings: Iterable[str]) -> tuple[str, ...]:
    """Every precision with each of these smoothings: the fastest precision first, the least smoothing first."""
    wanted = set(smoothings)
    return tuple(
        form_of(precision, smoothing)
        for precision in PRECISIONS
        for smoothing in SMOOTHINGS
        if smoothing in wanted
    )


FORMS = forms_of(SMOOTHINGS)
