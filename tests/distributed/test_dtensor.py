"""DTensors at SDPA, at attention by hand and at `sage_attention`: each rank computes its part, and all are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks, teach_dtensors_sdpa_of_cpus
from torch import Tensor, nn

from sage_inductor import (
    Config,
    attention_prequantized,
    calibrate,
    explain,
    quantize_key_value,
    sage_attention,
)
from sage_inductor.backends import SageAttentionBackend
from sage_inductor.operators.sharded import are_taught
from sage_inductor.testing import RewritingBackend, relative_l2

B, H, N, D = 2, 4, 96, 32
REFERENCE = Config(kernel="reference", training=True)
MARGIN = 1.1  # times the error of a single process


def inputs(kv_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, N, D, generator=generator)
    k, v = (torch.randn(B, kv_heads, N, D, generator=generator) for _ in range(2))
    return q, k + 1, v


def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "batch and rows": (B, 1, N, N),
        "heads": (1, H, N, N),
        "padding": (B, 1, 1, N),
        "rows": (N, N),
        "all": (B, H, N, N),
    }
    found = {name: torch.rand(shape, generator=generator) > 0.3 for name, shape in shapes.items()}
    for mask in found.values():
        mask[..., 0] = True
    found["additive"] = torch.randn(B, 1, N, N, generator=generator)
    return found


def placements() -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    return {
        "batch": Shard(0),
        "heads": Shard(1),
        "queries": Shard(2),
        "channels": Shard(3),
        "replicated": Replicate(),
    }


def sharded(tensors: Any, mesh: Any, placement: Any) -> list[Any]:
    from torch.distributed.tensor import distribute_tensor

    return [distribute_tensor(tensor.detach(), mesh, [placement]) for tensor in tensors]


def check(out: Any, one: Tensor, exact: Tensor) -> None:
    """`out` is as near to exact attention as that of a single process."""
    assert out.shape == exact.shape, out.shape
    whole = out.full_tensor()
    assert relative_l2(whole, exact) <= MARGIN * relative_l2(one, exact), relative_l2(whole, exact)


@on_every_rank
def eager_in_five_placements(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    q, k, v = inputs()
    exact = F.scaled_dot_product_attention(q, k, v)
    one, lse = sage_attention(q, k, v, kernel="reference", return_lse=True)
    exact_lse = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).logsumexp(-1)
    for name, placement in placements().items():
        parts = sharded((q, k, v), mesh, placement)
        with CommDebugMode() as sent:
            out = sage_attention(*parts, kernel="reference")
        check(out, one, exact)
        given = out.stride()
        expected = sage_attention(q, k, v, kernel="reference").stride()
        assert given == expected, (name, given, expected)
        if name in ("batch", "heads", "replicated"):
            assert out.placements == (placement,) and sent.get_total_counts() == 0, name
        if name == "queries":  # keys and values are gathered, queries stay where they are
            assert out.placements == (placement,) and sent.get_total_counts() == 2, sent.get_comm_counts()
        out, its_lse = sage_attention(*parts, kernel="reference", return_lse=True)
        check(out, one, exact)
        its_lse = its_lse.full_tensor()
        # A rank that has some of the queries evens channels by their sizes, and rounds other numbers, as near to the exact ones.
        assert name == "queries" or (its_lse - lse).abs().max() < 1e-2, name
        errors = [(found.double() - exact_lse).square().mean() for found in (its_lse, lse)]
        assert errors[0] <= MARGIN**2 * errors[1], (name, errors)
        into = sharded((torch.empty_like(q),), mesh, Replicate())[0]
        assert sage_attention(*parts, kernel="reference", out=into) is into
        check(into, one, exact)
    mixed = [*sharded((q,), mesh, Replicate()), *sharded((k, v), mesh, Shard(1))]
    out = sage_attention(*mixed, kernel="reference")
    assert out.placements == (Shard(1),)  # a part of what is there is taken for nothing
    check(out, one, exact)


@on_every_rank
def eager_with_what_is_not_independent(mesh: Any) -> None:
    """The same call with another option must not find the layout of the one before."""
    are_taught()
    q, k, v = inputs()
    for name, placement in placements().items():
        for causal in (False, True, False):
            one = sage_attention(q, k, v, is_causal=causal, kernel="reference")
            exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            parts = sharded((q, k, v), mesh, placement)
            check(sage_attention(*parts, is_causal=causal, kernel="reference"), one, exact)
            window = {"window_left": 10, "window_right": 5, "kernel_name": "reference"}
            plain = torch.ops.sage_inductor.attention(q, k, v, **window)
            out = torch.ops.sage_inductor.attention(*parts, **window).full_tensor()
            assert relative_l2(out, plain) < 0.02, name


@on_every_rank
def eager_with_masks_and_sinks(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    are_taught()
    q, k, v = inputs()
    for name, placement in placements().items():
        parts = sharded((q, k, v), mesh, placement)
        for kind, mask in masks().items():
            one = sage_attention(q, k, v, mask, kernel="reference")
            exact = F.scaled_dot_product_attention(q, k, v, mask)
            for of_mask in (Replicate(), Shard(mask.dim() - 1), Shard(0)):
                if isinstance(of_mask, Shard) and mask.shape[of_mask.dim] == 1:
                    continue
                (its,) = sharded((mask,), mesh, of_mask)
                check(sage_attention(*parts, its, kernel="reference"), one, exact)
            assert kind and name
        for shape in ((H, 1), (B, H, N), (1, H, 1)):
            sink = torch.randn(shape)
            options = {"kernel_name": "reference"}
            plain = torch.ops.sage_inductor.attention(q, k, v, sink=sink, **options)
            for of_sink in (Replicate(), Shard(len(shape) - 2)):
                (its,) = sharded((sink,), mesh, of_sink)
                out = torch.ops.sage_inductor.attention(*parts, sink=its, **options).full_tensor()
                assert relative_l2(out, plain) < 0.02, (name, shape)


@on_every_rank
def eager_with_grouped_heads(mesh: Any) -> None:
    for kv_heads in (2, 1):  # one key head is not to be divided among two ranks
        q, k, v = inputs(kv_heads)
        one = sage_attention(q, k, v, enable_gqa=True, kernel="reference")
        exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        for name, placement in placements().items():
            parts = sharded((q, k, v), mesh, placement)
            check(sage_attention(*parts, enable_gqa=True, kernel="reference"), one, exact)
            assert name


@on_every_rank
def eager_of_uneven_shards(mesh: Any) -> None:
    q, k, v = (torch.randn(1, 3, 41, D) for _ in range(3))
    one, exact = sage_attention(q, k, v, kernel="reference"), F.scaled_dot_product_attention(q, k, v)
    for name, placement in placements().items():
        check(sage_attention(*sharded((q, k, v), mesh, placement), kernel="reference"), one, exact)
        assert name


@on_every_rank
def ranks_of_uneven_shards_decide_alike(mesh: Any) -> None:
    """The second rank has one query, and would leave attention to SDPA."""
    from torch.distributed.tensor import Replicate, Shard

    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 8, 16)
    parts = [*sharded((q,), mesh, Shard(2)), *sharded((k, k), mesh, Replicate())]
    with torch.no_grad(), written_out():
        if torch_cannot(plain_sdpa, *parts):
            raise SkipTest("torch cannot multiply such matrices")
        out, (site,) = compiled(plain_sdpa, *parts)
    assert site.rewritten and site.query.shape == (1, 2, 2, 16), site
    check(out, sage_attention(q, k, k, kernel="reference"), F.scaled_dot_product_attention(q, k, k))


@on_every_rank
def a_mixture_raises(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    are_taught()
    q, k, v = inputs()
    (part,) = sharded((q,), mesh, Replicate())
    for call in (
        lambda: sage_attention(part, k, v, kernel="reference"),
        lambda: torch.ops.sage_inductor.attention(part, k, v, kernel_name="reference"),
    ):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            assert "DTensor" in str(error), error
        else:
            raise AssertionError("no error")
    one = sage_attention(q, k, v, kernel="reference")
    with implicit_replication():
        for out in (
            torch.ops.sage_inductor.attention(part, k, v, kernel_name="reference"),
            sage_attention(part, k, v, kernel="reference"),
            sage_attention(q, *sharded((k, v), mesh, Replicate()), kernel="reference"),
        ):
            assert torch.equal(out.full_tensor(), one)


@on_every_rank
def inputs_that_fit_in_parts_only(mesh: Any) -> None:
    """Each rank's part of a mask of one sequence a rank broadcasts to its part of the query; the whole does not."""
    from torch.distributed.tensor import Replicate, Shard

    are_taught()
    q, k, v = (torch.randn(4, 6, 8, 16) for _ in range(3))
    three, four = k[:, :3], k[:, :4]
    for dim, keys, options, message in (
        (0, k, {"attn_mask": torch.zeros(2, 1, 8, 8)}, "attn_mask (2, 1, 8, 8) does not broadcast"),
        (1, k, {"attn_mask": torch.zeros(1, 2, 1, 8)}, "attn_mask (1, 2, 1, 8) does not broadcast"),
        (1, k, {"sink": torch.zeros(2, 1)}, "sink (2, 1) does not broadcast"),
        (0, k[:2], {}, "key has batch 2, query 4"),
        (1, three, {}, "query has 6 heads, key has 3"),
        (1, four, {"enable_gqa": True}, "6 query heads are not a multiple of 4 key heads"),
    ):
        parts = sharded((q, keys, keys), mesh, Shard(dim))
        for name, item in options.items():
            if isinstance(item, Tensor):
                options[name] = sharded((item,), mesh, Replicate())[0]
        try:
            torch.ops.sage_inductor.attention(*parts, **options, kernel_name="reference")
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")


