"""Inside torch's `context_parallel` attention sees the whole sequence, of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks
from torch import Tensor, nn

from sage_inductor import Config, NotEligibleError, explain, sage_attention
from sage_inductor.backends import SageAttentionBackend
from sage_inductor.operators.sharded import are_taught
from sage_inductor.testing import RewritingBackend, relative_l2

B, H, N, D = 1, 4, 128, 32
MARGIN = 1.1  # times the error of a single process
WAYS = [(False, False), (True, False), (True, True)]  # (is_causal, balanced)


class Attention(nn.Module):
    def __init__(self, is_causal: bool, **options: Any) -> None:
        super().__init__()
        self.options = {"is_causal": is_causal, **options}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options) * 1.0


def inputs(kv_heads: int = H) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(B, H, N, D, generator=generator)
    k, v = (torch.randn(B, kv_heads, N, D, generator=generator) for _ in range(2))
    return [q, k + 2, v]  # K's mean must not be lost where parts are merged


def teach_rings_of_cpus() -> None:
    """torch rings with three kernels of CUDA; with these lines also with that of the CPU, as its own tests do not need."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding
    from torch.distributed.tensor.experimental._context_parallel import _attention as rings

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    placements = (Shard(0), Shard(1), Shard(2), Replicate())
    register_sharding(kernel.default)(
        lambda q, k, v, *args, **kwargs: [([one] * 2, [one] * 3 + [None] * len(args)) for one in placements]
    )
    register_sharding(backward.default)(
        lambda *args, **kwargs: [([one] * 3, [one] * 6 + [None] * (len(args) - 6)) for one in placements]
    )

    def handle(op: Any, args: Any, kwargs: Any) -> Any:
        dispatcher = DTensor._op_dispatcher
        info = dispatcher.unwrap_to_op_info(op, args, kwargs)
        dispatcher.sharding_propagator.propagate(info)
        q, k, v, dropout_p, is_causal, *_ = (*info.local_args, 0.0, False)
        found = rings._templated_ring_attention(
            info.compute_mesh.get_group(), 2, kernel, q, k, v, is_causal=is_causal, dropout_p=dropout_p
        )
        return dispatcher.wrap(found, info.output_sharding.output_spec)

    rings.custom_ops[kernel.default] = handle


@contextmanager
def context(mesh: Any, balanced: bool, *buffers: Tensor) -> Iterator[None]:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

    _cp_options.enable_load_balance = balanced
    with context_parallel(mesh, buffers=list(buffers), buffer_seq_dims=[2] * len(buffers)):
        yield


def check(out: Tensor, mine: Tensor, one: Tensor) -> None:
    """`out`, this rank's part of the output, is as near to `mine`, its part of the exact output, as `one`, its part of that of one process."""
    assert out.shape == mine.shape == one.shape, (out.shape, mine.shape, one.shape)
    assert relative_l2(out, mine) <= MARGIN * relative_l2(one, mine), relative_l2(out, mine)


