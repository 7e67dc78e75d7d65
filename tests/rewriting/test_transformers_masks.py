"""Masks as transformers' own functions make them, at symbolic lengths, and what is left of them in the compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from sage_inductor import Config
from sage_inductor.graph.call import example_tensor
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend, relative_l2

masking = pytest.importorskip("transformers.masking_utils")
CONFIG = Config(kernel="reference", precision="accurate")
LENGTH, WINDOW = 24, 5
pytestmark = pytest.mark.usefixtures("inference")

FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "causal": (lambda ids: masking.causal_mask_function, "causal (symbolic)"),
    "sliding": (
        lambda ids: masking.sliding_window_causal_mask_function(WINDOW),
        f"sliding_window left={WINDOW - 1} right=0 (symbolic)",
    ),
    "both ways": (
        lambda ids: masking.sliding_window_bidirectional_mask_function(WINDOW),
        f"band left={WINDOW} right={WINDOW} (symbolic)",
    ),
    "bidirectional": (lambda ids: masking.bidirectional_mask_function, "all_true"),
    "chunked": (
        lambda ids: masking.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)),
        "chunked_causal size=8",
    ),
    "packed": (
        lambda ids: masking.and_masks(
            masking.causal_mask_function, masking.packed_sequence_mask_function(ids)
        ),
        "causal (symbolic) + segments",
    ),
}


def attend(kind: str, padded: bool, vmap: bool, eager: bool) -> Callable[..., Tensor]:
    def model(q: Tensor, pad: Tensor, ids: Tensor) -> Tensor:
        make = masking.eager_mask if eager else masking.sdpa_mask
        mask = make(
            batch_size=q.shape[0],
            q_length=q.shape[2],
            kv_length=q.shape[2],
            mask_function=FUNCTIONS[kind][0](ids),
            attention_mask=pad if padded else None,
            allow_is_causal_skip=False,
            use_vmap=vmap,
            dtype=torch.float32,
            device=q.device,
        )
        if not eager:
            return F.scaled_dot_product_attention(q, q, q, mask)
        return (q @ q.mT / 4 + mask).softmax(-1) @ q

    return model


def inputs(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    pad = torch.ones(2, length, dtype=torch.bool)
    pad[0, :3] = False  # on the left: the first queries see nothing
    return torch.randn(2, 3, length, 16), pad, (torch.arange(length) // 7).expand(2, length)


@pytest.mark.parametrize(
    ("kind", "padded", "vmap", "eager"),
    [
        *((kind, False, False, False) for kind in FUNCTIONS),
        ("causal", True, False, False),
        ("sliding", True, False, False),
        ("chunked", True, True, False),
        ("causal", True, True, False),
        ("sliding", False, True, False),
        ("causal", True, False, True),
        ("sliding", True, False, True),
        ("bidirectional", True, False, True),
    ],
)
def test_functions_of_indices(kind: str, padded: bool, vmap: bool, eager: bool) -> None:
    function, backend = attend(kind, padded, vmap, eager), RewritingBackend(CONFIG)
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for length in (LENGTH, 37):
        given = inputs(length)
        assert relative_l2(compiled(*given), function(*given)) < 0.02
    (site,) = backend.sites
    expected = FUNCTIONS[kind][1]
    if expected == "all_true":
        expected = "key_padding" if padded else "zero_bias" if eager else "all_true"
    elif padded:
        expected += " + key_padding"
    assert site.mask == expected


@pytest.mark.parametrize(("vmap", "eager"), [(False, False), (True, False), (False, True)])
def test_the_mask_is_gone_from_the_compiled_graph(vmap: bool, eager: bool) -> None:
    """Neither the mask nor anything else of queries times keys is left, and the largest value is an operand."""
    q_len_squared = 97 * 97
    largest: dict[bool, int] = {}
    for rewrites in (False, True):
        graphs: list[fx.Graph] = []

        def keep(graph_module: fx.GraphModule, example_inputs: Any, graphs: list[fx.Graph] = graphs) -> Any:
            graphs.append(graph_module.graph)
            return graph_module.forward

        inductor_like = aot_autograd(fw_compiler=keep)

        def compiler(
            graph_module: fx.GraphModule,
            example_inputs: Any,
            rewrites: bool = rewrites,
            then: Any = inductor_like,
        ) -> Any:
            if rewrites:
                rewrite_graph(graph_module.graph, CONFIG)
                graph_module.recompile()
            return then(graph_module, example_inputs)

        torch.compiler.reset()
        function, given = attend("causal", True, vmap, eager), inputs(97)
        out = torch.compile(function, backend=compiler, dynamic=False)(*given)
        assert relative_l2(out, function(*given)) < 0.02
        tensors = [example_tensor(node) for graph in graphs for node in graph.nodes]
        largest[rewrites] = max(tensor.numel() for tensor in tensors if tensor is not None)
    assert largest[False] >= q_len_squared > largest[True]
