"""A plan: the measured decision for each attention of a model, and how the pass looks decisions up.

`calibrate` makes plans, `file.py` writes and reads them, `Config(plan=...)` applies them. A decision belongs to a site by its
name *and* its fingerprint. A plan made for another model, or for another state of this one, is thus never applied to the wrong
site: the site stays SDPA and says why.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike

from sage_inductor.kernels import PRECISIONS
from sage_inductor.kernels.forms import FORMS, most_careful
from sage_inductor.measurement.memory import mebibytes
from sage_inductor.plan import file
from sage_inductor.plan.sites import (
    DECISIONS,
    SDPA,
    Figure,
    Fingerprint,
    PlannedSite,
    Steps,
    Verdict,
    steps_text,
)
from sage_inductor.report.text import plain_table


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
    """The error of the model's output with the whole plan applied, for each range of steps."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """Versions and device of the calibration."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON; the same plan gives the same bytes. Raises OSError where it cannot be written."""
        file.write(self._fields(), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """The plan in a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds no plan, one of a newer version, or a value that is not valid. Names file and field.
        """
        return cls(**file.read(path))

    def to_json(self) -> str:
        """What `save` writes."""
        return file.to_json(self._fields())

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan that `to_json` gave. Raises ValueError as `load` does."""
        return cls(**file.from_json(text))

    def _fields(self) -> file.PlanFields:
        return file.PlanFields(
            metric=self.metric,
            tolerance=self.tolerance,
            sites=self.sites,
            output_rel_l2=self.output_rel_l2,
            made_with=self.made_with,
        )

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
        """`{site name: a form (kernels/forms.py) or "sdpa"}`. Of several decisions for one name, as for several ranges
        of steps, it is the most careful."""
        result: dict[str, str] = {}
        for site in self.sites:
            result[site.name] = _most_careful([site.decision, result.get(site.name, site.decision)])
        return result

    def verdict(self, name: str, fingerprint: Fingerprint, others: Iterable[str] = ()) -> Verdict:
        """The decision for the site `name` of a graph. The sites called `others` run the same code.

        Several decisions may fit: those of sites that share the code, of several ranges of steps, of several graphs in which
        the site was met. The most careful one counts.
        """
        own = self._verdict_of(name, fingerprint)
        verdicts = [own]
        if own.known:
            for other in others:
                verdict = self._verdict_of(other, fingerprint)
                if verdict.precision is None:
                    verdict = replace(verdict, reason=f"{verdict.reason}; {other} runs the same code")
                verdicts.append(verdict)
        return _most_careful_verdict(verdicts)

    def _verdict_of(self, name: str, fingerprint: Fingerprint) -> Verdict:
        called = self.sites_called(name)
        if not called:
            return Verdict(
                None, reason=f"plan has no site {name!r} (its sites: {self.names_text()})", known=False
            )
        # A short name may mean several sites. Those with another fingerprint are not meant.
        verdicts = [self._verdict_among(sites, name, fingerprint) for sites in called]
        return _most_careful_verdict([verdict for verdict in verdicts if verdict.known] or verdicts[:1])

    def sites_called(self, name: str) -> list[list[PlannedSite]]:
        """The sites of the plan that `name` means, as one list for each of their names.

        A site of exactly that name, if the plan has it. Else all where one name ends with the other: "blocks.0.attn" means
        "model.blocks.0.attn", as when the model was calibrated in its wrapper, and "attn", as when a block was calibrated
        alone.
        """
        by_name: dict[str, list[PlannedSite]] = {}
        for site in self.sites:
            by_name.setdefault(site.name, []).append(site)
        if name in by_name:
            return [by_name[name]]
        return [
            sites
            for planned, sites in by_name.items()
            if planned.endswith(f".{name}") or name.endswith(f".{planned}")
        ]

    def _verdict_among(self, named: list[PlannedSite], name: str, fingerprint: Fingerprint) -> Verdict:
        """The decision of the sites `named`, which are all of one name."""
        fitting = [site for site in named if not fingerprint.disagreements(site.fingerprint)]
        # That a site could not be measured in one graph (one query, as in decoding) says nothing about other graphs.
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
        shares = [site.skipped for site in fitting if site.decision == decision and site.skipped is not None]
        return Verdict(decision, rel_l2=max(worst, default=None), skipped=min(shares, default=None))

    def missing(self, names: Iterable[str], within: Iterable[str] = ()) -> list[str]:
        """The names of sites that calibration met in one graph with some of `names`, and that are not among `names`.

        `within` has the paths of modules that are compiled by themselves; only sites below one of them are missing then.
        """
        here = [site for name in set(names) for sites in self.sites_called(name) for site in sites]
        graphs, found = {site.graph for site in here}, {site.name for site in here}
        below = tuple(f"{path}." for path in within)
        return list(
            dict.fromkeys(
                site.name
                for site in self.sites
                if site.graph in graphs
                and site.name not in found
                and (not below or site.name.startswith(below))
            )
        )

    def _why_sdpa(self, site: PlannedSite) -> str:
        figures = [(error.precision, getattr(error, self.metric)) for error in site.measured]
        shown = [f"{precision} {_figure_text(figure)}" for precision, figure in figures]
        return f"{self.metric}: {', '.join(shown) or 'not measured'}; tolerance {self.tolerance:g}"

    def names_text(self, at_most: int = 4) -> str:
        """The names of the first sites, with the number of the others."""
        names = list(self.decisions())
        more = f", ... {len(names) - at_most} more" if len(names) > at_most else ""
        return (", ".join(names[:at_most]) or "none") + more

    def __repr__(self) -> str:
        """Short, and different for plans of different content. It is part of the repr of `Config`, by which caches tell
        compiled graphs apart."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return f"Plan({len(self.sites)} sites, sha256={digest})"

    def __hash__(self) -> int:
        return hash((self.metric, self.tolerance, self.sites))

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A header, and a row for each decision with the errors measured there."""
        measured = {error.precision for site in self.sites for error in site.measured}
        forms = [form for form in FORMS if form in measured] or list(PRECISIONS)
        skips = any(site.skipped is not None for site in self.sites)
        header = ("site", "steps", "decision", *forms, "of the output", "K, largest channel", "MiB")
        header += ("tiles left out", "which adds") if skips else ()
        rows = []
        for site in self.sites:
            by_precision = {error.precision: error for error in site.measured}
            figures = [getattr(by_precision.get(form), self.metric, None) for form in forms]
            chosen = site.of_decision()
            rows.append(
                (
                    site.name,
                    steps_text(site.steps),
                    site.decision,
                    *map(_figure_text, figures),
                    _figure_text(chosen.output_rel_l2 if chosen else None),
                    "" if site.key_outlier is None else f"{site.key_outlier:.1f}x",
                    mebibytes(site.copies_bytes(), measured=False),
                    *(_skipping_texts(site) if skips else ()),
                )
            )
        return header, rows

    def summary(self) -> list[str]:
        """Lines of text: the number of decisions of each kind, the tolerance, and the error of the model's output with all of
        them."""
        counts = Counter(site.decision for site in self.sites)
        shown = [name for name in DECISIONS if name in (*PRECISIONS, SDPA) or counts[name]]
        shown += sorted(set(counts) - set(DECISIONS))  # with a skip_threshold
        lines = [
            f"{len(self.sites)} decision(s): {', '.join(f'{counts[name]} {name}' for name in shown)}; "
            f"worst {self.metric}, tolerance {self.tolerance:g}"
        ]
        lines += [
            f"the model's output with all of it{'' if steps is None else f', steps {steps_text(steps)}'}: "
            f"relative L2 {_figure_text(figure)}"
            for steps, figure in self.output_rel_l2
        ]
        return lines

    def __str__(self) -> str:
        return "\n".join([plain_table(*self.table()), *self.summary()])


def _most_careful(decisions: list[str]) -> str:
    return SDPA if SDPA in decisions else most_careful(decisions)


def _most_careful_verdict(verdicts: list[Verdict]) -> Verdict:
    """The first verdict that keeps its site. If none does, one of the most careful form, with the largest error, and the least
    share of tiles left out, among the verdicts of that form."""
    kept = next((verdict for verdict in verdicts if verdict.precision is None), None)
    if kept is not None:
        return kept
    precision = _most_careful([verdict.precision or SDPA for verdict in verdicts])
    errors = [v.rel_l2 for v in verdicts if v.precision == precision and v.rel_l2 is not None]
    shares = [v.skipped for v in verdicts if v.precision == precision and v.skipped is not None]
    return Verdict(precision, rel_l2=max(errors, default=None), skipped=min(shares, default=None))


def _skipping_texts(site: PlannedSite) -> tuple[str, str]:
    """The share of tiles left out, and what that adds to the error."""
    return "" if site.skipped is None else f"{site.skipped:.1%}", _figure_text(site.skip_rel_l2)


def _figure_text(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return "not finite" if figure.worst is None else f"{figure.worst:.3g}"
