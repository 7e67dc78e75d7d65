"""The records of a report: an attention of the model with its inputs, and code that is none but looks or acts like one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from sage_inductor.graph.origin import ROOT
from sage_inductor.graph.places import Place
from sage_inductor.graph.sizes import known, memory_order
from sage_inductor.kernels.copies import copies_bytes
from sage_inductor.measurement.printable import printable_line


@dataclass(frozen=True)
class TensorInfo:
    """Shape (symbolic sizes as text), dtype and memory layout ("HND", "NHD", or the strides) of an input. Of a DTensor, those of
    the part that a kernel on this rank reads."""

    shape: tuple[int | str, ...]
    dtype: str
    layout: str
    placements: str = ""
    """Of a DTensor, where the model has it: "dp=4: S(0), tp=2: R" is sharded by dim 0 over four, and replicated over two."""

    @classmethod
    def of(cls, tensor: Tensor, placements: str = "") -> TensorInfo:
        shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
        return cls(shape, str(tensor.dtype).removeprefix("torch."), layout_of(tensor), placements)

    def __str__(self) -> str:
        placed = f" of {self.placements}" if self.placements else ""
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}{placed}"


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    `name` is the module path, "blocks.0.attn1"; "#2" marks a second call in the same module. `source` is the line that made
    the call, "model.py:123". `rewritten` is true where `kernel` replaces the attention; else `reasons` has everything that
    spoke against it.
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
    smoothing: str = "auto"
    """What is done to Q and K before they are rounded (`Config.smoothing`)."""
    skip_threshold: float = 0.0
    """The weight, as a part of the largest one, below which whole tiles are left out (`Config.skip_threshold`)."""
    skip_by: str = "scores"
    """What decides about that (`Config.skip_by`)."""
    skipped: float | None = None
    """The share of tiles that this leaves out on sample inputs, from a plan."""
    precision_was_open: bool = False
    """Whether precision="auto" was asked for, so that `precision` is the fastest that the device has."""
    places: tuple[Place, ...] = ()
    """The module of this path, and others that run the same code: blocks that are compiled one by one share a graph."""

    @property
    def serves(self) -> tuple[str, ...]:
        """The paths of all modules that run this code, `module` among them."""
        return tuple(place.path for place in self.places) or (self.module,)

    @property
    def compiled(self) -> tuple[str, ...]:
        """The paths of the modules that were compiled, with this one in them; empty where that is the whole model."""
        return tuple(place.compiled for place in self.places if place.compiled != ROOT)

    def copies_bytes(self) -> int | None:
        """The memory that copies in 8 bits take while this attention runs (kernels/copies.py); None where sizes are symbolic."""
        if self.query is None or self.key is None or self.value is None:
            return None
        shapes = [_known(tensor.shape) for tensor in (self.query, self.key, self.value)]
        query, key, value = shapes
        if query is None or key is None or value is None:
            return None
        return copies_bytes(query, key, value[-1], self.precision, smoothing=self.smoothing)

    @property
    def form(self) -> str:
        """How it is rounded, and what is left out: "fast", or "fast, smoothing=mean, skip_threshold=0.01 by a sample (24% of tiles)"."""
        form = self.precision if self.smoothing == "auto" else f"{self.precision}, smoothing={self.smoothing}"
        if self.skip_threshold:
            form += f", skip_threshold={self.skip_threshold:g}"
            form += "" if self.skip_by == "scores" else f" by a {self.skip_by}"
            form += "" if self.skipped is None else f" ({self.skipped:.0%} of tiles)"
        return form

    @property
    def title(self) -> str:
        """The name, with how many other modules run this code."""
        others = len(self.serves) - 1
        return f"{self.name} and {others} more" if others else self.name

    def __str__(self) -> str:
        decision = f"{self.kernel} ({self.form})" if self.rewritten else "SDPA: " + "; ".join(self.reasons)
        return printable_line(f"{self.name} at {self.source}: {decision}")  # for logs and warnings


@dataclass(frozen=True)
class Unread:
    """Code that looks like attention written out by hand, in a form that is not known. It stays as it is."""

    module: str
    """The module path ("blocks.0.attn1")."""
    source: str
    """The line of the product with the values ("model.py:123")."""
    obstacle: str
    """The unknown part: "scores=tanh between product and softmax (known: ...)"."""
    code: str = ""
    """The text of that line, where its file is at hand."""

    def __str__(self) -> str:
        return printable_line(f"{self.module} at {self.source}: {self.obstacle}")


@dataclass(frozen=True)
class AttentionOperator:
    """A registered operator that computes attention by itself. It stays as it is."""

    module: str
    """The module path ("blocks.0.attn1")."""
    source: str
    """The line that calls it ("model.py:123")."""
    operator: str
    """ "vllm::unified_attention"; "sage_inductor::attention" is this package's own."""
    code: str = ""
    """The text of that line, where its file is at hand."""

    @property
    def is_own(self) -> bool:
        return self.operator.startswith("sage_inductor::")

    def __str__(self) -> str:
        known = " (8-bit attention already)" if self.is_own else ""
        return printable_line(f"{self.module} at {self.source}: {self.operator}{known}")


def layout_of(tensor: Tensor) -> str:
    """ "HND" or "NHD", the order of a `[batch, heads, seq, head_dim]` tensor in memory; its strides where head_dim is not
    innermost. Batch, or batch and heads, may be missing."""
    if tensor.dim() not in (2, 3, 4) or known(tensor.stride(-1)) != 1:
        return f"strides {tuple(tensor.stride())}"
    if tensor.dim() == 2:
        return "HND"
    *_, heads, seq, _ = range(tensor.dim())
    order = memory_order(tensor)
    return "NHD" if order.index(seq) < order.index(heads) else "HND"


def _known(shape: tuple[int | str, ...]) -> tuple[int, ...] | None:
    """`shape` where all of its sizes are numbers, and it is one of `[batch, heads, seq, head_dim]` or fewer dims."""
    sizes = tuple(size for size in shape if isinstance(size, int))
    return sizes if len(sizes) == len(shape) and 2 <= len(sizes) <= 4 else None


class Names:
    """Gives sites their names, in order. A name that occurs again gets "#2", "#3" behind it."""

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
    """The same sites with names that differ; sites of several graphs may share one before."""
    names = Names()
    return tuple(replace(site, name=names.next(site.module or site.name)) for site in sites)
