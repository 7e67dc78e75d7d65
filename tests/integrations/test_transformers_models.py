"""Real models of transformers with `attn_implementation="sage_inductor"`, against the library's own attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import _draw_weights
from torch import Tensor, nn

from sage_inductor import Config, integrations
from sage_inductor.integrations.transformers import attention
from sage_inductor.testing import RewritingBackend, relative_l2

pytest.importorskip("transformers")

from zoo import Entry, entries  # noqa: E402

REFERENCE = Config(kernel="reference", precision="accurate")
# Relative L2 error of the models' outputs. "accurate" has .013 at most at one attention (README), and a residual connection
# carries part of each output exactly; errors of several attentions know nothing of each other. Measured: .0007 to .0149, the
# last at outputs of a few hundred numbers.
BOUND = 0.02
# Attention function by model: how many calls are quantised, and how many are left to the model's own function. Sliding windows
# (mistral, gemma3_text), windows and softcaps (gemma2), sinks and windows (gpt_oss), chunks (llama4_text), heads of another size
# (deepseek_v3), position bias and cross attention (t5), a mask that is added by hand (bigbird_pegasus' encoder).
CALLS: dict[str, dict[str, int]] = {
    "llama": {"quantised": 2},
    "qwen3": {"quantised": 2},
    "mistral": {"quantised": 2},
    "gemma2": {"by_hand": 2},
    "gemma3_text": {"quantised": 2},
    "gpt_oss": {"quantised": 2},
    "llama4_text": {"quantised": 2},
    "deepseek_v3": {"quantised": 2},
    "gpt2": {"quantised": 2},
    "bert": {"quantised": 2},
    "t5": {"quantised": 3},
    "bigbird_pegasus": {"quantised": 2},
    "whisper": {"quantised": 4},
    "vit": {"quantised": 2},
    "llava": {"quantised": 4},
}
ENTRIES = {entry.name: entry for entry in entries("transformers")}
WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_oss")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integrations.transformers.register(REFERENCE)
    with torch.no_grad():
        yield
    integrations.transformers.unregister()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each way was taken."""
    counts: Counter[str] = Counter()
    for name in ("quantised", "by_hand", "by_library"):
        way = getattr(attention, f"_{name}")

        def counting(*args: Any, name: str = name, way: Any = way) -> Any:
            counts[name] += 1
            return way(*args)

        monkeypatch.setattr(attention, f"_{name}", counting)
    return counts


