"""The model table: what the pass makes of tiny models of transformers, diffusers and timm.

`python tests/helpers/model_table.py` writes docs/models.md. The sections of families that are not installed (timm needs
torchvision, which CPU builds of torch 2.13 do not go with) are kept from the file as it is.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from zoo import FAMILIES, Entry, entries

from sage_inductor import Config
from sage_inductor.operators import inference as ops
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import max_error, relative_l2

DOC = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = """\
# Models

What `backend="sage_inductor"` finds in tiny, randomly initialised models, with `kernel="reference"` in `fast` precision on a
CPU. Written by `python tests/helpers/model_table.py`; `tests/whole_models/test_model_table.py` checks a part of it.

- attention: sites found; 8-bit: rewritten. Others stay for the reason given.
- left: calls of SDPA and softmaxes of rows of scores that remain in the graphs, refused sites among them (but not
  `nn.MultiheadAttention`'s one node).
- graph breaks: those of plain `torch.compile` are the same, always.
- exact: relative L2 error of the model's output against eager when every rewritten attention is computed without
  quantisation: what the rewriting itself changes (scales, masks, orders of heads), which must be rounding.
- error, max: relative L2 error and maximum error (of the largest value) of the output in 8 bits. Random weights let attention
  average noise: a trained model's errors are its own.
- share: the error as a share of what attention contributes to the output (its output without attention as the measure).
"""
COLUMNS = "model | attention is | attention | 8-bit | masks | left | graph breaks | exact | error | max | share | why not"


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture with one implementation of attention."""

    entry: Entry
    implementation: str
    sites: tuple[Site, ...]
    left: int
    breaks: int
    plain_breaks: int
    exact: float
    error: float
    maximum: float
    share: float | None

    @property
    def rewritten(self) -> int:
        return sum(site.rewritten for site in self.sites)

    def __str__(self) -> str:
        masks = Counter(site.mask for site in self.sites if site.rewritten)
        reasons = Counter(
            "; ".join(site.reasons).partition(" (")[0] for site in self.sites if not site.rewritten
        )
        why = [f"{reason} ({count})" for reason, count in reasons.items()]
        cells = [
            self.entry.name, self.implementation, len(self.sites), self.rewritten,
            ", ".join(f"{mask} ({count})" for mask, count in masks.items()), self.left, self.breaks,
            f"{self.exact:.0e}", f"{self.error:.4f}", f"{self.maximum:.4f}",
            "" if self.share is None else f"{self.share:.3f}",
            "; ".join([*why, *([self.entry.note] if self.entry.note else [])]),
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


class Recorder:
    """A Dynamo backend that rewrites as `config` says (None: not at all) and runs the graphs eagerly."""

    def __init__(self, config: Config | None) -> None:
        self.config = config
        self.graphs: list[fx.GraphModule] = []
        self.sites: list[Site] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.config is not None:
            self.sites.extend(rewrite_graph(graph_module.graph, self.config))
            graph_module.recompile()
        self.graphs.append(graph_module)
        return lambda *args: graph_module(*args)  # a graph that is changed later runs as changed

    def nodes(self) -> Iterator[fx.Node]:
        modules = {module for graph in self.graphs for module in graph.modules()}
        for module in modules:
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes

    def change(self, change: Callable[[fx.Node], None]) -> None:
        """Apply `change` to every rewritten attention."""
        for node in list(self.nodes()):
            if node.target is ops.attention:
                change(node)
        for graph in self.graphs:
            for module in graph.modules():
                if isinstance(module, fx.GraphModule):
                    module.recompile()


def unquantised(node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "kernel_name": "auto"}  # on a CPU: exact attention


def silenced(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        zero = node.graph.call_method("mul", (node, 0.0))
    node.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)


def draw_weights(model: nn.Module) -> None:
    """Normal weights that keep the variance of what passes through, so that attention shows in the output."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.numel() > 0:
                fan_in = 1 if isinstance(module, nn.Embedding) else parameter[0].numel()
                nn.init.normal_(parameter, std=fan_in**-0.5)
            elif name == "bias":
                nn.init.normal_(parameter, std=0.05)
            elif parameter.numel() > 0 and float(parameter.detach().abs().max()) < 1e-3:
                nn.init.ones_(parameter)  # a gate that starts closed


def run(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The first tensor of the output. The same random numbers every time."""
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    while not isinstance(output, Tensor):
        output = output.to_tuple()[0] if hasattr(output, "to_tuple") else output[0]
    return output.detach()


def compiled_run(model: nn.Module, inputs: dict[str, Any], recorder: Recorder) -> tuple[Tensor, int, Any]:
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend=recorder)
    return run(compiled, inputs), sum(counters["graph_break"].values()), compiled


def measure(entry: Entry, implementation: str) -> Row:
    torch.manual_seed(0)
    model, inputs = entry.build(implementation)
    draw_weights(model)
    model.eval()
    exact = run(model, inputs)
    recorder = Recorder(Config(kernel="reference"))
    output, breaks, compiled = compiled_run(model, inputs, recorder)
    left = sum(map(holds_scores, recorder.nodes()))
    recorder.change(unquantised)
    rewriting = relative_l2(run(compiled, inputs), exact)
    recorder.change(silenced)
    attention = (run(compiled, inputs).double() - exact.double()).norm()
    # Without a break here there is none in plain torch.compile: Dynamo traces before a backend sees anything.
    plain_breaks = compiled_run(model, inputs, Recorder(None))[1] if breaks else 0
    error = (output.double() - exact.double()).norm()
    share = float(error / attention) if float(attention) > 0 else None
    return Row(
        entry, implementation, tuple(recorder.sites), left, breaks, plain_breaks, rewriting,
        relative_l2(output, exact), max_error(output, exact), share,
    )  # fmt: skip


def holds_scores(node: fx.Node) -> bool:
    """Whether `node` is SDPA or a softmax over rows of scores (not that of a router or a classifier)."""
    if node.target is F.scaled_dot_product_attention:
        return True
    value = node.meta.get("example_value")
    is_method = node.op == "call_method" and node.target == "softmax"
    is_softmax = is_method or node.target in (F.softmax, torch.softmax)
    return is_softmax and isinstance(value, Tensor) and value.dim() >= 3 and node.op != "output"


def section(family: str) -> str:
    packages = [family, "torch"]
    title = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    lines = [f"## {title}", "", f"| {COLUMNS} |", "|" + "---|" * len(COLUMNS.split("|"))]
    for entry in entries(family):
        for implementation in entry.implementations:
            row = measure(entry, implementation)
            print(row, flush=True)
            lines.append(str(row))
    return "\n".join(lines) + "\n"


def kept(family: str, document: str) -> str:
    """The section of `family` in `document`, "" where it has none."""
    found = [part for part in document.split("## ")[1:] if part.startswith(f"{family} ")]
    return f"## {found[0].rstrip()}\n" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOC)
    parser.add_argument(
        "--family", choices=FAMILIES, action="append", help="measure these only, keep the others"
    )
    options = parser.parse_args()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    document = options.out.read_text() if options.out.exists() else ""
    sections = []
    for family in FAMILIES:
        try:
            wanted = family in (options.family or FAMILIES)
            sections.append(section(family) if wanted else kept(family, document))
        except ImportError as error:
            print(f"{family}: not measured ({error}); its section is kept", file=sys.stderr)
            sections.append(kept(family, document))
    options.out.write_text("\n".join([HEADER, *filter(None, sections)]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
