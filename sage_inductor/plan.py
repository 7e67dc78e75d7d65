"""What each attention of a model may be replaced by, as measured: the records of a plan, and how the pass reads them.

`calibrate` makes plans, `plan_file` writes and reads them, `Config(plan=...)` applies them. A decision belongs to a
site by its name *and* its fingerprint, so that a plan made for another model, or for another state of this one,
is never applied to the wrong site: the site stays SDPA and says why.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TypeAlias

from sage_inductor.kernels import PRECISIONS
from sage_inductor.report import Site, TensorInfo, plain_table

SDPA = "sdpa"
DECISIONS: tuple[str, ...] = (*PRECISIONS, SDPA)  # the fastest first
Steps: TypeAlias = "tuple[int, int | None]"  # first and last step of a range, None: no end


@dataclass(frozen=True)
class Fingerprint:
    """What has to agree for a plan's site to be a model's site. Batch, lengths and dtype may differ."""

    pattern: str
    code: str
    """"model.py: out = F.scaled_dot_product_attention(q, k, v)": the file and the text of the line that calls."""
    calls: int
    """Attention calls in the same module and graph: what "#2" in a name counts."""
    heads: int | None
    kv_heads: int | None
    """None where heads are folded into the batch, or symbolic."""
    head_dim: int | None
    value_head_dim: int | None
    mask: str
    """"none", "causal", "window", or "runtime" for one that is read when the model runs. That can be any mask, and
    a causal one becomes so under dynamic shapes: it agrees with all."""

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


_READ_AT_RUN_TIME = ("key_padding", "bool", "additive", "unknown")


def _mask_class(mask: str) -> str:
    """The class of `str(masks.Mask)`, e.g. "causal, key_padding"."""
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
    """One metric over all samples and calls. None stands for a value that is not finite, and holds no tolerance."""

    worst: float | None
    mean: float | None


@dataclass(frozen=True)
class Measured:
    """One precision at one site, on the site's own exact inputs, against SDPA's output there. `kernel` names all that may
    run it ("hopper, triton"); figures are those of the worst."""

    precision: str
    kernel: str
    samples: int
    rel_l2: Figure
    max_error: Figure
    cosine: Figure
    sqnr_db: Figure
    output_rel_l2: Figure | None = None
    """Of the model's output, with this site alone in this precision; None where it was not run."""