def build(entry: Entry, implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """The same weights and inputs for every implementation."""
    torch.manual_seed(0)
    model, inputs = entry.build(implementation)
    for module in model.modules():
        _draw_weights(module)
    if entry.name in WINDOWED:
        shorten_window(model, 8)
    return model.eval(), inputs


def shorten_window(model: Any, size: int) -> None:
    """Windows shorter than the inputs: those of the configurations are longer."""
    model.config.sliding_window = size
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = size


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The first output, at tokens that are no padding."""
    first: Tensor = next(value for value in model(**inputs).values() if isinstance(value, Tensor))
    mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    return first if mask is None else first[mask.bool()]


def bound(out: Tensor) -> float:
    """The error of n numbers is an estimate that strays by 1 / sqrt(2 n) of itself."""
    return BOUND * (1 + 3 / math.sqrt(2 * out.numel()))


@pytest.mark.parametrize("name", CALLS)
def test_eager(name: str, calls: Counter[str]) -> None:
    expected = output(*build(ENTRIES[name], "eager"))
    got = output(*build(ENTRIES[name], "sage_inductor"))
    assert calls == CALLS[name]
    error = relative_l2(got, expected)
    assert error <= bound(got)
    # Quantised attention was in it; by hand it is what it was.
    assert error > 1e-4 if "quantised" in calls else error == 0


class Graphs:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs.append(graph_module)
        return graph_module.forward

    def operators(self) -> int:
        nodes = (node for graph in self.graphs for node in graph.graph.nodes)
        return sum("sage_inductor.attention" in str(node.target) for node in nodes)


# Slow: a window is compiled below, and what the others have, causality, padding and cross attention, is in these.
@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "gpt_oss", "bert", "t5"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gpt2", "whisper", "vit")],
)
def test_compiled(name: str, new_process: Any) -> None:
    """By any backend: the operator is in as many graphs as there are with plain attention, and gives what it gives eagerly."""
    entry = ENTRIES[name]
    plain = Graphs()
    implementation = "sdpa" if "sdpa" in entry.implementations else "eager"
    output(torch.compile(build(entry, implementation)[0], backend=plain), build(entry, implementation)[1])
    new_process()
    expected = output(*build(entry, "sage_inductor"))
    backend = Graphs()
    model, inputs = build(entry, "sage_inductor")
    got = output(torch.compile(model, backend=backend), inputs)
    assert len(backend.graphs) == len(plain.graphs)
    assert backend.operators() == CALLS[name].get("quantised", 0)
    # Plain causality is a mask in eager mode where an input tells of padding, as here: the same numbers come out.
    assert relative_l2(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", pytest.param("t5", marks=pytest.mark.slow)])
def test_compiled_by_our_backend(name: str) -> None:
    """It finds what it finds in models that are set to "sdpa", or to "eager" where they have no SDPA: its options count."""
    entry = ENTRIES[name]
    plain = RewritingBackend(REFERENCE)
    implementation = "sdpa" if "sdpa" in entry.implementations else "eager"
    expected = output(
        torch.compile(build(entry, implementation)[0], backend=plain), build(entry, implementation)[1]
    )
    backend = RewritingBackend(REFERENCE)
    model, inputs = build(entry, "sage_inductor")
    got = output(torch.compile(model, backend=backend), inputs)
    facts = [[(site.name, site.pattern, site.mask, site.rewritten, site.reasons) for site in run.sites]
             for run in (plain, backend)]  # fmt: skip
    assert facts[0] == facts[1] and len(backend.graphs) == len(plain.graphs)
    assert relative_l2(got, expected) < 1e-5


def test_ours_is_asked_for_its_own_options() -> None:
    model, inputs = build(ENTRIES["llama"], "sage_inductor")
    backend = RewritingBackend(Config(kernel="reference", exclude=("*.0.self_attn",)))
    torch.compile(model, backend=backend)(**inputs)
    assert [site.rewritten for site in backend.sites] == [False, True]


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_padding_is_honoured(name: str) -> None:
    """What stands at padded positions changes nothing."""
    model, inputs = build(ENTRIES[name], "sage_inductor")
    mask = inputs["attention_mask"].bool()
    before = output(model, inputs)
    inputs["input_ids"] = torch.where(mask, inputs["input_ids"], 7)
    error = relative_l2(output(model, inputs), before)
    # Under a mask over keys, padding is in no scale and in no mean. Where each query has a mask of its own, it may move the
    # scales of what is seen: less than quantising errs. Measured: .004.
    assert error < (1e-6 if name == "bert" else BOUND / 2)


def test_a_missing_mask_function_would_show() -> None:
    """The tests above fail without it: transformers then hands no mask on, and says nothing."""
    from transformers.masking_utils import AttentionMaskInterface

    expected = output(*build(ENTRIES["llama"], "eager"))
    made = AttentionMaskInterface._global_mapping.pop("sage_inductor")
    try:
        got = output(*build(ENTRIES["llama"], "sage_inductor"))
    finally:
        AttentionMaskInterface.register("sage_inductor", made)
    assert relative_l2(got, expected) > 5 * BOUND


@pytest.mark.parametrize("backend", ["inductor", "sage_inductor"])
def test_compiled_by_inductor(backend: str, fresh_compile: None) -> None:
    """All the way: padding, a window, the order of the output in memory."""
    model, inputs = build(ENTRIES["mistral"], "sage_inductor")
    model.layers = model.layers[:1]
    model.config._attn_implementation = "eager"
    expected = output(model, inputs)
    model.config._attn_implementation = "sage_inductor"
    options = {f"sage.{name}": getattr(REFERENCE, name) for name in ("kernel", "precision")}
    compiled = torch.compile(model, backend=backend, options=options if backend == "sage_inductor" else None)
    got = output(compiled, inputs)
    assert 1e-4 < relative_l2(got, expected) <= bound(got)
