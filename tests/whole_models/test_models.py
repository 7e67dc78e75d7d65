"""Real models of transformers and diffusers, tiny: every attention is found, judged and replaced as expected.

Here the graphs that Dynamo captures are rewritten and then run eagerly, which covers the whole pass and the
operator without the minutes that Inductor's C++ compiler would take; test_models_inductor.py compiles some of
the models with backend="sage_inductor".
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import BY_NAME, CASES, ModelCase, instantiate
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from sage_inductor import Config, explain, sage_attention
from sage_inductor.graph.origin import module_path
from sage_inductor.operators import inference as ops
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import relative_l2

for package in ("transformers", "diffusers"):
    pytest.importorskip(package)

# With K's mean alone: the factors that even channels are those of all queries that share a key head, which the models' own calls,
# whose key heads are repeated, do not say. Other factors round other numbers, and two roundings lie .01 apart.
REFERENCE = Config(kernel="reference", smoothing="mean")
# What others show as well: "llama", "bert padded" and "qwen_image padded", the joint attention of Flux beside CogVideoX's
# call, and Llama's grouped heads.
SLOW = ("llama without cache", "bert", "qwen_image", "sd3", "qwen3")
# Error of the model's output as a share of what its attention contributes: ||output - exact|| over
# ||exact - the output with attention zeroed||, so that a large exact residual hides nothing. "fast" is within
# .04 (relative L2) at each attention, and errors of several attentions are independent and average out like
# their contributions do. Measured: .009 to .041, the last for an output of 256 numbers.
BOUND = 0.04


def bound(output: Tensor) -> float:
    """BOUND for an output of this size: the error of n numbers is an estimate that strays by 1 / sqrt(2 n) of
    itself; three times that."""
    return BOUND * (1 + 3 / math.sqrt(2 * output.numel()))


# A mask that is dropped, or values in another order than their keys, in one attention out of 2 to 8.
# Measured: .08 to .83, except where the attention reaches the output through a few text tokens only.
PLANTED = 1.5 * BOUND
FAINT = "context_embedder.token_refiner.refiner_blocks.0.attn"
# Relative L2 error against the same model run eagerly with the oracle in place of SDPA: float32 rounding,
# which could turn a rounding to 8 bits the other way. Measured: below 5e-6.
ORACLE_BOUND = 1e-3


class SdpaCalls(TorchFunctionMode):
    """Counts the SDPA calls of an eager run. Those that `eligible` says True of go to `serve`, if given."""

    def __init__(
        self, serve: Callable[..., Any] | None = None, eligible: Iterable[bool] = itertools.repeat(True)
    ) -> None:
        super().__init__()
        self.serve = serve
        self.eligible = iter(eligible)
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.calls += 1
            if self.serve is not None and next(self.eligible):
                function = self.serve
        return function(*args, **(kwargs or {}))


def quantised(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The oracle for the arguments of SDPA. A bool mask that turns out to be one over keys, alone or beside causality, is given
    as such, as the rewriting does: keys that it rules out do not count in what is subtracted from K and V."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
        keys = allowed.any(-2, keepdim=True)[:, :1]
        for causal in (False, True):
            known = keys & torch.ones(allowed.shape[-2:], dtype=torch.bool).tril() if causal else keys
            if torch.equal(known.expand_as(allowed), allowed):
                attn_mask, is_causal = keys, causal
                break
    output: Tensor = ops.attention(
        query, key, value, attn_mask, is_causal,
        scale=scale, enable_gqa=enable_gqa, kernel_name="reference", smoothing="mean",
    )  # fmt: skip
    return output


def nothing(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(F.scaled_dot_product_attention(*args, **kwargs))


class Recorder:
    """A Dynamo backend that rewrites as `config` says (None: not at all) and runs the graphs eagerly."""

    def __init__(self, config: Config | None) -> None:
        self.config = config
        self.graphs: list[fx.GraphModule] = []
        self.sites: list[Site] = []
        self.captured = 0  # calls of SDPA, as Dynamo has captured them

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        self.captured = len(self.nodes(F.scaled_dot_product_attention))
        if self.config is not None:
            self.sites.extend(rewrite_graph(graph_module.graph, self.config))
            graph_module.recompile()
        return lambda *args: graph_module(*args)  # a graph that is changed later runs as changed

    def nodes(self, target: Any) -> list[fx.Node]:
        """Of all graphs and their subgraphs: a search that owes nothing to the package's own."""
        modules = {module for graph in self.graphs for module in graph.modules()}
        graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
        return [node for graph in graphs for node in graph.nodes if node.target is target]