@on_every_rank
def a_rank_that_is_not_in_the_mesh(mesh: Any) -> None:
    """It gets an empty part, as from torch's operators."""
    from torch.distributed.device_mesh import DeviceMesh

    are_taught()
    alone = DeviceMesh("cpu", [0])
    parts = [part.requires_grad_() for part in sharded(inputs(), alone, placements()["heads"])]
    with torch.no_grad(), written_out():
        out, lse = sage_attention(*parts, kernel="reference", return_lse=True)
        found, (site,) = compiled(plain_sdpa, *parts)
    trained = torch.ops.sage_inductor.attention_training(*parts, kernel_name="reference")
    gradients = torch.autograd.grad(trained.sum(), parts)
    is_here = mesh.get_local_rank() == 0
    assert site.rewritten == is_here and (is_here or "this rank=outside" in site.reasons[0]), site
    for tensor in (out, found, trained, *gradients):
        assert tensor.shape == (B, H, N, D) and tensor.to_local().numel() == is_here * tensor.numel()
    assert lse.shape == (B, H, N)


@on_every_rank
def in_the_memory_order_of_whole_inputs(mesh: Any) -> None:
    """What is sent to where it is computed lies in memory otherwise; a view behind attention, and behind its gradient, would fail."""
    are_taught()
    x = torch.randn(B, N, H * D)

    def attend(x: Tensor, operator: Any) -> Tensor:
        q, k, v = (part.view(B, N, H, D).transpose(1, 2) for part in (x * 1.1, x * 0.9, x + 1))
        return operator(q, k, v, is_causal=True).transpose(1, 2).view(B, N, H * D)

    exact_x = x.clone().requires_grad_()
    exact = attend(exact_x, F.scaled_dot_product_attention)
    (expected,) = torch.autograd.grad(exact.square().sum(), exact_x)
    for name in ("batch", "heads", "queries"):  # dims 0, 1, 2 of x
        (part,) = sharded((x,), mesh, placements()[name])
        out = attend(part, lambda *args, **options: sage_attention(*args, **options, kernel="reference"))
        assert relative_l2(out.full_tensor(), exact.detach()) < 0.03
        part.requires_grad_()
        out = attend(
            part,
            lambda *args, **options: torch.ops.sage_inductor.attention_training(
                *args, **options, kernel_name="reference"
            ),
        )
        (gradient,) = torch.autograd.grad(out.square().sum(), part)
        assert relative_l2(gradient.full_tensor(), expected) < 0.03, name