@dataclass(frozen=True)
class PlannedSite:
    """One attention of the model, and what may take its place, in a range of steps or (None) always."""

    name: str
    fingerprint: Fingerprint
    decision: str
    steps: Steps | None = None
    graph: int = 0
    """Sites of one number were in one graph when the model was calibrated."""
    source: str = "?"
    query: str = "?"
    key: str = "?"
    value: str = "?"
    mask: str = "?"
    measured: tuple[Measured, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why the site was not measured, and so stays SDPA."""

    def of_decision(self) -> Measured | None:
        return next((measured for measured in self.measured if measured.precision == self.decision), None)

    def covers(self, step: int) -> bool:
        if self.steps is None:
            return True
        first, last = self.steps
        return first <= step and (last is None or step <= last)


@dataclass(frozen=True)
class Verdict:
    """What a plan says of one site of a graph: the precision to run it in, or the reason why it stays SDPA."""

    precision: str | None
    rel_l2: float | None = None
    reason: str | None = None
    known: bool = True
    """False for a site that the plan was not made for."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Decisions for the attention sites of one model, with the measurements behind them.

    Make one with `sage_inductor.calibrate`, keep it with `save` and `load`, and apply it by
    `torch.compile(..., options={"sage.plan": plan_or_path})` or `Config(plan=...)`.
    """

    metric: str
    tolerance: float
    sites: tuple[PlannedSite, ...]
    output_rel_l2: tuple[tuple[Steps | None, Figure], ...] = ()
    """Of the model's output with the whole plan applied, for each range of steps."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """Versions and device of the calibration."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON. The same plan gives the same bytes."""
        from sage_inductor import plan_file

        plan_file.save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """The plan in a file. Raises OSError where it cannot be read, and ValueError, naming the file and the field,
        where it is no plan, was made by a newer version, or holds a value that is not valid."""
        from sage_inductor import plan_file

        return plan_file.load(path)

    def to_json(self) -> str:
        """What `save` writes."""
        from sage_inductor import plan_file

        return plan_file.to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that `to_json` gave. Raises ValueError as `load` does."""
        from sage_inductor import plan_file

        return plan_file.from_json(text)

    def ranges(self) -> tuple[Steps, ...]:
        """The ranges of steps with decisions of their own; empty for a plan that does not depend on the step."""
        return tuple(
            sorted({site.steps for site in self.sites if site.steps is not None}, key=lambda r: r[0])
        )

    def at(self, step: int) -> Plan:
        """The part of the plan for `step`, which does not depend on the step any more.

        Raises ValueError for a step outside of all ranges.
        """
        ranges = self.ranges()
        inside = [steps for steps in ranges if steps[0] <= step and (steps[1] is None or step <= steps[1])]
        if ranges and not inside:
            valid = ", ".join(map(steps_text, ranges))
            raise ValueError(f"step={step} is in no range of the plan (valid: {valid})")
        return replace(
            self,
            sites=tuple(replace(site, steps=None) for site in self.sites if site.covers(step)),
            output_rel_l2=tuple((None, figure) for steps, figure in self.output_rel_l2 if steps in inside),
        )

    def decisions(self) -> dict[str, str]:
        """`{site name: "fast" | "balanced" | "accurate" | "sdpa"}`; the most careful of several of one name."""
        result: dict[str, str] = {}
        for site in self.sites:
            result[site.name] = _most_careful([site.decision, result.get(site.name, DECISIONS[0])])
        return result

    def verdict(self, name: str, fingerprint: Fingerprint) -> Verdict:
        """The decision for a site of a graph.

        Of several that fit (ranges of steps, graphs in which the site was met) the most careful one counts.
        """
        named = [site for site in self.sites if site.name == name]
        if not named:
            return Verdict(
                None, reason=f"plan has no site {name!r} (its sites: {self._names()})", known=False
            )
        fitting = [site for site in named if not fingerprint.disagreements(site.fingerprint)]
        # A site that could not be measured in one graph (one query, as in decoding) says nothing of others.
        fitting = [site for site in fitting if not site.reasons] or fitting
        fitting = [site for site in fitting if site.fingerprint == fingerprint] or fitting
        if not fitting:
            differences = ", ".join(fingerprint.disagreements(named[0].fingerprint))
            return Verdict(None, reason=f"plan is for another {name!r}: {differences}", known=False)
        decision = _most_careful([site.decision for site in fitting])
        if decision == SDPA:
            kept = next(site for site in fitting if site.decision == SDPA)
            return Verdict(None, reason=f"plan=sdpa ({'; '.join(kept.reasons) or self._why_sdpa(kept)})")
        errors = [site.of_decision() for site in fitting if site.decision == decision]
        worst = [
            error.rel_l2.worst for error in errors if error is not None and error.rel_l2.worst is not None
        ]
        return Verdict(decision, rel_l2=max(worst, default=None))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Sites that the plan met in one graph with some of `names`, and that are not among them."""
        here = set(names)
        graphs = {site.graph for site in self.sites if site.name in here}
        return list(
            dict.fromkeys(site.name for site in self.sites if site.graph in graphs and site.name not in here)
        )

    def _why_sdpa(self, site: PlannedSite) -> str:
        figures = [(error.precision, getattr(error, self.metric)) for error in site.measured]
        shown = [f"{precision} {_figure_text(figure)}" for precision, figure in figures]
        return f"{self.metric}: {', '.join(shown) or 'not measured'}; tolerance {self.tolerance:g}"

    def _names(self, at_most: int = 4) -> str:
        names = list(self.decisions())
        more = f", ... {len(names) - at_most} more" if len(names) > at_most else ""
        return (", ".join(names[:at_most]) or "none") + more

    def __repr__(self) -> str:
        """Short, and different for plans of different content: it is part of `Config`'s, which names a compiled
        graph in caches."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return f"Plan({len(self.sites)} sites, sha256={digest})"

    def __hash__(self) -> int:
        return hash((self.metric, self.tolerance, self.sites))

    def __str__(self) -> str:
        header = ("site", "steps", "decision", *PRECISIONS, "of the output")
        rows = []
        for site in self.sites:
            by_precision = {error.precision: error for error in site.measured}
            figures = [getattr(by_precision.get(precision), self.metric, None) for precision in PRECISIONS]
            chosen = site.of_decision()
            rows.append(
                (
                    site.name,
                    steps_text(site.steps),
                    site.decision,
                    *map(_figure_text, figures),
                    _figure_text(chosen.output_rel_l2 if chosen else None),
                )
            )
        lines = [plain_table(header, rows)]
        counts = Counter(site.decision for site in self.sites)
        lines.append(
            f"{len(self.sites)} decision(s): {', '.join(f'{counts[name]} {name}' for name in DECISIONS)}; "
            f"worst {self.metric}, tolerance {self.tolerance:g}"
        )
        lines += [
            f"the model's output with all of it{'' if steps is None else f', steps {steps_text(steps)}'}: "
            f"relative L2 {_figure_text(figure)}"
            for steps, figure in self.output_rel_l2
        ]
        return "\n".join(lines)


def _most_careful(decisions: list[str]) -> str:
    return max(decisions, key=DECISIONS.index)


def steps_text(steps: Steps | None) -> str:
    if steps is None:
        return "all"
    first, last = steps
    return f"{first}-" if last is None else f"{first}-{last}"


def _figure_text(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return "not finite" if figure.worst is None else f"{figure.worst:.3g}"