@dataclass
class Outcome:
    """One model: eager; with the oracle for SDPA; with 0 for SDPA; rewritten."""

    case: ModelCase
    calls: int
    exact: Tensor
    oracle: Tensor
    without: Tensor
    recorder: Recorder
    breaks: int
    output: Tensor
    rerun: Callable[[], Tensor]

    def error(self, output: Tensor) -> float:
        """As a share of what attention contributes."""
        return ((output - self.exact).norm() / (self.without - self.exact).norm()).item()


def run(case: ModelCase, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The first tensor of the output. The same random numbers and an unused cache every time."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(case.gradients):
        output = model(**copy.deepcopy(inputs))
    while not isinstance(output, Tensor):
        output = output[0]
    return output.detach()


def compiled_run(
    case: ModelCase, model: nn.Module, inputs: dict[str, Any], backend: Any
) -> tuple[Tensor, int, Callable[[], Tensor]]:
    """The output, the number of graph breaks, and the same run again."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    output = run(case, compiled, inputs)
    return output, sum(counters["graph_break"].values()), lambda: run(case, compiled, inputs)


@pytest.fixture(autouse=True)
def new_process() -> None:
    """Instead of that of conftest.py: what is compiled once for a model runs again in its other tests."""
    torch.manual_seed(0)


@pytest.fixture(
    scope="module",
    # What is compiled once serves all tests of a model: they run in one worker.
    params=[
        pytest.param(
            case,
            marks=[pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if case.name in SLOW else [])],
        )
        for case in CASES
    ],
    ids=lambda case: case.name.replace(" ", "_"),
)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    case: ModelCase = request.param
    model, inputs = instantiate(case)
    with SdpaCalls() as counted:
        exact = run(case, model, inputs)
    eligible = [attention.reason is None for attention in case.sites.values()]
    with SdpaCalls(quantised, eligible):
        oracle = run(case, model, inputs)
    with SdpaCalls(nothing):
        without = run(case, model, inputs)
    recorder = Recorder(REFERENCE)
    output, breaks, rerun = compiled_run(case, model, inputs, recorder)
    return Outcome(
        case=case,
        calls=counted.calls,
        exact=exact,
        oracle=oracle,
        without=without,
        recorder=recorder,
        breaks=breaks,
        output=output,
        rerun=rerun,
    )


def test_every_attention_is_found(outcome: Outcome) -> None:
    assert outcome.recorder.captured == outcome.calls
    assert [site.name for site in outcome.recorder.sites] == list(outcome.case.sites)
    assert len(outcome.case.sites) == outcome.calls


def test_every_attention_is_judged_rightly(outcome: Outcome) -> None:
    for site, expected in zip(outcome.recorder.sites, outcome.case.sites.values(), strict=True):
        assert site.mask == expected.mask, site
        assert site.rewritten == (expected.reason is None), site
        if expected.reason is None:
            assert (site.kernel, site.reasons) == ("reference", ())
        else:
            (reason,) = site.reasons
            assert reason.startswith(expected.reason)


def test_the_graph_holds_what_the_report_says(outcome: Outcome) -> None:
    rewritten = sum(attention.reason is None for attention in outcome.case.sites.values())
    assert len(outcome.recorder.nodes(ops.attention)) == rewritten
    left = outcome.recorder.nodes(F.scaled_dot_product_attention)
    assert len(left) == len(outcome.case.sites) - rewritten


def test_the_source_is_the_line_that_calls_sdpa(outcome: Outcome) -> None:
    for site, expected in zip(outcome.recorder.sites, outcome.case.sites.values(), strict=True):
        file, _, line = site.source.partition(":")
        assert file == Path(expected.source).name
        assert any(int(line) in lines for lines in sdpa_lines(expected.source)), site.source


@cache
def sdpa_lines(source: str) -> tuple[range, ...]:
    """The lines of each SDPA call in an installed file, given as "package/.../file.py"."""
    package, _, path = source.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / path).read_text())
    return tuple(
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "scaled_dot_product_attention"
    )


def test_no_graph_break_is_added(outcome: Outcome) -> None:
    """One graph with the backend: Dynamo traces before a backend sees anything, and has one without it too."""
    assert (len(outcome.recorder.graphs), outcome.breaks) == (1, 0)


def test_the_output_is_within_the_bound(outcome: Outcome) -> None:
    if not outcome.recorder.nodes(ops.attention):
        model, inputs = instantiate(outcome.case)
        assert torch.equal(outcome.output, compiled_run(outcome.case, model, inputs, Recorder(None))[0])
        return
    assert outcome.error(outcome.output) < bound(outcome.output)
    assert relative_l2(outcome.output, outcome.oracle) < ORACLE_BOUND


def test_the_bounds_would_notice_one_wrong_attention(outcome: Outcome) -> None:
    for node in outcome.recorder.nodes(ops.attention):
        with planted_mistake(node):
            wrong = outcome.rerun()
        name = module_path(node)
        assert relative_l2(wrong, outcome.oracle) > 3 * ORACLE_BOUND, name
        assert outcome.error(wrong) > PLANTED or name == FAINT, name
    assert torch.equal(outcome.rerun(), outcome.output)


@contextmanager
def planted_mistake(node: fx.Node) -> Iterator[None]:
    """The mask of this attention dropped; where it has none, its values in another order than its keys."""
    graph, args, kwargs = node.graph, node.args, node.kwargs
    mask_options = {"is_causal", "window_left", "window_right"}
    reordered = None
    if len(args) > 3 or mask_options & kwargs.keys():
        node.args = args[:3]
        node.kwargs = {name: value for name, value in kwargs.items() if name not in mask_options}
    else:
        with graph.inserting_before(node):
            reordered = graph.call_method("flip", (args[2], -2))
        node.args = (*args[:2], reordered)
    graph.owning_module.recompile()
    yield
    node.args, node.kwargs = args, kwargs
    if reordered is not None:
        graph.erase_node(reordered)
    graph.owning_module.recompile()


def told_of_rows(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The oracle, which takes what a mask over keys hides out of the statistics of K, told of masks that are one row."""
    if attn_mask is not None and bool((attn_mask == attn_mask[..., :1, :]).all()):
        attn_mask = attn_mask[..., :1, :]
    out = sage_attention(*args, attn_mask=attn_mask, kernel="reference", smoothing="mean", **kwargs)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("name", ["llama", "bert padded"])
def test_one_dynamic_graph_serves_every_length(name: str) -> None:
    """What a mask means is seen at symbolic lengths, too."""
    model, inputs = instantiate(BY_NAME[name])
    recorder = Recorder(REFERENCE)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for length in (9, 33, 40):
        cut = {key: value[:, -length:].contiguous() for key, value in inputs.items()}
        with SdpaCalls(told_of_rows):
            oracle = run(BY_NAME[name], model, cut)
        output = run(BY_NAME[name], compiled, cut)
        assert relative_l2(output, oracle) < ORACLE_BOUND
    assert len(recorder.graphs) == 1 and all(site.rewritten for site in recorder.sites)


def test_explain_says_the_same() -> None:
    case = BY_NAME["gemma3"]
    model, inputs = instantiate(case)
    with torch.no_grad():
        report = explain(model, **inputs, config=REFERENCE)
    assert report.graphs == 1
    assert {site.name: site.mask for site in report.rewritten} == {
        name: attention.mask for name, attention in case.sites.items()
    }
    for text in ("model.layers.0.self_attn", "sdpa_attention.py:", "sliding_window", "2 rewritten"):
        assert text in str(report)


def test_include_selects_by_module_path() -> None:
    case = BY_NAME["wan"]
    model, inputs = instantiate(case)
    with torch.no_grad():
        report = explain(model, **inputs, config=Config(kernel="reference", include=("blocks.*.attn1",)))
    assert [site.name for site in report.rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert {site.reasons for site in report.refused} == {
        (f"site=blocks.{block}.attn2 (include: blocks.*.attn1)",) for block in range(2)
    }