@on_every_rank
def more_dims_than_four(mesh: Any) -> None:
    """Those in front are folded, and sharded so that they can be."""
    from torch.distributed.tensor import Shard

    for leading, dim in (((2, 1), 1), ((3, 2), 0), ((3, 2), 4), ((1, 3), 0)):
        q = torch.randn(*leading, 2, 8, 16)
        (part,) = sharded((q,), mesh, Shard(dim))
        out = sage_attention(part, part, part, kernel="reference")
        check(out, sage_attention(q, q, q, kernel="reference"), F.scaled_dot_product_attention(q, q, q))


@on_every_rank
def the_other_ways_in(mesh: Any) -> None:
    """The backend classes take DTensors; the two halves of attention do not, and say so."""
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in inputs())
    parts = sharded((q, k, v), mesh, placements()["queries"])  # which is their dim of heads
    impl = SageAttentionBackend.get_impl_cls()(H, D, False, None, kernel="reference")
    one = impl.forward(q, k, v)
    exact = F.scaled_dot_product_attention(*inputs()).transpose(1, 2)
    check(impl.forward(*parts), one, exact)
    into = torch.empty_like(parts[0])
    assert impl.forward(*parts, None, into) is into
    check(into, one, exact)
    of_whole = quantize_key_value(k, v, kernel="reference")
    for call in (
        lambda: quantize_key_value(*parts[1:], kernel="reference"),
        lambda: attention_prequantized(parts[0], of_whole),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "is a DTensor (valid: a plain tensor" in str(error), error
        else:
            raise AssertionError("no error")


@contextmanager
def written_out() -> Iterator[None]:
    """torch's SDPA is its decomposition, which DTensor knows, masks included."""
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def torch_cannot(function: Any, *args: Any) -> bool:
    """Whether plain torch raises at `function`, eager and compiled, so that there is nothing to rewrite. torch 2.11 cannot
    multiply matrices of DTensors sharded by heads, since its matmul flattens the dims before the last two, nor flatten channels
    that are sharded. torch 2.13 can."""
    if torch.__version__ >= (2, 13):
        return False
    torch.compiler.reset()
    for plain in (function, torch.compile(function, backend="eager")):
        try:
            plain(*args)
        except RuntimeError as error:
            assert "Attempted to flatten multiple dimensions" in str(error), error
        else:
            assert plain is function, "compiled, torch raises at what it can do when eager"
            return False
    return True


def plain_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, **options) * 1.0


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * D**-0.5, -1) @ v


