"""Real models compiled with `torch.compile(model, backend="sage_inductor")`.

What test_models.py checks on graphs that run eagerly, here through all of Inductor, for one model of each
kind: a C++ compile takes seconds.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from models import BY_NAME, ModelCase, instantiate, unet
from test_models import SdpaCalls, bound, nothing, quantised, run
from torch._dynamo.utils import counters

from sage_inductor import NotEligibleError
from sage_inductor.testing import relative_l2

OPTIONS = {"sage.kernel": "reference"}


# What is in a group starts before what is in none, so that no worker is left with these at the end.
pytestmark = [pytest.mark.usefixtures("fresh_compile"), pytest.mark.xdist_group("compiled models")]

CASES = [
    pytest.param(case, id=case.name, marks=[] if case.name == "bert padded" else [pytest.mark.slow])
    for case in (
        BY_NAME["bert padded"],
        # slow: tests/integrations/test_transformers_models.py compiles Mistral, which has its layers
        BY_NAME["llama"],
        # slow: examples/wan_video.py is always compiled so, by tests/examples
        BY_NAME["wan"],
        # slow: 24 s, nearly all in Inductor for its convolutions; test_models.py rewrites and runs it eagerly
        replace(BY_NAME["unet"], build=partial(unet, attention="")),
    )
]


@pytest.mark.parametrize("case", CASES)
def test_compiled_models(case: ModelCase) -> None:
    model, inputs = instantiate(case)
    exact = run(case, model, inputs)
    with SdpaCalls(quantised):
        oracle = run(case, model, inputs)
    with SdpaCalls(nothing):
        without = run(case, model, inputs)
    # Not one attention may stay; smoothed as the oracle's are.
    options: dict[str, Any] = {**OPTIONS, "sage.fallback": "error", "sage.smoothing": "mean"}
    compiled = torch.compile(model, backend="sage_inductor", options=options, fullgraph=True)
    output = run(case, compiled, inputs)
    # Inductor's own kernels round otherwise than eager ones, by 3e-7 here. A value beside a rounding step
    # then goes the other way, which moves all that the next attention rounds: the oracle itself, at inputs
    # changed by 1e-7, differs by a quarter of its error (Wan). So the error has the size of the oracle's, not
    # its digits.
    error, oracle_error = relative_l2(output, exact), relative_l2(oracle, exact)
    assert error == pytest.approx(oracle_error, rel=0.2)
    assert relative_l2(output, oracle) < 0.6 * oracle_error
    assert (output - exact).norm() / (without - exact).norm() < bound(output)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_model_that_must_not_fall_back_says_where_it_would() -> None:
    model, inputs = instantiate(BY_NAME["llama decode step"])
    options: dict[str, Any] = {**OPTIONS, "sage.fallback": "error"}
    compiled = torch.compile(model, backend="sage_inductor", options=options)
    sites = r"layers\.0\.self_attn: q_len=1 .*layers\.1\.self_attn: q_len=1"
    with pytest.raises(NotEligibleError, match=sites):
        run(BY_NAME["llama decode step"], compiled, inputs)
