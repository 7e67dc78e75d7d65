"""The example in patterns/README.md: it is a pattern, it is found, and it keeps to the rules for imports."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.graph.call import Pattern
from sage_inductor.rewriting import found
from sage_inductor.testing import RewritingBackend, relative_l2

ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").exists())
sys.path.append(str(ROOT / "tools"))

import import_graph  # noqa: E402

(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "patterns" / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def library() -> Iterator[None]:
    """`torch.ops.mylib.attention`, as a library might register it."""
    lib = torch.library.Library("mylib", "FRAGMENT")
    lib.define("attention(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor")

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        return out.clone(memory_format=torch.preserve_format)

    lib.impl("attention", attention, "CompositeExplicitAutograd")
    torch.library.register_fake("mylib::attention", lambda q, k, v, causal: torch.empty_like(q), lib=lib)
    yield
    lib._destroy()


def pattern() -> Pattern:
    namespace: dict[str, Any] = {}
    exec(EXAMPLE, namespace)
    example: Pattern = namespace["MyLibAttention"]()
    return example


@pytest.mark.usefixtures("inference", "library")
def test_the_example_finds_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "ALL", (*found.ALL, pattern()))
    for function, inputs in pattern().examples():
        backend = RewritingBackend(Config(kernel="reference", precision="accurate"))
        out = torch.compile(function, backend=backend)(*inputs)
        expected = function(*inputs)
        (site,) = backend.sites
        assert site.rewritten and site.pattern == "mylib" and site.mask == "causal", site
        assert 0 < relative_l2(out, expected) < 0.013 and out.stride() == expected.stride()


@pytest.mark.usefixtures("inference")
def test_the_example_leaves_other_calls_alone() -> None:
    assert all(
        pattern().match(node) is None
        for node in torch.fx.symbolic_trace(lambda q: torch.softmax(q, -1)).graph.nodes
    )


def test_the_example_keeps_to_the_rules_for_imports() -> None:
    names = [name for name, _ in import_graph.imported_names(EXAMPLE, "sage_inductor.patterns.mylib", False)]
    assert {name.split(".")[0] for name in names} <= {"sage_inductor", "torch", *sys.stdlib_module_names}
    own = {name.split(".")[1] for name in names if name.startswith("sage_inductor.")}
    assert own <= {"graph", "patterns"}
