"""How an attention is rounded, as one text: a precision alone, or with a smoothing that was named behind a plus: "fast", "fast+mean"."""

from __future__ import annotations

from collections.abc import Iterable

from sage_inductor.kernels.base import PRECISIONS
from sage_inductor.kernels.smoothing import SMOOTHINGS


def form_of(precision: str, smoothing: str = "auto") -> str:
    return precision if smoothing == "auto" else f"{precision}+{smoothing}"


def parts_of(form: str) -> tuple[str, str]:
    """(precision, smoothing)."""
    precision, _, smoothing = form.partition("+")
    return precision, smoothing or "auto"


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
