"""Attention inside what Dynamo puts into graphs of its own: control flow, regions, shards, repeated blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_ways_in import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
BOUND = 0.03  # INT8 scores at these sizes: below .02 an attention
pytestmark = pytest.mark.usefixtures("inference")


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2) / 6).softmax(-1) @ x


def x() -> Tensor:
    return torch.randn(2, 4, 16, 32)


@torch.compiler.nested_compile_region
def region(x: Tensor) -> Tensor:
    return attend(x) + by_hand(x)


def looped(x: Tensor) -> Tensor:
    def body(step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return step + 1, attend(x) + by_hand(x)

    return torch._higher_order_ops.while_loop(lambda step, x: step < 3, body, (torch.tensor(0), x))[1]


def mapped(x: Tensor) -> Tensor:
    stacked = torch.stack([x, 2 * x])
    return torch._higher_order_ops.map(lambda one: attend(one) + by_hand(one), stacked)


def scanned(x: Tensor) -> Tensor:
    def step(carry: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(carry + one) + by_hand(one)
        return out, out.clone()

    return torch._higher_order_ops.scan(step, x, torch.stack([x, 2 * x]))[1]


def branched(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: attend(x) + by_hand(x), lambda x: by_hand(x) - attend(x), (x,))


def checkpointed(x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: attend(x) + by_hand(x), x, use_reentrant=False)


REGIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "cond": (branched, 4),
    "while_loop": (looped, 2),
    "map": (mapped, 2),
    "scan": (scanned, 2),
    "nested_compile_region": (lambda x: region(region(x)), 2),
    "checkpoint": (checkpointed, 2),
}


@pytest.mark.parametrize("name", REGIONS)
def test_bodies_are_searched(name: str) -> None:
    function, count = REGIONS[name]
    values = x()
    backend = RewritingBackend(CONFIG)
    out = torch.compile(function, backend=backend, fullgraph=True)(values)
    assert [site.rewritten for site in backend.sites] == [True] * count, backend.sites
    assert relative_l2(out, function(values)) < BOUND


@pytest.mark.parametrize(
    "name", ["cond", pytest.param("while_loop", marks=pytest.mark.slow), "scan", "nested_compile_region"]
)
def test_bodies_through_inductor(name: str, fresh_compile: None) -> None:
    function, _ = REGIONS[name]
    values = x()
    options = {"sage.kernel": "reference", "sage.precision": "accurate", "sage.fallback": "error"}
    out = torch.compile(function, backend="sage_inductor", options=options, fullgraph=True)(values)
    assert relative_l2(out, function(values)) < BOUND


def test_checkpointed_training(fresh_compile: None) -> None:
    """The forward of the recomputation is the one that ran: gradients are those of exact attention."""
    weight = nn.Parameter(torch.eye(32))

    def loss(x: Tensor) -> Tensor:
        return (
            torch.utils.checkpoint.checkpoint(lambda x: attend(x @ weight), x, use_reentrant=False)
            .square()
            .sum()
        )

    values = x()
    options: dict[str, Any] = {
        "sage.kernel": "reference",
        "sage.training": True,
        "sage.precision": "accurate",
    }
    with torch.enable_grad():
        loss(values).backward()
        expected = weight.grad
        weight.grad = None
        torch.compile(loss, backend="sage_inductor", options=options)(values).backward()
    assert expected is not None and weight.grad is not None
    assert relative_l2(weight.grad, expected) < BOUND


class OwnGradient(torch.autograd.Function):
    """Its backward reads what the forward gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = attend(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        return attend(grad * out)


@pytest.mark.parametrize("training", [False, True])
def test_an_autograd_function_is_exact_where_its_gradients_are_wanted(training: bool) -> None:
    backend = RewritingBackend(Config(kernel="reference", training=training))
    compiled, values = torch.compile(OwnGradient.apply, backend=backend), x()
    assert 0 < relative_l2(compiled(values), OwnGradient.apply(values)) < BOUND
    assert [site.rewritten for site in backend.sites] == [True]
    with torch.enable_grad():
        values.requires_grad_()
        pairs = [(run(values), run) for run in (compiled, OwnGradient.apply)]
        (out, _), (expected, _) = pairs
        grads = [torch.autograd.grad(result.sum(), values)[0] for result, _ in pairs]
    assert torch.equal(out, expected) and torch.equal(*grads)
    assert all("gradients=of an autograd.Function" in str(site.reasons) for site in backend.sites[1:])
    assert not any(site.rewritten for site in backend.sites[1:])


class Tower(nn.Module):
    def __init__(self, blocks: int, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_splits_graphs_and_every_part_is_rewritten() -> None:
    """Blocks and buckets of a megabyte: the one graph becomes parts, each compiled on its own."""
    torch.manual_seed(0)
    tower = Tower(3, dim=256, heads=8).eval()
    values = torch.randn(2, 16, 256)
    expected = tower(values)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(tower), bucket_cap_mb=1)
    backend = RewritingBackend(CONFIG)
    out = torch.compile(parallel, backend=backend)(values)
    assert len(backend.graphs) > 1 and [site.rewritten for site in backend.sites] == [True] * 3
    assert 1e-5 < relative_l2(out, expected) < BOUND


@pytest.mark.usefixtures("process_group")
def test_ddp_trains(fresh_compile: None) -> None:
    torch.manual_seed(0)
    tower = Tower(2, dim=256, heads=8)
    values = torch.randn(2, 16, 256)
    options: dict[str, Any] = {
        "sage.kernel": "reference",
        "sage.training": True,
        "sage.precision": "accurate",
    }
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(tower), bucket_cap_mb=1)
    with torch.enable_grad():
        tower(values).square().sum().backward()
        torch.compile(parallel, backend="sage_inductor", options=options)(values).square().sum().backward()
    for exact, trained in zip(tower.parameters(), parallel.module.parameters(), strict=True):
        assert exact.grad is not None and trained.grad is not None
        # The key's bias moves no softmax: what there is of a gradient is rounding.
        scale = float(exact.grad.norm())
        assert scale < 1e-2 or relative_l2(trained.grad, exact.grad) < 2 * BOUND


