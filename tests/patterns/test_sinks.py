"""Attention sinks: a column beside those of the keys, which takes weight and has no value (gpt-oss)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor
from sage_inductor import Config
from sage_inductor.operators import inference as ops
from sage_inductor.operators.schemas import EXACT
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
BOUND = 0.02
SINKS = torch.tensor([-1.0, 0.0, 2.0, 5.0])
LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("inference")


def qkv(q_len: int = 24, kv_len: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, q_len, 32), torch.randn(2, 2, kv_len, 32), torch.randn(2, 2, kv_len, 32)


def repeated(item: Tensor) -> Tensor:
    batch, heads, length, dim = item.shape
    return item[:, :, None].expand(batch, heads, 2, length, dim).reshape(batch, 2 * heads, length, dim)


def scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    product = torch.matmul(q, repeated(k).transpose(2, 3)) * 0.2
    return product if mask is None else product + mask


def column(sinks: Tensor, q: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None = None) -> Tensor:
    both = torch.cat([scores(q, k, mask), column(sinks, q)], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeated(v)).transpose(1, 2).contiguous()


def flint(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    logits = torch.matmul(q.float(), repeated(k).float().transpose(2, 3)) * 0.2
    both = torch.cat([logits, column(sinks, q)], dim=-1)
    return F.softmax(both, dim=-1)[..., :-1].to(v.dtype) @ repeated(v)


def narrowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    both = torch.concat((scores(q, k), sinks.view(1, -1, 1, 1).repeat(2, 1, 24, 1)), -1)
    return both.softmax(-1).narrow(-1, 0, 24) @ repeated(v)


def by_size(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    weights = torch.cat([scores(q, k), column(sinks, q)], 3).softmax(3)
    return weights[:, :, :, : k.shape[2]] @ repeated(v)


def of_each_query(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    both = torch.cat([scores(q, k), q.mean(-1, keepdim=True) * sinks[:, None, None]], -1)
    return both.softmax(-1)[..., :-1] @ repeated(v)


def first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    both = torch.cat((column(sinks, q), scores(q, k)), dim=-1)
    return both.softmax(-1)[..., 1:] @ repeated(v)


def first_narrowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    weights = torch.cat([column(sinks, q), scores(q, k)], 3).softmax(3)
    return weights.narrow(3, 1, k.shape[2]) @ repeated(v)


def run(function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, list[Any]]:
    backend = RewritingBackend(CONFIG)
    return torch.compile(function, backend=backend, **options)(*inputs), backend.sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function", [gpt_oss, flint, narrowed, by_size, of_each_query, first, first_narrowed]
)
def test_found(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in (*qkv(), SINKS)]
    expected = function(*inputs)
    out, sites = run(function, *inputs)
    assert [(site.rewritten, site.mask) for site in sites] == [(True, "none")]
    assert sites[0].key.shape[1] == 2  # read unrepeated
    assert relative_l2(out, expected) < BOUND and max_error(out, expected) < 2 * BOUND
    assert out.dtype == expected.dtype and out.stride() == expected.stride()


def causal(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return gpt_oss(q, k, v, sinks, torch.full((24, 24), LOWEST).triu(1))


def padded(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, allowed: Tensor) -> Tensor:
    mask = torch.zeros(2, 1, 1, 24).masked_fill(~allowed[:, None, None], LOWEST)
    return gpt_oss(q, k, v, sinks, mask)


def test_masks_are_what_they_are_without_a_sink() -> None:
    inputs = (*qkv(), SINKS)
    out, sites = run(causal, *inputs)
    assert [site.mask for site in sites] == ["causal"]
    assert relative_l2(out, causal(*inputs)) < BOUND


def test_queries_without_keys_give_all_weight_to_the_sink() -> None:
    """Without one, a finite number that hides all keys would leave all of them the same weight."""
    allowed = torch.ones(2, 24, dtype=torch.bool)
    allowed[0, 9:] = False
    allowed[1] = False
    inputs = (*qkv(), SINKS, allowed)
    out, sites = run(padded, *inputs)
    assert [site.mask for site in sites] == ["key_padding"]
    expected = padded(*inputs)
    assert bool((expected[1] == 0).all()) and bool((out[1] == 0).all())
    assert relative_l2(out, expected) < BOUND


def test_lengths_that_change() -> None:
    backend = RewritingBackend(CONFIG)
    for function in (gpt_oss, first):
        compiled = torch.compile(function, backend=backend, dynamic=True)
        for length in (24, 40, 56):
            inputs = (*qkv(length, length), SINKS)
            assert relative_l2(compiled(*inputs), function(*inputs)) < BOUND
    assert [site.rewritten for site in backend.sites] == [True, True]


def test_inductor_compiles_it() -> None:
    inputs = (*qkv(), SINKS)
    compiled = torch.compile(gpt_oss, backend="sage_inductor", options={"sage.kernel": "reference"})
    assert relative_l2(compiled(*inputs), gpt_oss(*inputs)) < 0.05


def test_the_operator_with_exact_attention() -> None:
    q, k, v = qkv()
    out = ops.attention(q, repeated(k), repeated(v), scale=0.2, kernel_name=EXACT, sink=SINKS[None, :, None])
    assert relative_l2(out, gpt_oss(q, k, v, SINKS).transpose(1, 2)) < 1e-5


def test_a_sink_that_is_written_to_is_read_before() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        sinks = sinks * 1.0
        weights = torch.cat([scores(q, k), column(sinks, q)], -1).softmax(-1)[..., :-1]
        sinks.add_(3.0)
        return weights @ repeated(v) + sinks.sum()

    inputs = (*qkv(), SINKS)
    out, _ = run(model, *inputs)
    assert relative_l2(out, model(*inputs)) < BOUND


def test_gradients_keep_it_exact(new_process: Callable[[], None]) -> None:
    q, k, v = qkv()
    sinks = SINKS.clone().requires_grad_()
    for config in (CONFIG, Config(kernel="reference", training=True)):
        new_process()
        backend = RewritingBackend(config)
        with torch.enable_grad():
            out = torch.compile(gpt_oss, backend=backend)(q, k, v, sinks)
        (site,) = backend.sites
        assert not site.rewritten and any("requires_grad" in reason for reason in site.reasons)
        assert torch.equal(out, gpt_oss(q, k, v, sinks))


LEFT: dict[str, Callable[..., Any]] = {
    "weight of the sink read": lambda both, v: both.softmax(-1)[..., :-1] @ v + both.softmax(-1)[..., -1:],
    "weights read": lambda both, v: (w := both.softmax(-1))[..., :-1] @ v + w.sum(),
    "another column left out": lambda both, v: both.softmax(-1)[..., 1:] @ v,
    "the first two left out": lambda both, v: both.softmax(-1)[..., 2:] @ v[:, :, 1:],
    "two columns left out": lambda both, v: both.softmax(-1)[..., :-2] @ v[:, :, 1:],
    "rows left out": lambda both, v: (both.softmax(-1)[..., :-1, :-1]) @ v,
    "every other one": lambda both, v: both.softmax(-1)[..., :-1:2] @ v[:, :, ::2],
    "scores scaled together": lambda both, v: (both * 0.5).softmax(-1)[..., :-1] @ v,
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return LEFT[name](torch.cat([scores(q, k), column(sinks, q)], -1), repeated(v))

    inputs = (*qkv(), SINKS)
    out, sites = run(model, *inputs)
    assert sites == [] and torch.equal(out, model(*inputs))


def test_no_column_was_added() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).softmax(-1)[..., :-1] @ repeated(v)[:, :, :-1]

    inputs = qkv()
    out, sites = run(model, *inputs)
    assert sites == [] and torch.equal(out, model(*inputs))


def test_items_are_no_columns() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, *_ = scores(q, k).softmax(-1).unbind(1)
        second = scores(q, k).softmax(-1)[:, 1]
        return first @ v[:, 0] + second @ v[:, 0]

    inputs = qkv()
    out, _ = run(model, *inputs)
    assert torch.equal(out, model(*inputs))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(SINKS.clone())
        self.project = nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).split([128, 64, 64], -1)
        q, k, v = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in parts)
        return x + gpt_oss(q, k, v, self.sinks).flatten(2)


def test_calibration_measures_it() -> None:
    model = nn.Sequential(Layer(), Layer()).eval()
    plan = sage_inductor.calibrate(model, [(torch.randn(2, 24, 128),)], config=Config(kernel="reference"))
    assert [len(site.measured) for site in plan.sites] == [3, 3]
    errors = [measured.rel_l2.worst for site in plan.sites for measured in site.measured]
    assert all(error is not None and 1e-4 < error < 0.1 for error in errors)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "triton"])
@pytest.mark.parametrize("precision", ["fast", "balanced", "accurate"])
def test_kernels(kernel: str, precision: str) -> None:
    q = torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 1000, 64, device="cuda", dtype=q.dtype) for _ in range(2))
    sinks = SINKS.to(q)

    def model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        lowest = torch.finfo(torch.bfloat16).min
        mask = torch.full((1000, 1000), lowest, device=q.device, dtype=q.dtype).triu(1)
        return gpt_oss(q, k, v, sinks, mask)

    options = {"sage.kernel": kernel, "sage.precision": precision}
    out = torch.compile(model, backend="sage_inductor", options=options)(q, k, v, sinks)
    assert relative_l2(out, model(*(tensor.double() for tensor in (q, k, v, sinks)))) < 0.05
