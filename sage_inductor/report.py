"""What was decided for every attention of a model, and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Shape (symbolic sizes as text), dtype and memory layout ("HND", "NHD", or the strides) of an input."""

    shape: tuple[int | str, ...]
    dtype: str
    layout: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
        return cls(shape, str(tensor.dtype).removeprefix("torch."), layout_of(tensor))

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    `name` is the module path ("blocks.0.attn1"; "#2" marks a second call in the same module), `source` the
    line that made the call ("model.py:123"). `rewritten` is true when `kernel` takes the place of what was
    there; else `reasons` says all that spoke against it.
    """

    name: str
    source: str
    pattern: str
    query: TensorInfo | None
    key: TensorInfo | None
    value: TensorInfo | None
    mask: str
    kernel: str | None
    precision: str
    rewritten: bool
    reasons: tuple[str, ...] = ()
    code: str = ""
    """The text of that line, where its file is at hand."""
    speedup: float | None = None
    """SDPA's time over the kernel's, quantisation included, as measured on this GPU while compiling."""
    rel_l2: float | None = None
    """Relative L2 error of the kernel's output against SDPA's on sample inputs, from a plan."""
    module: str = ""
    """The module path alone, which several calls may share."""

    def __str__(self) -> str:
        decision = (
            f"{self.kernel} ({self.precision})" if self.rewritten else "SDPA: " + "; ".join(self.reasons)
        )
        return f"{self.name} at {self.source}: {decision}"


@dataclass(frozen=True)
class Unread:
    """What looks like attention written out by hand but is in no form that is known: it stays as it is."""

    module: str
    """The module path ("blocks.0.attn1")."""
    source: str
    """The line of the product with the values ("model.py:123")."""
    obstacle: str
    """What stands in the way, with its value: "scores=tanh between product and softmax (known: ...)"."""
    code: str = ""
    """The text of that line, where its file is at hand."""

    def __str__(self) -> str:
        return f"{self.module} at {self.source}: {self.obstacle}"


@dataclass(frozen=True)
class Report:
    """All sites of one model, in the order of execution. `str(report)` is a table, `to_json()` the same as
    data, `to_html()` a page to look at."""

    sites: tuple[Site, ...] = field(default_factory=tuple)
    graphs: int = 1
    """Graphs that Dynamo made of the model: 1 means that nothing broke it."""
    missing: tuple[str, ...] = ()
    """Sites of the plan that the model does not have."""
    unread: tuple[Unread, ...] = ()
    """What looks like attention and is no site."""

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def refused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.rewritten)

    def to_json(self, indent: int | None = 2) -> str:
        """`{"graphs": n, "rewritten": n, "refused": n, "missing": [name, ...], "unread": [{module, source, obstacle,
        code}, ...], "sites": [{name, source, pattern, query, ...}, ...]}`."""
        data = {
            "graphs": self.graphs,
            "rewritten": len(self.rewritten),
            "refused": len(self.refused),
            "missing": list(self.missing),
            "unread": [asdict(item) for item in self.unread],
            "sites": [asdict(site) for site in self.sites],
        }
        return to_json(data, indent)

    def to_html(self, title: str = "Attention report") -> str:
        """One self-contained page: the module tree, each site coloured by its decision, with filters and, where
        there are measurements, bars. Needs no network, and no script to be read."""
        from sage_inductor.html import page

        return page(self, title)

    def __str__(self) -> str:
        if not self.sites:
            return self.summary()
        header = ("site", "source", "pattern", "query", "key", "mask", "kernel", "reasons")
        rows = [
            (
                site.name,
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
        return f"{plain_table(header, rows)}\n{self.summary()}"

    def summary(self) -> str:
        """One line: how many sites, rewritten and left, in how many graphs; more where the plan has sites that the model
        lacks, and where something looks like attention and is no site."""
        if self.sites:
            found = (
                f"{len(self.sites)} attention(s): {len(self.rewritten)} rewritten, {len(self.refused)} left; "
                f"{self.graphs} graph(s)"
            )
        else:
            found = f"no attention found in {self.graphs} graph(s)"
        return "\n".join([found, *([self.plan_mismatch()] if self.missing else []), *self.unread_lines()])

    def unread_lines(self) -> list[str]:
        """What looks like attention and is no site, a line each, under a heading; empty where there is none."""
        return ["not recognised, and left as it is:", *map(str, self.unread)] if self.unread else []

    def plan_mismatch(self) -> str:
        """The sites of the plan that the model lacks; empty where it has them all."""
        return f"the plan has sites that the model lacks: {', '.join(self.missing)}" if self.missing else ""


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned with spaces, the header underlined."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def to_json(data: Any, indent: int | None = 2) -> str:
    """JSON in which a number that is NaN or infinite is text, "nan" or "inf": JSON has none such."""
    return json.dumps(_json_value(data), indent=indent, allow_nan=False)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decision(site: Site) -> str:
    if not site.rewritten:
        return "SDPA"
    measured = "" if site.speedup is None else f" {site.speedup:.2f}x"
    return f"{site.kernel} {site.precision}{measured}"


def layout_of(tensor: Tensor) -> str:
    """ "HND" or "NHD" for the memory of a `[batch, heads, seq, head_dim]` tensor, else its strides."""
    if tensor.dim() == 4 and isinstance(tensor.stride(-1), int) and tensor.stride(-1) == 1:
        heads, seq = tensor.stride(1), tensor.stride(2)
        return "NHD" if seq > heads else "HND"
    if tensor.dim() in (2, 3):
        return "HND"
    return f"strides {tuple(tensor.stride())}"


class Names:
    """Gives sites their names, in order: "#2", "#3" behind a name that occurs again."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._given: set[str] = set()

    def next(self, name: str) -> str:
        while True:
            self._calls[name] += 1
            numbered = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
            if numbered not in self._given:  # by a module that is called "attn#2"
                self._given.add(numbered)
                return numbered


def unique_names(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The same sites, of several graphs, with names of their own."""
    names = Names()
    return tuple(replace(site, name=names.next(site.module or site.name)) for site in sites)