@pytest.mark.usefixtures("process_group")
def test_fsdp2_shards() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    tower = Tower(3).eval()
    values = torch.randn(2, 16, 64)
    expected = tower(values)
    mesh = init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(tower)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(sharded, backend=backend)
    out = compiled(values)
    # Sharded parameters are inputs: one graph may serve all three blocks.
    assert backend.sites and all(site.rewritten for site in backend.sites)
    assert 1e-5 < relative_l2(out, expected) < BOUND


def test_repeated_blocks_of_diffusers() -> None:
    """`compile_repeated_blocks` compiles the block class once and serves every block with it."""
    pytest.importorskip("diffusers")
    from models import BY_NAME, instantiate

    case = BY_NAME["wan"]
    model, inputs = instantiate(case)
    expected = model(**inputs)[0]
    backend = RewritingBackend(CONFIG)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    out = model(**inputs)[0]
    assert len(backend.graphs) == 1 and [site.name for site in backend.sites] == [
        "blocks.0.attn1",
        "blocks.0.attn2",
    ]
    assert all(site.rewritten for site in backend.sites) and 1e-5 < relative_l2(out, expected) < BOUND


def test_vmap_is_left_alone() -> None:
    def mapped(x: Tensor) -> Tensor:
        weights = (x @ x.mT / 6).softmax(-1)
        return attend(x) + by_hand(x) + (x.mT @ weights.mT).mT

    values = torch.randn(3, 2, 2, 4, 16, 32)  # five dims inside
    backend = RewritingBackend(CONFIG)
    out = torch.compile(torch.vmap(mapped), backend=backend)(values)
    assert backend.sites and all("transform=vmap (supported: none)" in site.reasons for site in backend.sites)
    assert relative_l2(out, torch.vmap(mapped)(values)) < 1e-5


@pytest.mark.parametrize("pinned", [0, 1])
def test_what_one_call_of_a_region_pins_holds_for_all(pinned: int) -> None:
    """One graph is run by both, and Dynamo traces it once."""

    def twice(x: Tensor) -> Tensor:
        for call in range(2):
            with sdpa_kernel(SDPBackend.MATH) if call == pinned else nullcontext():
                x = region(x)
        return x

    backend, given = RewritingBackend(CONFIG), x()
    assert relative_l2(torch.compile(twice, backend=backend)(given), twice(given)) < 1e-5
    assert len(backend.graphs) == 1
    for site in backend.sites:
        assert not site.rewritten and "sdpa_kernel=MATH" in site.reasons[0]
