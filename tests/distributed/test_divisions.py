"""Which parts ranks compute, on meshes larger than two ranks: no process group is needed to decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")


@dataclass(frozen=True)
class Mesh:
    sizes: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    def size(self, dim: int) -> int:
        return self.sizes[dim]


class Placed:
    """What a DTensor says about itself."""

    def __init__(self, mesh: Mesh, shape: tuple[int, ...], placements: tuple[Any, ...]) -> None:
        self.device_mesh, self.placements = mesh, placements
        self.shape = torch.Size(shape)

    def dim(self) -> int:
        return len(self.shape)


def chosen(
    sizes: tuple[int, ...],
    *placements: Any,
    heads: int = 8,
    kv_heads: int = 8,
    banded: bool = False,
    **more: Any,
) -> tuple[str, ...]:
    """What each dim of a mesh divides, for queries, keys and values in `placements`."""
    from sage_inductor.operators.distributed.layouts import choose

    mesh = Mesh(sizes)
    each = placements if isinstance(placements[0], tuple) else (placements,) * 3
    shapes = ((16, heads, 512, 64), (16, kv_heads, 512, 64), (16, kv_heads, 512, 64))
    tensors = {
        name: Placed(mesh, shape, placed)
        for name, shape, placed in zip(("query", "key", "value"), shapes, each, strict=True)
    }
    tensors |= {name: Placed(mesh, shape, placed) for name, (shape, placed) in more.items()}
    return choose(tensors, banded).divisions


def test_layouts_on_large_meshes() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    assert chosen((2, 4), Shard(0), Shard(1)) == ("batch", "heads")
    assert chosen((2, 4), Shard(1), Shard(1)) == ("heads", "heads")
    # Four key heads are not divided among eight ranks: the second dim takes something else.
    assert chosen((2, 4), Shard(1), Shard(1), kv_heads=4)[0] == "heads"
    assert chosen((2, 4), Shard(1), Shard(1), kv_heads=4)[1] != "heads"
    assert chosen((8,), Shard(1), kv_heads=4) == ("batch",)
    assert chosen((4,), Shard(1), kv_heads=4) == ("heads",)
    # Two ranks gather keys and values for their own queries; more of them exchange heads, as Ulysses does.
    assert chosen((2,), Shard(2)) == ("queries",)
    assert chosen((8,), Shard(2)) in (("heads",), ("batch",))
    assert chosen((2,), Shard(2), banded=True) in (("heads",), ("batch",))
    # Keys and values that are whole already cost nothing.
    queries, whole = (Shard(2),), (Replicate(),)
    assert chosen((8,), queries, whole, whole) == ("queries",)
    assert chosen((8,), queries, whole, whole, banded=True) != ("queries",)
    assert chosen((8,), Replicate()) == ("whole",)
    assert chosen((8,), whole, (Shard(1),), (Shard(1),)) == ("heads",)
    assert chosen((3,), Shard(1)) == ("heads",)  # uneven, and nobody without a head
    assert chosen((4,), Shard(1), heads=5, kv_heads=5) == ("batch",)  # 2, 2, 1 and none
    assert chosen((16,), Shard(1), heads=8) == ("batch",)
    assert chosen((2,), Partial()) in (("batch",), ("heads",))


def test_masks_are_sharded_by_the_dims_that_they_have() -> None:
    from torch.distributed.tensor import Replicate, Shard

    from sage_inductor.operators.distributed.layouts import Layout

    layout = Layout(("batch", "heads", "queries"))
    expected = {
        (16, 8, 512, 512): (Shard(0), Shard(1), Shard(2)),
        (1, 8, 1, 512): (Replicate(), Shard(1), Replicate()),
        (8, 512, 512): (Replicate(), Shard(0), Shard(1)),
        (512, 512): (Replicate(), Replicate(), Shard(0)),
        (512,): (Replicate(),) * 3,
    }
    for shape, placements in expected.items():
        assert layout.placements("attn_mask", shape, 4) == placements, shape
    assert layout.placements("sink", (8, 1), 4) == (Replicate(), Shard(0), Replicate())
    assert layout.placements("sink", (16, 8, 512), 4) == (Shard(0), Shard(1), Shard(2))
    assert layout.placements("key", (16, 8, 512, 64), 4) == (Shard(0), Shard(1), Replicate())
    assert [placement.is_partial() for placement in layout.gradients("key", (16, 8, 512, 64), 4)] == [
        False,
        False,
        True,
    ]
    for name, last in (("query_segments", Shard(1)), ("key_segments", Replicate())):
        assert layout.placements(name, (16, 512), 4) == (Shard(0), Replicate(), last)
    assert Layout(("heads", "queries")).placements("query_segments", (512,), 3) == (Replicate(), Shard(0))
    three = Layout(("heads",))
    assert three.placements("query", (8, 512, 64), 3) == (Shard(0),)
    assert three.placements("attn_mask", (8, 512, 512), 3) == (Shard(0),)


def test_another_torch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error, not an AttributeError from the middle of a dispatch."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention as rings

    from sage_inductor.operators.sharded import are_taught
    from sage_inductor.torch_internals.distributed import context_parallel_mesh, ring_attention

    monkeypatch.setattr(rings, "_templated_ring_attention", None)
    with pytest.raises(RuntimeError, match=r"lacks .*_templated_ring_attention.*known: torch 2.11"):
        ring_attention(None, None, None, None, None, False)
    monkeypatch.setattr(rings, "_replaced_functions", {(lambda: None): ()})
    with pytest.raises(RuntimeError, match="puts in SDPA's place"):
        context_parallel_mesh()
    monkeypatch.setattr(DTensor._op_dispatcher, "_custom_op_handlers", None)
    with pytest.raises(RuntimeError, match="_custom_op_handlers"):
        are_taught()


def test_importing_the_package_leaves_dtensor_alone() -> None:
    import subprocess
    import sys

    code = """
import sys, torch, sage_inductor
x = torch.randn(1, 2, 16, 32)
sage_inductor.sage_attention(x, x, x, kernel="reference")
print("torch.distributed.tensor" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