def as_models_do(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def compiled(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    torch.compiler.reset()
    backend = RewritingBackend(REFERENCE)
    out = torch.compile(function, backend=backend)(*args, **kwargs)
    assert len(backend.graphs) == 1
    return out, backend.sites


@on_every_rank
def compiled_in_five_placements(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate

    q, k, v = inputs()
    one = sage_attention(q, k, v, kernel="reference")
    exact = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad(), written_out():
        for name, placement in placements().items():
            parts = sharded((q, k, v), mesh, placement)
            functions = [plain_sdpa]
            functions += [by_hand] if name in ("heads", "queries", "channels") else []
            functions += [as_models_do] if name in ("batch", "heads") else []
            for function in functions:
                if torch_cannot(function, *parts):
                    continue
                out, (site,) = compiled(function, *parts)
                eager = function(*parts)
                if any(item.is_partial() for item in eager.placements):
                    assert not site.rewritten and "placements of the output" in site.reasons[0]
                    continue
                assert site.rewritten, (name, function.__name__, site.reasons)
                assert out.placements == eager.placements and out.stride() == eager.stride(), (name, function)
                shape = (
                    1 if name == "batch" else B,
                    2 if name == "heads" else H,
                    48 if name == "queries" else N,
                )
                if function is plain_sdpa and name != "channels":
                    assert site.query.shape[:3] == shape, (name, site.query)
                check(out, _like(function, one), _like(function, exact))
        names = ("batch", "heads", "queries", "replicated")
        for number, (kind, mask) in enumerate(masks().items()):
            name = names[number % len(names)]
            parts = sharded((q, k, v), mesh, placements()[name])
            (its,) = sharded((mask,), mesh, Replicate())
            if torch_cannot(plain_sdpa, *parts, its):
                continue
            out, (site,) = compiled(plain_sdpa, *parts, its)
            assert site.rewritten, (name, kind, site.reasons)
            masked = F.scaled_dot_product_attention(q, k, v, mask)
            check(out, sage_attention(q, k, v, mask, kernel="reference"), masked)


@on_every_rank
def compiled_with_causality_and_grouped_heads(mesh: Any) -> None:
    teach_dtensors_sdpa_of_cpus()
    q, k, v = inputs(2)
    single = sage_attention(q, k, v, enable_gqa=True, is_causal=True, kernel="reference")
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    with torch.no_grad():
        for name in ("batch", "heads", "queries"):
            parts = sharded((q, k, v), mesh, placements()[name])
            out, (site,) = compiled(plain_sdpa, *parts, enable_gqa=True, is_causal=True)
            assert site.rewritten, (name, site.reasons)
            check(out, single, exact)


@on_every_rank
def sage_attention_compiled(mesh: Any) -> None:
    from torch._dynamo import lookup_backend

    q, k, v = inputs()
    one = sage_attention(q, k, v, is_causal=True, kernel="reference")
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sage_attention(q, k, v, is_causal=True, kernel="reference") * 1

    fast = torch.compile(attend, backend=lookup_backend("aot_eager"), fullgraph=True)
    with torch.no_grad():
        for name in ("heads", "queries"):
            check(fast(*sharded((q, k, v), mesh, placements()[name])), one, exact)


@on_every_rank
def values_that_a_mask_hides_in_part(mesh: Any) -> None:
    """Rows that finite numbers hide attend to all keys alike, in parts as in one."""
    from torch.distributed.tensor import Replicate

    q, k, v = inputs()
    padding = torch.ones(B, 1, 1, N, dtype=torch.bool)
    padding[0, ..., :10] = False

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = (1.0 - padding.to(q.dtype)) * torch.finfo(q.dtype).min
        return torch.softmax(q @ k.mT * D**-0.5 + mask, -1) @ v

    with torch.no_grad():
        single, _ = compiled(attend, q, k, v, padding)
        for name in ("batch", "heads"):
            parts = [*sharded((q, k, v), mesh, placements()[name]), *sharded((padding,), mesh, Replicate())]
            if torch_cannot(attend, *parts):
                continue
            out, (site,) = compiled(attend, *parts)
            assert site.rewritten, site.reasons
            check(out, single, attend(q, k, v, padding))


def _like(function: Any, attention: Tensor) -> Tensor:
    return attention.transpose(1, 2).flatten(2) if function is as_models_do else attention


@on_every_rank
def explain_shows_parts_and_placements(mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    teach_dtensors_sdpa_of_cpus()
    q, k, v = inputs()
    named = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    with torch.no_grad():
        report = explain(plain_sdpa, *sharded((q, k, v), named, placements()["heads"]), config=REFERENCE)
    (site,) = report.sites
    assert site.rewritten and str(site.query) == f"2x2x{N}x{D} float32 HND of tp=2: S(1)", site.query
    assert "tp=2: S(1)" in str(report) and "tp=2: S(1)" in report.to_json()


@on_every_rank
def compiled_for_symbolic_lengths(mesh: Any) -> None:
    """As many graphs as plain torch.compile makes, which for redistributed DTensors are two."""
    teach_dtensors_sdpa_of_cpus()
    for name, expected in (("heads", 1), ("queries", 2)):
        backend = RewritingBackend(REFERENCE)
        plain: list[Any] = []

        def keep(graph_module: Any, example_inputs: Any, plain: list[Any] = plain) -> Any:
            plain.append(graph_module)
            return graph_module.forward

        for each in (keep, backend):
            torch.compiler.reset()
            fast = torch.compile(plain_sdpa, backend=each, dynamic=True)
            for length in (N, N // 2):
                q, k, v = (tensor[:, :, :length].contiguous() for tensor in inputs())
                exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                one = sage_attention(q, k, v, is_causal=True, kernel="reference")
                with torch.no_grad():
                    check(fast(*sharded((q, k, v), mesh, placements()[name]), is_causal=True), one, exact)
        assert len(plain) == len(backend.graphs) == expected, (name, len(plain), len(backend.graphs))
        for site in backend.sites:
            assert site.rewritten == (name == "heads"), site
            assert name == "heads" or "changed along a symbolic size" in site.reasons[0], site


@on_every_rank
def calibration_leaves_dtensors(mesh: Any) -> None:
    class Model(nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Tensor:
            sharded = plain_sdpa(q, k, v).to_local()
            return sharded + F.scaled_dot_product_attention(sharded, sharded, sharded)

    teach_dtensors_sdpa_of_cpus()
    parts = tuple(sharded(inputs(), mesh, placements()["heads"]))
    plan = calibrate(Model(), [parts], tolerance=0.1, config=Config(kernel="reference"))
    first, second = sorted(plan.sites, key=lambda site: site.name)
    assert not first.measured and "DTensor" in first.reasons[0] and second.measured, plan


@on_every_rank
def training_in_five_placements(mesh: Any) -> None:
    are_taught()
    teach_dtensors_sdpa_of_cpus()
    q, k, v = inputs()
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    weights = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(3))
    exact = plain_sdpa(*whole, is_causal=True)
    expected = torch.autograd.grad((exact * weights).sum(), whole)
    one = sage_attention(q, k, v, is_causal=True, kernel="reference")
    for name, placement in placements().items():
        parts = [part.requires_grad_() for part in sharded((q, k, v), mesh, placement)]
        (its,) = sharded((weights,), mesh, placement)
        out, (site,) = compiled(plain_sdpa, *parts, is_causal=True)
        assert site.rewritten, (name, site.reasons)
        check(out.detach(), one, exact.detach())
        grads = torch.autograd.grad((out * its).sum(), parts)
        for part, grad, wanted in zip(parts, grads, expected, strict=True):
            assert grad.placements == part.placements, name
            assert relative_l2(grad.full_tensor(), wanted) < 1e-5, name
    # Queries on the sequence, keys and values whole: their gradients are sums over ranks.
    parts = [part.requires_grad_() for part in sharded((q, k, v), mesh, placements()["queries"])]
    (its,) = sharded((weights,), mesh, placements()["queries"])
    out = torch.ops.sage_inductor.attention_training(*parts, kernel_name="reference")
    assert out.placements == (placements()["queries"],)
    plain = plain_sdpa(*whole)
    wanted = torch.autograd.grad((plain * weights).sum(), whole)
    for grad, exact_grad in zip(torch.autograd.grad((out * its).sum(), parts), wanted, strict=True):
        assert relative_l2(grad.full_tensor(), exact_grad) < 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 16)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """A step's loss, gradients and sites."""
    out, sites = compiled(model, x)
    loss = out.square().mean()
    loss.backward()
    grads = {name: item.grad for name, item in model.named_parameters()}
    whole = {
        name: item.full_tensor() if hasattr(item, "full_tensor") else item for name, item in grads.items()
    }
    return loss.detach(), whole, sites


def training_is_as_in_one_process(model: nn.Module, x: Tensor, mine: Tensor) -> None:
    """`model` is parallel, of the parameters of a `Block` seeded 5, and is given `mine` of `x`."""
    torch.manual_seed(5)
    exact_block = Block()
    exact_block(x).square().mean().backward()
    exact = {name: item.grad for name, item in exact_block.named_parameters()}
    torch.manual_seed(5)
    _, one, _ = trained(Block(), x)
    _, found, sites = trained(model, mine)
    assert [site.rewritten for site in sites] == [True], sites
    # Softmax does not see what is added to all keys: the gradient of their bias is 0, and what is left of it is rounding.
    assert all(each["k.bias"].norm() < 1e-5 * each["k.weight"].norm() for each in (exact, one, found))
    for name in found.keys() - {"k.bias"}:
        error, single = relative_l2(found[name], exact[name]), relative_l2(one[name], exact[name])
        assert error <= MARGIN * single + 1e-5, (name, error, single)


@on_every_rank
def tensor_parallel_training(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    teach_dtensors_sdpa_of_cpus()
    x = torch.randn(B, 32, 64)
    for local in (False, True):  # DTensors at SDPA, or this rank's heads
        torch.manual_seed(5)
        plan: dict[str, Any] = {
            name: ColwiseParallel(input_layouts=Replicate(), use_local_output=local) for name in "qkv"
        }
        plan["o"] = RowwiseParallel(output_layouts=Replicate())
        training_is_as_in_one_process(parallelize_module(Block(), mesh, plan), x, x)


@on_every_rank
def fully_sharded_training(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(B, 32, 64)
    torch.manual_seed(5)
    model = Block()
    fully_shard(model, mesh=mesh)
    training_is_as_in_one_process(model, x, x.chunk(2)[mesh.get_local_rank()])


@on_every_rank
def training_with_masks(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate

    are_taught()
    q, k, v = inputs(2)
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    weights = torch.randn(B, H, N, D)
    for kind, mask in masks().items():
        exact = F.scaled_dot_product_attention(*whole, mask, enable_gqa=True)
        expected = torch.autograd.grad((exact * weights).sum(), whole)
        one = sage_attention(q, k, v, mask, enable_gqa=True, kernel="reference")
        for name in ("batch", "heads", "queries"):
            parts = [part.requires_grad_() for part in sharded((q, k, v), mesh, placements()[name])]
            (its,) = sharded((weights,), mesh, placements()[name])
            (its_mask,) = sharded((mask,), mesh, Replicate())
            options = {"enable_gqa": True, "kernel_name": "reference"}
            out = torch.ops.sage_inductor.attention_training(*parts, its_mask, **options)
            check(out.detach(), one, exact.detach())
            for grad, wanted in zip(torch.autograd.grad((out * its).sum(), parts), expected, strict=True):
                assert relative_l2(grad.full_tensor(), wanted) < 1e-5, (kind, name)


@on_every_rank
def packed_sequences(mesh: Any) -> None:
    """Ids of segments follow the dims that they have, eager, in training, and where a compiled graph has them as a mask."""
    from torch.distributed.tensor import Replicate

    are_taught()
    q, k, v = inputs()
    ids = (torch.arange(N)[None] // torch.tensor([[30], [50]])).int()
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    exact = F.scaled_dot_product_attention(*whole, mask)
    expected = torch.autograd.grad(exact.sum(), whole)
    segments = {"query_segments": ids, "key_segments": ids}
    one = sage_attention(q, k, v, kernel="reference", **segments)

    def masked(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, ids[:, None, :, None] == ids[:, None, None, :])

    for name in ("batch", "heads", "queries", "replicated"):
        parts = sharded((q, k, v), mesh, placements()[name])
        (its,) = sharded((ids,), mesh, Replicate())
        of_parts = {"query_segments": its, "key_segments": its}
        check(sage_attention(*parts, kernel="reference", **of_parts), one, exact.detach())
        leaves = [part.requires_grad_() for part in sharded((q, k, v), mesh, placements()[name])]
        out = torch.ops.sage_inductor.attention_training(*leaves, kernel_name="reference", **of_parts)
        check(out.detach(), one, exact.detach())
        for grad, wanted in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
            assert relative_l2(grad.full_tensor(), wanted) < 1e-5, name
        if name in ("batch", "heads"):
            with torch.no_grad(), written_out():
                if torch_cannot(masked, *parts, its):
                    continue
                # DTensor has no searchsorted, by which ids of 64 bits become ids of 32: their mask is read as it is.
                for ids_of_model in (its, its.long()) if name == "heads" else (its,):
                    out, (site,) = compiled(masked, *parts, ids_of_model)
                    assert site.rewritten, site.reasons
                    check(out, one, exact.detach())


@on_every_rank
def without_autograd(mesh: Any) -> None:
    """In inference mode, and under autocast."""
    q, k, v = inputs()
    parts = sharded((q, k, v), mesh, placements()["heads"])
    exact = F.scaled_dot_product_attention(q, k, v)
    one = sage_attention(q, k, v, kernel="reference")
    with torch.inference_mode():
        check(
            sage_attention(*sharded((q, k, v), mesh, placements()["heads"]), kernel="reference"), one, exact
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = sage_attention(*parts, kernel="reference")
        assert out.dtype == torch.bfloat16
        check(out.float(), sage_attention(q, k, v, kernel="reference").float(), exact)


test_on_two_ranks = on_ranks(__file__, 2)

if __name__ == "__main__":
    main(globals())
