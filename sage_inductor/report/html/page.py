"""A report as one HTML page that needs nothing else: `Report.to_html()`.

The tree, its colours and bars are plain HTML and CSS; the script only filters. All that comes from a model is
escaped, and the page's own policy lets no other script run and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from math import isfinite

from sage_inductor.report.site import Site

LEFT = "SDPA"
DEEPEST = 64  # modules in one another that are shown so
COLOURS = 5  # decisions that page.css has a colour of their own for


@dataclass
class Module:
    """A module of the model: what lies below it, by name, and the sites it holds under its own name."""

    name: str
    children: dict[str, Module] = field(default_factory=dict)
    sites: list[tuple[int, str, Site]] = field(default_factory=list)
    """(index in the report, last part of its name, site)"""

    def below(self) -> Iterator[tuple[int, Site]]:
        """Every site at or below the module, with its index in the report."""
        yield from ((index, site) for index, _, site in self.sites)
        for child in self.children.values():
            yield from child.below()


@dataclass(frozen=True)
class Look:
    """What all rows share: the class of each decision, and what the bars are relative to."""

    classes: dict[str, str]
    largest_error: float
    largest_speedup: float
    measured: bool


def page(
    title: str,
    sites: Sequence[Site],
    *,
    graphs: int,
    plan_mismatch: str,
    unread: Sequence[str],
    remarks: Sequence[str],
    data: str,
) -> str:
    """The whole document, of UTF-8 text.

    `plan_mismatch` names the sites of the plan that the model lacks, "" where there are none. `unread` is a heading and a
    line for each thing that looks like attention and is no site, or empty. `remarks` are lines of their own. `data` is the report as JSON.
    """
    folder = files(__package__)
    css, js = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = data.replace("<", "\\u003c")  # no </script> can end the element
    look = _look(sites)
    body = _summary(sites, graphs, plan_mismatch, unread, remarks, look)
    if sites:
        body += _filters(sites, look) + _tree(sites, look)
    script = f"<script>{js}</script>" if sites else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
<script type="application/json" id="report">{data}</script>
{script}
</body>
</html>
"""


def decision(site: Site) -> str:
    """ "triton fast", or "SDPA"."""
    return f"{site.kernel} {site.form}" if site.rewritten else LEFT


def reason_kinds(site: Site) -> list[str]:
    """What its reasons are about, without the values: "head_dim" for "head_dim=80 (supported: 64, 128)"."""
    return list(dict.fromkeys(reason.partition("=")[0].strip() for reason in site.reasons))


def module_tree(sites: Sequence[Site]) -> Module:
    """The sites by the dotted parts of their names; a chain of modules with one child is one module."""
    root = Module("")
    for index, site in enumerate(sites):
        *path, last = site.name.split(".")
        if len(path) > DEEPEST:  # a browser nests some hundred elements, Python as many calls
            path[DEEPEST - 1 :] = [".".join(path[DEEPEST - 1 :])]
        module = root
        for part in path:
            module = module.children.setdefault(part, Module(part))
        module.sites.append((index, last, site))
    root.children = {name: _collapsed(child) for name, child in root.children.items()}
    return root


def _collapsed(module: Module) -> Module:
    while len(module.children) == 1 and not module.sites:
        (child,) = module.children.values()
        module = Module(f"{module.name}.{child.name}", child.children, child.sites)
    module.children = {name: _collapsed(child) for name, child in module.children.items()}
    return module


def _look(sites: Sequence[Site]) -> Look:
    taken = dict.fromkeys(decision(site) for site in sites if site.rewritten)
    classes = {name: f"d{index % COLOURS}" for index, name in enumerate(taken)} | {LEFT: "sdpa"}
    errors = [site.rel_l2 for site in sites if site.rel_l2 is not None and isfinite(site.rel_l2)]
    speedups = [site.speedup for site in sites if site.speedup is not None and isfinite(site.speedup)]
    measured = any(site.rel_l2 is not None or site.speedup is not None for site in sites)
    return Look(classes, max(errors, default=0.0), max([*speedups, 1.0]), measured)


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _share(sites: Sequence[Site], look: Look) -> str:
    """The decisions about `sites` as parts of one bar, in the order of the legend."""
    counts = _counts(map(decision, sites))
    parts = "".join(
        f'<span class="{look.classes[name]}" style="--part:{counts[name] / len(sites):.2%}"></span>'
        for name in look.classes
        if name in counts
    )
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f'<div class="share" role="img" aria-label="{escape(text)}" title="{escape(text)}">{parts}</div>'


def _summary(
    sites: Sequence[Site],
    graphs: int,
    plan_mismatch: str,
    unread: Sequence[str],
    remarks: Sequence[str],
    look: Look,
) -> str:
    in_graphs = f"{graphs} graph{'' if graphs == 1 else 's'}"
    notes = f'<p class="about" id="missing">{escape(plan_mismatch)}</p>' if plan_mismatch else ""
    if unread:
        heading, *lines = unread
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        notes += f'<div class="about" id="unread"><p>{escape(heading)}</p><ul>{items}</ul></div>'
    notes += "".join(f'<p class="about">{escape(remark)}</p>' for remark in remarks)
    if not sites:
        return f'<p class="about">No attention found in {in_graphs}.</p>{notes}'
    counts = _counts(map(decision, sites))
    legend = "".join(
        f'<li><span class="badge {look.classes[name]}">{escape(name)}</span> {counts[name]}</li>'
        for name in look.classes
        if name in counts
    )
    rewritten = sum(site.rewritten for site in sites)
    about = f"{len(sites)} attentions, {rewritten} rewritten, {len(sites) - rewritten} left"
    return (
        f'<p class="about">{about}; {in_graphs}</p>{notes}{_share(sites, look)}'
        f'<ul class="legend">{legend}</ul>'
    )


