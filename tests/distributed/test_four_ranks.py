"""Four ranks, and eight: Ulysses within and a ring around, rings whose load is balanced, two dims of a mesh at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import SkipTest

import pytest
import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks
from torch import Tensor, nn

from sage_inductor import Config, backend, sage_attention
from sage_inductor.operators.sharded import are_taught
from sage_inductor.testing import RewritingBackend, relative_l2

H, KV_HEADS, D = 4, 2, 32
OF_A_RANK = 64  # tokens of a ring, in two chunks
MARGIN = 1.1  # times the error of a single process
REFERENCE = Config(kernel="reference")


def wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 24, 32),
        "return_dict": False,
    }


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 256, 16),
        "encoder_hidden_states": torch.randn(1, 32, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(256, 3),
        "txt_ids": torch.zeros(32, 3),
        "return_dict": False,
    }


def _unified(mesh: Any, build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    try:
        from diffusers import ContextParallelConfig
    except ImportError as error:
        raise SkipTest(str(error)) from error
    from sage_inductor.integrations import diffusers as sage

    ranks = mesh.size()
    # A CPU counts as no accelerator, and diffusers divides by their number.
    torch.accelerator.device_count = lambda: ranks
    graphs: list[Any] = []

    def run_eagerly(graph_module: Any, *args: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    backend.compile_with_inductor = run_eagerly
    sage.register(REFERENCE)
    sage.register(dataclasses.replace(REFERENCE, wires="8-bit"), name="in_8_bits")

    def made(backend: str) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        model, inputs = build()
        model.eval().set_attention_backend(backend)
        return model, inputs

    with torch.no_grad():
        model, inputs = made("native")
        exact = model(**inputs)[0]
        model, inputs = made("sage_inductor")
        alone = relative_l2(model(**inputs)[0], exact)
        assert 0 < alone < 0.01
        for ulysses in (2, 4) if ranks == 8 else (2,):
            model, inputs = made("sage_inductor")
            model.enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ranks // ulysses)
            )
            eager = relative_l2(model(**inputs)[0], exact)
            assert 0 < eager <= MARGIN * alone, (eager, alone)
            graphs.clear()
            fast = torch.compile(model, backend="sage_inductor", options={"sage.kernel": "reference"})
            compiled = relative_l2(fast(**inputs)[0], exact)
            assert 0 < compiled <= MARGIN * alone, (compiled, alone)
            names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
            assert names.count("sage_inductor.attention_of_ring.default") >= 1, set(names)
            model.set_attention_backend("in_8_bits")
            again = relative_l2(model(**inputs)[0], exact)
            assert 0 < again <= MARGIN * alone and again != eager, (again, alone)


@on_every_rank
def ulysses_within_a_ring(mesh: Any) -> None:
    """On four ranks Flux: of Wan tests/integrations/test_diffusers_ranks.py has a ring, and Ulysses, on two."""
    for build in (flux,) if mesh.size() == 4 else (wan, flux):
        torch.compiler.reset()
        _unified(mesh, build)


def buffers_of(kv_heads: int, tokens: int) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, H, tokens, D, generator=generator)
    k, v = (torch.randn(1, kv_heads, tokens, D, generator=generator) for _ in range(2))
    return [q, k + 2, v], {"is_causal": True, "enable_gqa": kv_heads != H}


@on_every_rank
def a_balanced_ring(mesh: Any) -> None:
    """torch's `context_parallel`, causal: each rank has a chunk from the head of the sequence, and one from its tail."""
    from test_rings import Attention, teach_rings_of_cpus
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import (
        _cp_options,
        set_rotate_method,
    )

    teach_rings_of_cpus()
    _cp_options.enable_load_balance = True
    for kv_heads, rotate in ((H, "allgather"), (KV_HEADS, "alltoall")):
        set_rotate_method(rotate)
        buffers, options = buffers_of(kv_heads, OF_A_RANK * mesh.size())
        one = sage_attention(*buffers, **options, kernel="reference")
        exact = F.scaled_dot_product_attention(*buffers, **options)
        mine, its = exact.clone(), one.clone()
        torch.compiler.reset()
        rewriting = RewritingBackend(REFERENCE)
        parts = [*buffers, mine, its]
        with torch.no_grad(), context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 5):
            assert mine.shape[2] == OF_A_RANK
            outputs = [
                torch.compile(Attention(**options), backend=rewriting)(*buffers),
                sage_attention(*buffers, **options, kernel="reference"),
            ]
            for output in outputs:
                # Against the same rows of one process: those near the head see few keys, whose errors do not average out.
                error = relative_l2(output, mine)
                assert error <= MARGIN * relative_l2(its, mine), (kv_heads, rotate, error)
        assert [site.rewritten for site in rewriting.sites] == [True], rewriting.sites


@on_every_rank
def two_dims_of_a_mesh(mesh: Any) -> None:
    """Batch beside heads, heads beside queries, and heads beside a sequence, which is gathered where it is causal."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    are_taught()
    square = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("a", "b"))
    q, k, v = (torch.randn(2, H, 64, D, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for placements, is_causal, expected in (
        ((Shard(0), Shard(1)), True, (Shard(0), Shard(1))),
        ((Shard(1), Shard(2)), False, (Shard(1), Shard(2))),
        ((Replicate(), Shard(1)), True, (Replicate(), Shard(1))),
        ((Shard(2), Shard(1)), True, None),
    ):
        parts = [distribute_tensor(tensor, square, placements) for tensor in (q, k, v)]
        out = sage_attention(*parts, is_causal=is_causal, kernel="reference")
        assert expected is None or out.placements == expected, (placements, out.placements)
        one = sage_attention(q, k, v, is_causal=is_causal, kernel="reference")
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert relative_l2(out.full_tensor(), exact) <= MARGIN * relative_l2(one, exact), placements


def before_forking() -> None:
    with suppress(ImportError):
        from diffusers import ContextParallelConfig, FluxTransformer2DModel, WanTransformer3DModel  # noqa: F401


test_on_four_ranks = on_ranks(__file__, 4)
test_on_eight_ranks = pytest.mark.slow(on_ranks(__file__, 8))

if __name__ == "__main__":
    main(globals())
