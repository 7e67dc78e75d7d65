"""A ring of diffusers around blocks that are compiled: one graph for all lengths, in which parts are on their way while others are
attended to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import main, on_every_rank, on_ranks
from torch import Tensor

from sage_inductor import Config, sage_attention
from sage_inductor.operators import inference
from sage_inductor.operators.distributed import shards as in_turn
from sage_inductor.operators.distributed import wires as ring
from sage_inductor.testing import relative_l2

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")

MARGIN = 1.1  # times the error of a single process
WIRES = ("inputs", "8-bit")
FRAMES = (
    2,
    3,
    5,
)  # of 64 tokens; the first is compiled as it is, the second with symbolic sizes, which the third has, too


def ready(mesh: Any) -> None:
    """Our backends of diffusers, by what travels around their ring."""
    from sage_inductor.integrations import diffusers as sage

    ranks = mesh.size()
    # A CPU counts as no accelerator, and diffusers divides by their number.
    torch.accelerator.device_count = lambda: ranks
    for name in WIRES:
        sage.register(Config(kernel="reference", wires=name), name=named(name))


def named(wires: str) -> str:
    return f"ring_of_{wires.replace('-', '_').replace('8', 'eight')}"


def wan(backend: str, **degrees: int) -> Any:
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=1,
    )  # fmt: skip
    model.eval().set_attention_backend(backend)
    if degrees:
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
    return model


def parallel_config(mesh: Any, **degrees: int) -> Any:
    model = wan(named("inputs"), **degrees)
    return next(m.processor._parallel_config for m in model.modules() if hasattr(m, "processor"))


def shards(mesh: Any, tokens: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """This rank's query, key and value `[batch, seq, heads, head_dim]` of `tokens` a rank, and its parts of exact attention and of
    a single process'."""
    generator = torch.Generator().manual_seed(tokens)
    whole = [torch.randn(2, tokens * mesh.size(), 2, 32, generator=generator) for _ in range(3)]
    given = [tensor.transpose(1, 2) for tensor in whole]
    exact = torch.nn.functional.scaled_dot_product_attention(*given)
    alone = sage_attention(*given, kernel="reference")
    mine = slice(mesh.get_local_rank() * tokens, (mesh.get_local_rank() + 1) * tokens)
    of_this_rank = [tensor.transpose(1, 2)[:, mine].contiguous() for tensor in (exact, alone)]
    return [tensor[:, mine].contiguous() for tensor in whole], *of_this_rank


