"""What was decided for every attention of a model, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

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

    def __str__(self) -> str:
        decision = (
            f"{self.kernel} ({self.precision})" if self.rewritten else "SDPA: " + "; ".join(self.reasons)
        )
        return f"{self.name} at {self.source}: {decision}"


@dataclass(frozen=True)
class Report:
    """All sites of one model, in the order of execution. `str(report)` is a table, `to_json()` the same as
    data."""

    sites: tuple[Site, ...] = field(default_factory=tuple)
    graphs: int = 1
    """Graphs that Dynamo made of the model: 1 means that nothing broke it."""
    missing: tuple[str, ...] = ()
    """Sites of the plan that the model does not have."""

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def refused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.rewritten)

    def to_json(self, indent: int | None = 2) -> str:
        """`{"graphs": n, "rewritten": n, "refused": n, "missing": [name, ...], "sites": [{name, source, pattern,
        query, ...}, ...]}`."""
        data = {
            "graphs": self.graphs,
            "rewritten": len(self.rewritten),
            "refused": len(self.refused),
            "missing": list(self.missing),
            "sites": [asdict(site) for site in self.sites],
        }
        return json.dumps(data, indent=indent)

    def __str__(self) -> str:
        missing = (
            f"\nthe plan has sites that the model lacks: {', '.join(self.missing)}" if self.missing else ""
        )
        if not self.sites:
            return f"no attention found in {self.graphs} graph(s)" + missing
        header = ("site", "source", "pattern", "query", "key", "mask", "kernel", "reasons")
        rows = [header] + [
            (
                site.name,
                site.source,
                site.pattern,
                str(site.query or "?"),
                "x".join(map(str, site.key.shape)) if site.key else "?",
                site.mask,
                f"{site.kernel} {site.precision}" if site.rewritten else "SDPA",
                "; ".join(site.reasons),
            )
            for site in self.sites
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{len(self.sites)} attention(s): {len(self.rewritten)} rewritten, {len(self.refused)} left; "
            f"{self.graphs} graph(s)"
        )
        return "\n".join(lines) + missing


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
        self._given: Counter[str] = Counter()

    def next(self, name: str) -> str:
        self._given[name] += 1
        count = self._given[name]
        return name if count == 1 else f"{name}#{count}"


def unique_names(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The same sites, of several graphs, with names of their own."""
    names = Names()
    return tuple(replace(site, name=names.next(site.name.partition("#")[0])) for site in sites)