@on_every_rank
def compiled(mesh: Any) -> None:
    teach_rings_of_cpus()
    for kv_heads in (H, 2):
        for is_causal, balanced in WAYS:
            options = {"is_causal": is_causal, "enable_gqa": kv_heads != H}
            buffers = inputs(kv_heads)
            one = sage_attention(*buffers, **options, kernel="reference")
            exact = F.scaled_dot_product_attention(*buffers, **options)
            mine, alone = exact.clone(), one.clone()
            torch.compiler.reset()
            backend = RewritingBackend(Config(kernel="reference"))
            with torch.no_grad(), context(mesh, balanced, *buffers, mine, alone):
                out = torch.compile(Attention(**options), backend=backend)(*buffers)
                check(out, mine, alone)
                report = explain(Attention(**options), *buffers, config=Config(kernel="reference"))
            (site,) = backend.sites
            assert site.rewritten and len(backend.graphs) == 1, site
            assert site.query.shape == (B, H, N // 2, D) and site.query.placements == "2: S(2)"
            assert report.sites[0].rewritten and report.sites[0].query == site.query


@on_every_rank
def compiled_and_traced_by_autograd(mesh: Any) -> None:
    """As Inductor gets it, whose code for a CPU would take a minute more to build."""
    from torch._dynamo import lookup_backend

    from sage_inductor.rewriting.driver import rewrite_graph

    sites = []

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        sites.extend(rewrite_graph(graph_module.graph, Config(kernel="reference")))
        graph_module.recompile()
        return lookup_backend("aot_eager")(graph_module, example_inputs)

    teach_rings_of_cpus()
    fast = torch.compile(Attention(True), backend=backend)
    buffers = inputs()
    one, exact = (
        attend(*buffers, is_causal=True)
        for attend in (
            lambda *args, **kwargs: sage_attention(*args, **kwargs, kernel="reference"),
            F.scaled_dot_product_attention,
        )
    )
    with torch.no_grad():
        assert relative_l2(fast(*buffers), one) < 1e-3  # outside first: the graph must not serve inside
        mine, alone = exact.clone(), one.clone()
        with context(mesh, True, *buffers, mine, alone):
            check(fast(*buffers), mine, alone)
        assert relative_l2(fast(*buffers), one) < 1e-3
    assert [site.rewritten for site in sites] == [True, True]


@on_every_rank
def compiled_for_symbolic_lengths(mesh: Any) -> None:
    teach_rings_of_cpus()
    backend = RewritingBackend(Config(kernel="reference"))
    fast = torch.compile(Attention(True), backend=backend, dynamic=True)
    for length in (N, N // 2):
        buffers = [tensor[:, :, :length].clone() for tensor in inputs()]
        one = sage_attention(*buffers, is_causal=True, kernel="reference")
        exact = F.scaled_dot_product_attention(*buffers, is_causal=True)
        mine, alone = exact.clone(), one.clone()
        with torch.no_grad(), context(mesh, True, *buffers, mine, alone):
            check(fast(*buffers), mine, alone)
    assert [site.rewritten for site in backend.sites] == [True]  # one graph for both


@on_every_rank
def sage_attention_itself(mesh: Any) -> None:
    for kernel in ("reference", "auto"):
        for is_causal, balanced in WAYS:
            buffers = inputs()
            one, lse = sage_attention(*buffers, is_causal=is_causal, kernel="reference", return_lse=True)
            exact = F.scaled_dot_product_attention(*buffers, is_causal=is_causal)
            q, k, _ = (tensor.double() for tensor in buffers)
            scores = q @ k.mT * D**-0.5
            if is_causal:
                scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
            exact_lse = scores.logsumexp(-1)
            mine, alone, its_lse = exact.clone(), one.clone(), exact_lse[..., None].clone()
            with torch.no_grad(), context(mesh, balanced, *buffers, mine, alone, its_lse):
                out = sage_attention(*buffers, is_causal=is_causal, kernel=kernel)
                check(out, mine, alone)
                again, found = sage_attention(*buffers, is_causal=is_causal, kernel=kernel, return_lse=True)
                check(again, mine, alone)
                error = relative_l2(found, its_lse[..., 0])
                assert error <= 1.5 * relative_l2(lse, exact_lse), error
                buffer = torch.empty_like(out)
                assert sage_attention(*buffers, is_causal=is_causal, kernel=kernel, out=buffer) is buffer
                check(buffer, mine, alone)


@on_every_rank
def sage_attention_compiled(mesh: Any) -> None:
    """It breaks the graph, and rings; also where it was compiled before."""
    buffers = inputs()
    one, exact = sage_attention(*buffers, kernel="reference"), F.scaled_dot_product_attention(*buffers)
    ways = [
        torch.compile(lambda q, k, v: sage_attention(q, k, v, kernel="reference") * 1, backend="eager")
        for _ in range(2)
    ]
    with torch.no_grad():
        assert relative_l2(ways[1](*buffers), one) < 1e-6
        for way in ways:
            bufs = [tensor.clone() for tensor in buffers]
            mine, alone = exact.clone(), one.clone()
            with context(mesh, False, *bufs, mine, alone):
                check(way(*bufs), mine, alone)
        assert relative_l2(ways[1](*buffers), one) < 1e-6


@on_every_rank
def in_the_place_of_sdpa(mesh: Any) -> None:
    buffers = inputs()
    one, exact = sage_attention(*buffers, kernel="reference"), F.scaled_dot_product_attention(*buffers)
    mine, alone = exact.clone(), one.clone()
    with torch.no_grad(), context(mesh, False, *buffers, mine, alone):
        inside = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = sage_attention
        try:
            check(F.scaled_dot_product_attention(*buffers), mine, alone)
        finally:
            F.scaled_dot_product_attention = inside


@on_every_rank
def what_has_no_ring_raises(mesh: Any) -> None:
    def refused(call: Any, word: str) -> None:
        try:
            call()
        except (RuntimeError, NotEligibleError) as error:  # NotImplementedError is one
            assert word in str(error), error
        else:
            raise AssertionError(f"no error about {word}")

    q, k, v = buffers = inputs()
    mask = torch.ones(N // 2, N // 2, dtype=torch.bool)
    with torch.no_grad(), context(mesh, True, *buffers):
        refused(lambda: sage_attention(q, k, v, mask, kernel="reference"), "attn_mask")
        refused(lambda: sage_attention(q, k, v, kernel="reference"), "is_causal=False")
        refused(lambda: sage_attention(q[0], k[0], v[0], is_causal=True), "dimensions")
        refused(lambda: sage_attention(q[:, :, :63], k[:, :, :63], v[:, :, :63], is_causal=True), "q_len=126")
        impl = SageAttentionBackend.get_impl_cls()(H, D, False, None)
        refused(
            lambda: impl.forward(*(tensor.transpose(1, 2) for tensor in buffers), None), "context_parallel"
        )
        whole = torch.compile(lambda *args: sage_attention(*args), backend="eager", fullgraph=True)
        refused(lambda: whole(q, k, v), "context_parallel")
    (site,) = _sites_inside(mesh, Config(kernel="reference"), is_causal=False, balanced=True)
    assert not site.rewritten and "is_causal=False" in site.reasons[0]


def _sites_inside(mesh: Any, config: Config, is_causal: bool, balanced: bool) -> Any:
    """What is decided where torch itself would refuse; the graph is not run."""
    from torch.distributed.tensor import DTensor, Shard

    from sage_inductor.rewriting.driver import rewrite_graph

    teach_rings_of_cpus()
    buffers = inputs()
    found: list[Any] = []
    graphs: list[Any] = []

    def keep(graph_module: Any, example_inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module.forward

    with torch.no_grad():
        parts = [DTensor.from_local(buffer, mesh, [Shard(2)], run_check=False) for buffer in buffers]
        torch.compiler.reset()
        torch.compile(Attention(is_causal), backend=keep)(*parts)
        with context(mesh, balanced, *buffers):
            found += rewrite_graph(graphs[0].graph, config)
    return found


@on_every_rank
def training(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    are_taught()
    weights = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(4))
    for kv_heads in (H, 2):
        for is_causal, balanced in WAYS:
            buffers = inputs(kv_heads)
            whole = [tensor.clone().requires_grad_() for tensor in buffers]
            options = {"is_causal": is_causal, "enable_gqa": kv_heads != H}
            one = sage_attention(*buffers, **options, kernel="reference")
            exact = F.scaled_dot_product_attention(*whole, **options)
            grads = torch.autograd.grad((exact * weights).sum(), whole)
            alone = one.clone()
            mine = [exact.detach().clone(), weights.clone(), *(grad.clone() for grad in grads)]
            with context(mesh, balanced, *buffers, *mine, alone):
                parts = [
                    DTensor.from_local(buffer.clone(), mesh, [Shard(2)], run_check=False).requires_grad_()
                    for buffer in buffers
                ]
                out = torch.ops.sage_inductor.attention_training(*parts, kernel_name="reference", **options)
                check(out.to_local().detach(), mine[0], alone)
                found = torch.autograd.grad((out.to_local() * mine[1]).sum(), parts)
                for part, gradient, wanted in zip(parts, found, mine[2:], strict=True):
                    assert gradient.placements == (Shard(2),)
                    assert gradient.to_local().stride() == part.to_local().stride()
                    assert relative_l2(gradient.to_local(), wanted) < 1e-5, (options, balanced)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)


@on_every_rank
def training_compiled(mesh: Any) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    teach_rings_of_cpus()
    x = torch.randn(B, N, H * D, generator=torch.Generator().manual_seed(5))
    config = Config(kernel="reference", training=True)
    torch.manual_seed(6)
    block = Block()
    errors = []
    block(x).square().sum().backward()
    exact = {name: item.grad for name, item in block.named_parameters()}
    for inside in (False, True):
        block.zero_grad()
        torch.compiler.reset()
        backend = RewritingBackend(config)
        part = x.clone()
        manager = context_parallel(mesh, buffers=[part], buffer_seq_dims=[1]) if inside else nullcontext()
        with manager:
            torch.compile(block, backend=backend)(part).square().sum().backward()
            for item in block.parameters():
                if inside:
                    torch.distributed.all_reduce(item.grad)
        assert [site.rewritten for site in backend.sites] == [True], backend.sites
        errors.append({name: relative_l2(item.grad, exact[name]) for name, item in block.named_parameters()})
    alone, together = errors
    assert all(together[name] <= MARGIN * alone[name] for name in alone), errors


@on_every_rank
def a_ring_that_is_one_dim_of_a_mesh(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    are_taught()
    larger = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    buffers = inputs()
    whole = [tensor.clone().requires_grad_() for tensor in buffers]
    one = sage_attention(*buffers, is_causal=True, kernel="reference")
    exact = F.scaled_dot_product_attention(*whole, is_causal=True)
    alone = one.clone()
    mine = [exact.detach().clone(), *(grad.clone() for grad in torch.autograd.grad(exact.sum(), whole))]
    with context(mesh, True, *buffers, *mine, alone):
        placed = [Shard(0), Shard(2)]
        parts = [DTensor.from_local(tensor.clone(), larger, placed).requires_grad_() for tensor in buffers]
        out = torch.ops.sage_inductor.attention_training(*parts, is_causal=True, kernel_name="reference")
        check(out.to_local().detach(), mine[0], alone)
        for gradient, wanted in zip(torch.autograd.grad(out.to_local().sum(), parts), mine[1:], strict=True):
            assert relative_l2(gradient.to_local(), wanted) < 1e-5


@on_every_rank
def a_wrapped_module(mesh: Any) -> None:
    """torch's newer way: a module is told by a plan that its inputs are shards."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as rings
    from torch.distributed.tensor.parallel import parallelize_module

    teach_rings_of_cpus()
    rank = mesh.get_local_rank()
    buffers = inputs()
    one, exact = sage_attention(*buffers, kernel="reference"), F.scaled_dot_product_attention(*buffers)
    before = rings._dispatch_mode, rings._cp_options.enable_load_balance

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(False)

        def forward(self, *args: Tensor) -> Tensor:
            return self.attention(*args) + 0

    model = Outer()
    plan = rings._ContextParallel(2, rings._ContextParallel.AttentionType.SDPA)
    parallelize_module(model.attention, mesh, plan)
    rings._dispatch_mode, rings._cp_options.enable_load_balance = (
        rings._DispatchMode.MODULE_WRAPPER,
        False,
    )
    rings._enable_cp_dtensor_dispatcher()
    try:
        parts = [buffer.chunk(2, 2)[rank].contiguous() for buffer in buffers]
        backend = RewritingBackend(Config(kernel="reference"))
        with torch.no_grad():
            out = torch.compile(model, backend=backend)(*parts)
            # A call on plain tensors is what it looks like.
            local = sage_attention(*parts, kernel="reference")
        assert [site.rewritten for site in backend.sites] == [True], backend.sites
        check(out, *(tensor.chunk(2, 2)[rank] for tensor in (exact, one)))
        assert relative_l2(local, F.scaled_dot_product_attention(*parts)) < 0.06
    finally:
        rings._disable_cp_dtensor_dispatcher()
        rings._dispatch_mode, rings._cp_options.enable_load_balance = before


test_on_two_ranks = on_ranks(__file__, 2)

if __name__ == "__main__":
    main(globals())
