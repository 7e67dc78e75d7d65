"""The records of a plan: a site by its name and fingerprint, what was measured there, and what was decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TypeAlias

from sage_inductor.kernels.copies import copies_bytes
from sage_inductor.kernels.forms import FORMS, parts_of
from sage_inductor.report.site import Site, TensorInfo

SDPA = "sdpa"


DECISIONS: tuple[str, ...] = (
    *FORMS,
    SDPA,
)  # the fastest first; each form may have a skip_threshold behind it


Steps: TypeAlias = "tuple[int, int | None]"  # first and last step of a range, None: no end


@dataclass(frozen=True)
class Fingerprint:
    """The facts that must agree for a site of a plan to be a site of a model. Batch, lengths and dtype may differ."""

    pattern: str
    code: str
    """"model.py: out = F.scaled_dot_product_attention(q, k, v)": the file and the text of the line that calls."""
    calls: int
    """The number of attention calls in the same module and graph. "#2" in a name is the second of them."""
    heads: int | None
    kv_heads: int | None
    """Both are None where heads are folded into the batch, or symbolic."""
    head_dim: int | None
    value_head_dim: int | None
    mask: str
    """"none", "causal", "window", or "runtime" for a mask that is read when the model runs. "runtime" agrees with all: it may
    be any mask, and where lengths are symbolic a mask may not be understood that else is."""

    @classmethod
    def of(cls, site: Site, calls: int) -> Fingerprint:
        return cls(
            pattern=site.pattern,
            code=f"{site.source.rpartition(':')[0]}: {site.code}",
            calls=calls,
            heads=_heads(site.query),
            kv_heads=_heads(site.key),
            head_dim=_size(site.query, -1),
            value_head_dim=_size(site.value, -1),
            mask=_mask_class(site.mask),
        )

    def disagreements(self, planned: Fingerprint) -> list[str]:
        """ "heads=8 (plan: 4)" for each part in which this site is not the planned one."""
        return [
            f"{part.name}={here} (plan: {there})"
            for part in fields(self)
            if (here := getattr(self, part.name)) != (there := getattr(planned, part.name))
            and not (part.name == "mask" and "runtime" in (here, there))
        ]


def _heads(tensor: TensorInfo | None) -> int | None:
    return _size(tensor, 1) if tensor is not None and len(tensor.shape) == 4 else None


def _size(tensor: TensorInfo | None, dim: int) -> int | None:
    size = None if tensor is None else tensor.shape[dim]
    return size if isinstance(size, int) else None


_READ_AT_RUN_TIME = ("key_padding", "bool", "additive", "unknown", "chunked", "prefix", "segments")


def _mask_class(mask: str) -> str:
    """`Fingerprint.mask` for the text of a `masks.Mask`: "runtime" for "causal + key_padding"."""
    if any(kind in mask for kind in _READ_AT_RUN_TIME):
        return "runtime"
    if mask.startswith("causal"):
        return "causal"
    return "window" if mask.startswith(("sliding_window", "band")) else "none"


def calls_per_module(sites: Iterable[Site]) -> Counter[str]:
    """How many sites of one graph have each module path."""
    return Counter(site.module for site in sites)


@dataclass(frozen=True)
class Figure:
    """One metric over all samples and calls. None stands for a value that is not finite; no tolerance allows it."""

    worst: float | None
    mean: float | None


@dataclass(frozen=True)
class Measured:
    """The errors of one precision at one site: its output against SDPA's on the site's exact inputs. `precision` is a form
    (kernels/forms.py): it names the smoothing where that is not "auto", and the skip_threshold and what decides about it where there is one.

    `kernel` names all kernels that may run it, as "hopper, triton"; the figures are those of the worst. `samples` counts the
    measurements.
    """

    precision: str
    kernel: str
    samples: int
    rel_l2: Figure
    max_error: Figure
    cosine: Figure
    sqnr_db: Figure
    output_rel_l2: Figure | None = None
    """The error of the model's output with this site alone in this precision; None where it was not measured."""


@dataclass(frozen=True)
class PlannedSite:
    """One attention of the model and the decision about it. The decision holds for the range `steps`, or always if that is
    None."""

    name: str
    fingerprint: Fingerprint
    decision: str
    steps: Steps | None = None
    graph: int = 0
    """The number of the graph in which calibration first met the site."""
    source: str = "?"
    query: str = "?"
    key: str = "?"
    value: str = "?"
    mask: str = "?"
    measured: tuple[Measured, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why the site was not measured, and so stays SDPA."""
    key_outlier: float | None = None
    """How many times as large as the middle one K's largest channel is (root mean squares, K without its mean), in the head and
    sample where it is most. From about 4 on a smoothing of "both" pays. None where it was not measured, or is not finite."""
    skipped: float | None = None
    """The share of tiles that the decision's skip_threshold leaves out, on average over the samples. None where it has none."""
    skip_rel_l2: Figure | None = None
    """What leaving them out adds: relative L2 of the output against that of the same form without a threshold."""

    def of_decision(self) -> Measured | None:
        return next((measured for measured in self.measured if measured.precision == self.decision), None)

    def copies_bytes(self) -> int | None:
        """The memory that the copies in 8 bits of the decision take for the inputs of calibration (kernels/copies.py); None where
        it is SDPA, or sizes are symbolic."""
        shapes = [text.partition(" ")[0].split("x") for text in (self.query, self.key, self.value)]
        if self.decision == SDPA or not all(size.isdecimal() for shape in shapes for size in shape):
            return None
        query, key, value = (tuple(map(int, shape)) for shape in shapes)
        if not all(2 <= len(shape) <= 4 for shape in (query, key, value)):
            return None
        form = parts_of(self.decision)
        return copies_bytes(query, key, value[-1], form.precision, smoothing=form.smoothing)

    def covers(self, step: int) -> bool:
        if self.steps is None:
            return True
        first, last = self.steps
        return first <= step and (last is None or step <= last)


@dataclass(frozen=True)
class Verdict:
    """The decision of a plan about one site of a graph: the form to run it in ("fast", "fast+both", "fast+skip=0.01"), or the
    reason why it stays SDPA."""

    precision: str | None
    rel_l2: float | None = None
    skipped: float | None = None
    reason: str | None = None
    known: bool = True
    """False where the plan has no such site."""


def steps_text(steps: Steps | None) -> str:
    if steps is None:
        return "all"
    first, last = steps
    return f"{first}-" if last is None else f"{first}-{last}"
