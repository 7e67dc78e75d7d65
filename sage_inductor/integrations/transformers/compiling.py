"""Who compiles the code that is being traced."""

from __future__ import annotations

from typing import Any

import torch

from sage_inductor.torch_internals.dynamo import traced_for
from sage_inductor.torch_internals.inductor import passes_of


def is_compiled_by_our_pass() -> bool:
    """Whether Dynamo traces for a backend or a pass of this package, which finds attention by itself."""
    return torch.compiler.is_compiling() and _traces_for_us()


def _reads_graphs(item: Any) -> bool:
    """A backend (a function or an object of this package), or a pass of ours with others behind it."""
    return str(getattr(item, "__module__", "")).partition(".")[0] == "sage_inductor"


def _traces_for_us() -> bool:
    backend = traced_for()
    return any(map(_reads_graphs, [backend, *passes_of(backend)]))


# Dynamo calls it while tracing, and takes the answer for a constant: code that is compiled by two backends is traced for each.
_traces_for_us._dynamo_marked_constant = True  # type: ignore[attr-defined]
