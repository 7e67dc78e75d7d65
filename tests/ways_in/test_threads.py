"""`explain` and `calibrate` in several threads, and beside threads that compile and run the same code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sage_inductor

IN_THREADS = Path(__file__).parent.parent / "helpers" / "in_threads.py"
CONFIG = sage_inductor.Config(kernel="reference")


def test_no_run_ends_the_process() -> None:
    """All kinds in one: shared code, separate models, beside a running model."""
    command = [sys.executable, str(IN_THREADS), "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("none ended") == 6


def attention(query: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query)


def test_a_compiled_model_can_be_explained_any_number_of_times(inference: None) -> None:
    """Each look at it would leave an entry, and eight of them be the limit of recompiles."""
    x, compiled_for = torch.randn(1, 2, 8, 8), []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        compiled_for.append(example_inputs)
        return graph_module.forward

    compiled = torch.compile(attention, backend=backend, dynamic=False)
    compiled(x)
    for _ in range(10):
        assert len(sage_inductor.explain(attention, x, config=CONFIG).rewritten) == 1
    assert len(compiled_for) == 1
    compiled(x)
    assert len(compiled_for) == 1  # its entry is still there
    for length in range(9, 16):  # and there is room for seven others, as if nobody had looked
        compiled(torch.randn(1, 2, length, 8))
    assert len(compiled_for) == 8