def _filters(sites: Sequence[Site], look: Look) -> str:
    kinds = _counts(kind for site in sites for kind in reason_kinds(site))
    decisions = _counts(map(decision, sites))
    boxes = _boxes(
        "decision", "Decision", {name: decisions[name] for name in look.classes if name in decisions}
    )
    boxes += _boxes("reason", "Reason", kinds) if kinds else ""
    return f"""<form class="panel" aria-label="Filter">
<input type="search" name="search" aria-label="Search all fields" placeholder="Search names, files, shapes, masks, reasons">
<div><button type="button" data-open="true">Open all</button>
<button type="button" data-open="false">Close all</button> <button type="button" data-clear>Clear</button></div>
{boxes}
<p class="count" role="status"></p>
</form>
<noscript><p class="about">Without JavaScript there is no filter; every site is shown.</p></noscript>"""


def _boxes(name: str, legend: str, counts: dict[str, int]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{escape(value)}"> {escape(value)} '
        f'<span class="faint">{count}</span></label>'
        for value, count in counts.items()
    )
    return f"<fieldset><legend>{legend}</legend>{boxes}</fieldset>"


def _tree(sites: Sequence[Site], look: Look) -> str:
    measured = "<span>error (rel. L2)</span><span>speed-up</span>" if look.measured else ""
    head = f'<div class="row head"><span>module</span><span>decision</span><span>query, mask</span>{measured}</div>'
    rows = _rows(module_tree(sites), 0, look)
    return f'<section class="panel tree {"" if look.measured else "bare"}" aria-label="Modules">{head}<ul>{rows}</ul></section>'


def _rows(module: Module, depth: int, look: Look) -> str:
    """The module's children and sites in the order of execution."""
    entries = [(index, _site(index, name, site, depth, look)) for index, name, site in module.sites]
    for child in module.children.values():
        first = min(index for index, _ in child.below())
        entries.append((first, _group(child, depth, look)))
    return "".join(text for _, text in sorted(entries))


def _group(module: Module, depth: int, look: Look) -> str:
    below = [site for _, site in module.below()]
    rewritten = sum(site.rewritten for site in below)
    return (
        f'<li><details class="group" open><summary class="row" style="--depth:{depth}">'
        f'<span class="name">{escape(module.name)}</span><span class="faint">{rewritten} of {len(below)}</span>'
        f"{_share(below, look)}</summary><ul>{_rows(module, depth + 1, look)}</ul></details></li>"
    )


def _site(index: int, name: str, site: Site, depth: int, look: Look) -> str:
    decided = decision(site)
    kinds = json.dumps(reason_kinds(site))
    query = str(site.query) if site.query is not None else "?"
    bars = _error_bar(site, look) + _speedup_bar(site, look) if look.measured else ""
    facts = {
        "name": site.name,
        "source": site.source,
        "pattern": site.pattern,
        "query": site.query,
        "key": site.key,
        "value": site.value,
        "mask": site.mask,
        "precision": site.form,
    }
    listed = "".join(f"<dt>{term}</dt><dd>{escape(str(fact))}</dd>" for term, fact in facts.items())
    if site.reasons:
        reasons = "".join(f"<li>{escape(text)}</li>" for text in site.reasons)
        listed += f"<dt>reasons</dt><dd><ul>{reasons}</ul></dd>"
    return (
        f'<li data-site="{index}" data-decision="{escape(decided)}" data-reasons="{escape(kinds)}">'
        f'<details class="site {look.classes[decided]}"><summary class="row" style="--depth:{depth}">'
        f'<span class="name">{escape(name)}</span><span class="badge">{escape(decided)}</span>'
        f'<span class="inputs mono">{escape(f"{query}, {site.mask}")}</span>{bars}</summary>'
        f'<dl style="--depth:{depth}">{listed}</dl></details></li>'
    )


def _error_bar(site: Site, look: Look) -> str:
    if site.rel_l2 is None:
        return "<span></span>"
    part = _part(site.rel_l2, look.largest_error)
    return f'<span class="bar" title="relative L2 error"><i style="--part:{part:.1%}"></i><b>{site.rel_l2:.4f}</b></span>'


def _speedup_bar(site: Site, look: Look) -> str:
    """With a mark where the kernel would be as fast as SDPA."""
    if site.speedup is None:
        return "<span></span>"
    part, mark = _part(site.speedup, look.largest_speedup), 1 / look.largest_speedup
    kind = "faster" if site.speedup >= 1 else "slower"
    return (
        f'<span class="bar {kind}" title="SDPA\'s time over the kernel\'s">'
        f'<i style="--part:{part:.1%};--mark:{mark:.1%}"></i><b>{site.speedup:.2f}x</b></span>'
    )


def _part(value: float, largest: float) -> float:
    """How long a bar is; an error of NaN or infinity fills it."""
    if not isfinite(value):
        return 1.0
    return value / largest if largest > 0 else 0.0