def inputs(frames: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(frames)
    return {
        "hidden_states": torch.randn(1, 4, frames, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 24, 32, generator=generator),
        "return_dict": False,
    }


@contextmanager
def without_warnings() -> Iterator[None]:
    """Raises for what Dynamo warns of: functions that it traces past their cache, graphs that break."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(warning.message) for warning in caught]
    assert not [text for text in found if "ynamo" in text or "lru_cache" in text], found


class Graphs:
    """A backend that runs graphs as they come out of AOTAutograd, and keeps those with attention."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph_module: torch.fx.GraphModule, _: Any) -> Any:
            if any("sage_inductor" in str(node.target) for node in graph_module.graph.nodes):
                self.graphs.append(graph_module)
            return make_boxed_func(graph_module.forward)

        return aot_autograd(fw_compiler=keep)(graph_module, example_inputs)


@contextmanager
def overlapping(wires: str, ranks: int, calls: int) -> Iterator[None]:
    """Raises unless, in each of `calls` rings inside, what goes to the next rank is sent before the part at hand is attended to, and
    what comes is waited for behind it."""
    watched = {
        "send": (in_turn, "sent_to_next"),
        "wait": (in_turn, "arrived"),
        "attend": (inference, "attention_lse") if wires == "inputs" else (ring, "attention_prequantized_op"),
    }
    events: list[str] = []
    with ExitStack() as stack:
        for event, (holder, name) in watched.items():

            def watch(
                *args: Any, event: str = event, then: Any = getattr(holder, name), **kwargs: Any
            ) -> Any:
                events.append(event)
                return then(*args, **kwargs)

            stack.enter_context(patch.object(holder, name, watch))
        yield
    buffers = 2 if wires == "inputs" else 1  # keys and values
    turn = ["send"] * buffers + ["attend"] + ["wait"] * buffers
    assert events == (turn * (ranks - 1) + ["attend"]) * calls, events


def rings(graph_module: torch.fx.GraphModule) -> int:
    return sum("attention_of_ring" in str(node.target) for node in graph_module.graph.nodes)


def compiled_blocks(mesh: Any, wires: str) -> None:
    """Of Wan, for several lengths."""
    exact_model, alone_model = wan("native"), wan(named(wires))
    model, graphs = wan(named(wires), ring_degree=mesh.size()), Graphs()
    # Not fullgraph: what diffusers hooks onto the first block, to divide the sequence, breaks the graph in front of it.
    model.compile_repeated_blocks(backend=graphs)
    with torch.no_grad(), without_warnings():
        for index, frames in enumerate(FRAMES):
            given = inputs(frames * mesh.size() // 2)
            exact, alone = exact_model(**given)[0], alone_model(**given)[0]
            with overlapping(wires, mesh.size(), 1):
                out = model(**given)[0]
            error, of_one = relative_l2(out, exact), relative_l2(alone, exact)
            assert 0 < error <= MARGIN * of_one < 0.01, (wires, frames, error, of_one)
            assert len(graphs.graphs) == min(index + 1, 2), (wires, frames, len(graphs.graphs))
    assert [rings(graph_module) for graph_module in graphs.graphs] == [1, 1]


@on_every_rank
def blocks_of_which_sizes_become_symbolic(mesh: Any) -> None:
    ready(mesh)
    for wires in WIRES:
        torch.compiler.reset()
        compiled_blocks(mesh, wires)


@on_every_rank
def attention_of_symbolic_sizes(mesh: Any) -> None:
    """All sizes symbolic, or the length alone: one graph for all."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    ready(mesh)
    config = parallel_config(mesh, ring_degree=mesh.size())
    for wires in WIRES:

        def attend(q: Any, k: Any, v: Any, backend: str = named(wires)) -> Any:
            return dispatch_attention_fn(q, k, v, backend=backend, parallel_config=config)

        for marked in (False, True):
            torch.compiler.reset()
            graphs = Graphs()
            fast = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=None if marked else True)
            for tokens in (64, 48, 200):
                mine, exact, alone = shards(mesh, tokens)
                if marked:
                    for tensor in mine:
                        torch._dynamo.mark_dynamic(tensor, 1)
                with torch.no_grad(), without_warnings(), overlapping(wires, mesh.size(), 1):
                    out = fast(*mine)
                assert 0 < relative_l2(out, exact) <= MARGIN * relative_l2(alone, exact), (wires, tokens)
                assert out.stride() == mine[0].stride()
                assert len(graphs.graphs) == 1, (wires, marked, tokens)
            assert rings(graphs.graphs[0]) == 1


@on_every_rank
def in_the_code_of_inductor(mesh: Any) -> None:
    """Inductor, which reorders nodes of a graph to save memory, leaves the turns in their order, and merges two parts in one kernel;
    also for a second length."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from torch._inductor.utils import run_and_get_code

    ready(mesh)
    config = parallel_config(mesh, ring_degree=mesh.size())
    for wires in WIRES:

        def attend(q: Any, k: Any, v: Any, backend: str = named(wires)) -> Any:
            # Something before and behind, that could be moved.
            return dispatch_attention_fn(q * 2, k + 1, v, backend=backend, parallel_config=config) * 2

        torch.compiler.reset()
        fast = torch.compile(attend, fullgraph=True, dynamic=True)
        mine, _, _ = shards(mesh, 64)
        with torch.no_grad():
            expected = attend(*mine)
            with overlapping(wires, mesh.size(), 1):
                out, (code,) = run_and_get_code(fast, *mine)
            assert relative_l2(out, expected) < 1e-5
            again, _, _ = shards(mesh, 80)
            assert relative_l2(fast(*again), attend(*again)) < 1e-5
        # One kernel in front, which has no other reader, and one behind, which merges.
        kernels = re.findall(r"^ +cpp_fused_\w+\(", code, re.MULTILINE)
        assert len(kernels) == 2 and "addcmul" in kernels[1], kernels


def before_forking() -> None:
    with suppress(ImportError):
        from diffusers import ContextParallelConfig, WanTransformer3DModel  # noqa: F401


test_on_two_ranks = on_ranks(__file__, 2)
test_on_four_ranks = pytest.mark.slow(on_ranks(__file__, 4))

if __name__ == "__main__":
    main(globals())
