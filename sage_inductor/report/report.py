"""The report: the decision about every attention of a model, with the reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sage_inductor.measurement.printable import printable
from sage_inductor.report.site import AttentionOperator, Site, Unread
from sage_inductor.report.text import plain_table, to_json


@dataclass(frozen=True)
class Report:
    """All sites of one model, in the order of execution. `str(report)` gives a table, `to_json()` the same as data,
    `to_html()` a page to look at."""

    sites: tuple[Site, ...] = field(default_factory=tuple)
    graphs: int = 1
    """The number of graphs that Dynamo made of the model; 1 means no graph break."""
    missing: tuple[str, ...] = ()
    """Sites of the plan that the model does not have."""
    unread: tuple[Unread, ...] = ()
    """Code that looks like attention and is no site."""
    operators: tuple[AttentionOperator, ...] = ()
    """Operators that compute attention by themselves, this package's own among them."""
    unmatched: str = ""
    """The globs of `include` and `exclude` that matched no attention, with the sites there were."""

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def refused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.rewritten)

    def to_json(self, indent: int | None = 2) -> str:
        """`{"graphs": n, "rewritten": n, "refused": n, "missing": [name, ...], "unmatched": text, "unread": [{module,
        source, obstacle, code}, ...], "operators": [{module, source, operator, code}, ...], "sites": [{name, source,
        pattern, query, ..., "places": [path, ...]}, ...]}`."""
        data = {
            "graphs": self.graphs,
            "rewritten": len(self.rewritten),
            "refused": len(self.refused),
            "missing": list(self.missing),
            "unmatched": self.unmatched,
            "operators": [asdict(item) for item in self.operators],
            "unread": [asdict(item) for item in self.unread],
            "sites": [_site_data(site) for site in self.sites],
        }
        return to_json(data, indent)

    def to_html(self, title: str = "Attention report") -> str:
        """One self-contained page: the module tree with each site coloured by its decision, filters, and bars where there are
        measurements. It needs no network, and can be read without scripts."""
        from sage_inductor.report.html.page import page  # few ask for it

        return page(
            title,
            self.sites,
            graphs=self.graphs,
            plan_mismatch=self.plan_mismatch(),
            unread=self.unread_lines(),
            remarks=[*filter(None, [self.unmatched]), *self.operator_lines(), *self.hints()],
            data=self.to_json(indent=None),
        )

    def __str__(self) -> str:
        if not self.sites:
            return printable(self.summary())
        header = ("site", "source", "pattern", "query", "key", "mask", "kernel", "reasons")
        rows = [
            (
                site.title,
                site.source,
                site.pattern,
                str(site.query or "?"),
                "x".join(map(str, site.key.shape)) if site.key else "?",
                site.mask,
                _decision(site),
                "; ".join(site.reasons),
            )
            for site in self.sites
        ]
        return f"{plain_table(header, rows)}\n{printable(self.summary())}"

    def summary(self) -> str:
        """A line with the numbers of sites, rewritten and left, and of graphs. More lines follow where the plan has sites that
        the model lacks, a glob matches nothing, or something computes or looks like attention and is no site."""
        if self.sites:
            found = (
                f"{len(self.sites)} attention(s): {len(self.rewritten)} rewritten, {len(self.refused)} left; "
                f"{self.graphs} graph(s)"
            )
        elif self.operators:
            found = f"no attention to rewrite in {self.graphs} graph(s)"
        else:
            found = f"no attention found in {self.graphs} graph(s)"
        lines = [found, self.plan_mismatch(), self.unmatched, *self.operator_lines(), *self.unread_lines()]
        return "\n".join(filter(None, [*lines, *self.hints()]))

    def operator_lines(self) -> list[str]:
        """The operators that compute attention by themselves, a line each, under a heading; empty where there is none."""
        return ["computed by operators, which stay:", *map(str, self.operators)] if self.operators else []

    def hints(self) -> list[str]:
        """Why there is no graph; the precision that "auto" took where "fast" cannot run, and what to try where no kernel can. Else
        empty."""
        if not self.graphs:
            return [
                "Dynamo made no graph of it: is it disabled (TORCHDYNAMO_DISABLE, torch.compiler.set_stance, "
                "torch.compiler.disable)?"
            ]
        slower = {site.precision for site in self.rewritten if site.precision_was_open} - {"fast"}
        if slower:
            return [
                f'precision="auto" is {", ".join(sorted(slower))} here, the fastest that can run ("fast" takes FP8: compute '
                "capability 8.9 and newer)"
            ]
        on_cpu = any("device=cpu" in reason for site in self.refused for reason in site.reasons)
        if self.rewritten or not on_cpu:
            return []
        return [
            'on a CPU only kernel="reference" runs: slow, it shows what would be rewritten and with what error'
        ]

    def unread_lines(self) -> list[str]:
        """Code that looks like attention and is no site, a line each, under a heading; empty where there is none."""
        return ["not recognised, and left as it is:", *map(str, self.unread)] if self.unread else []

    def plan_mismatch(self) -> str:
        """The sites of the plan that the model lacks; empty where it has them all."""
        return f"the plan has sites that the model lacks: {', '.join(self.missing)}" if self.missing else ""


def _site_data(site: Site) -> dict[str, Any]:
    return {**asdict(replace(site, places=())), "places": list(site.serves)}


def _decision(site: Site) -> str:
    if not site.rewritten:
        return "SDPA"
    measured = "" if site.speedup is None else f" {site.speedup:.2f}x"
    return f"{site.kernel} {site.form}{measured}"
