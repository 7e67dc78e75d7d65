"""Exact attention, which the operators fall back to, take gradients of, and are calibrated against: held to float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor.operators.inference as ops
from sage_inductor import Config, NotEligibleError, calibrate, rewrite_exported, sage_attention
from sage_inductor.kernels import AttentionParams
from sage_inductor.measurement.ground_truth import EPS, float64_attention
from sage_inductor.operators.inputs import as_4d
from sage_inductor.operators.training import attention_training
from sage_inductor.testing import max_error, relative_l2

HEADS, LENGTH, DIM = 4, 200, 32
LOW = [torch.bfloat16, torch.float16]
REFERENCE = {"kernel_name": "reference", "precision": "accurate"}


def qkv(dtype: torch.dtype, kv_heads: int = HEADS, layout: str = "HND") -> tuple[Tensor, Tensor, Tensor]:
    def make(heads: int) -> Tensor:
        if layout == "NHD":
            return torch.randn(2, LENGTH, heads, DIM, dtype=dtype).transpose(1, 2)
        return torch.randn(2, heads, LENGTH, DIM, dtype=dtype)

    return make(HEADS), make(kv_heads), make(kv_heads)


def alibi() -> Tensor:
    """Slopes times positions, float32 `[heads, 1, keys]`: up to 750, which bfloat16 has in steps of 4."""
    return 5 * torch.tensor([0.75, 0.5, 0.25, 0.125])[:, None, None] * torch.arange(LENGTH)


def lowest() -> Tensor:
    """The lowest float32, -inf in 16 bits, hides keys; of the first queries all."""
    hidden = torch.rand(2, 1, LENGTH, LENGTH) > 0.5
    hidden[:, :, :9] = True
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)


MASKS: dict[str, Callable[[], Tensor]] = {
    "alibi": alibi,
    "lowest": lowest,
    "30 + noise": lambda: 30 + torch.randn(2, HEADS, LENGTH, LENGTH),
    "over keys": lambda: 40 + 3 * torch.randn(2, 1, 1, LENGTH),
    "2-D": lambda: 3e4 + torch.randn(LENGTH, LENGTH),
}


def assert_exact(out: Tensor, expected: Tensor) -> None:
    """Within the rounding of the output, but for a factor of 1.5 for the sums of float32."""
    assert relative_l2(out, expected) < 1.5 * EPS[out.dtype]
    assert max_error(out, expected) < 1.5 * EPS[out.dtype] * float(expected.abs().max())


WAYS: dict[str, Callable[..., Any]] = {
    "sage_attention": lambda q, k, v, mask: sage_attention(q, k, v, mask, enable_gqa=True),
    "kernel sdpa": lambda q, k, v, mask: ops.attention(q, k, v, mask, enable_gqa=True, kernel_name="sdpa"),
    "min_q_len": lambda q, k, v, mask: ops.attention(
        q, k, v, mask, enable_gqa=True, min_q_len=1000, **REFERENCE
    ),
    "min_kv_len, lse": lambda q, k, v, mask: ops.attention_lse(
        q, k, v, mask, enable_gqa=True, min_kv_len=1000, **REFERENCE
    )[0],
    "compiled": lambda q, k, v, mask: torch.compile(
        lambda: sage_attention(q, k, v, mask, enable_gqa=True), backend="aot_eager"
    )(),
    "gradients": lambda q, k, v, mask: ops.attention(
        q.clone().requires_grad_(), k, v, mask, enable_gqa=True, **REFERENCE
    ).detach(),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_float32_mask_is_not_rounded(way: str, mask: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    bias = MASKS[mask]()
    for kv_heads, layout in ((HEADS, "HND"), (2, "NHD")):
        q, k, v = qkv(dtype, kv_heads, layout)
        expected, _ = float64_attention(q, k, v, bias)
        out = WAYS[way](q, k, v, bias)
        assert out.dtype == dtype and out.stride() == q.stride()
        assert_exact(out, expected)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mask", MASKS)
def test_the_lse_is_of_the_mask_that_is_read(mask: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    bias = MASKS[mask]()
    _, expected = float64_attention(q, k, v, bias)
    for options in ({"kernel_name": "sdpa"}, {**REFERENCE, "min_q_len": 1000}):
        _, lse = ops.attention_lse(q, k, v, bias, **options)
        assert relative_l2(lse, expected) < 1e-6


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mask", [*MASKS, "lowest, in the dtype", "-1e9"])
def test_the_gradient_reads_the_mask_as_it_is(mask: str, dtype: torch.dtype) -> None:
    """Also of queries of which a number hides all keys, where the backward passes of SDPA's kernels are wrong."""
    bias = lowest().clamp(min=-1e9) if mask == "-1e9" else MASKS[mask.split(",")[0]]()
    if mask == "lowest, in the dtype":
        bias = bias.clamp(min=torch.finfo(dtype).min).to(dtype)
    inputs = [tensor.requires_grad_() for tensor in qkv(dtype)]
    grad = torch.randn(2, HEADS, LENGTH, DIM, dtype=dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    lost = bias.amax(-1, keepdim=True) <= -1e9  # the number leaves nothing of these scores
    query = doubles[0].masked_fill(lost, 0)
    expected = torch.autograd.grad(float64_attention(query, *doubles[1:], bias)[0], doubles, grad.double())
    for out in (attention_training(*inputs, bias, **REFERENCE), ops.attention(*inputs, bias, **REFERENCE)):
        for one, right in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
            # The sum of probabilities times gradients cancels: its rounding in 16 bits is that of SDPA.
            assert relative_l2(one, right) < 8 * EPS[dtype]


@pytest.mark.parametrize("of_mask", [False, True])
def test_gradients_beside_a_mask_that_is_expanded(of_mask: bool) -> None:
    """Those of a mask with memory for each element, its own included: they differ between heads."""
    q, k, v = (tensor.requires_grad_() for tensor in qkv(torch.float32))
    bias = lowest().expand(2, HEADS, LENGTH, LENGTH)
    assert 0 in bias.stride()
    grad = torch.randn(2, HEADS, LENGTH, DIM)
    found = []
    for mask in (bias.detach(), bias.detach().contiguous()):
        wanted = [q, k, v, *([mask.requires_grad_()] if of_mask else [])]
        out = ops.attention(q, k, v, mask, kernel_name="sdpa")
        found.append(torch.autograd.grad(out, wanted, grad))
    for one, right in zip(*found, strict=True):
        torch.testing.assert_close(one, right)


def test_calibration_compares_with_the_mask_as_it_is() -> None:
    """The figures of bfloat16 are those of a float32 mask: rounded, it would move the output by .2."""
    torch._dynamo.reset()

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, bias)

    model, inputs, bias = Attention(), qkv(torch.bfloat16), alibi()
    plan = calibrate(model, [(*inputs, bias)], tolerance=0.05, config=Config(kernel="reference"))
    (site,) = plan.sites
    expected, _ = float64_attention(*inputs, bias)
    for measured in site.measured:
        out = ops.attention(*inputs, bias, kernel_name="reference", precision=measured.precision)
        assert measured.rel_l2.worst == pytest.approx(relative_l2(out, expected), abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("mask", ["bool", "additive", "over keys"])
def test_gradients_of_grouped_heads_with_a_mask_write_no_scores(
    mask: str, dims: int, dtype: torch.dtype
) -> None:
    q, k, v = (tensor[0] if dims == 3 else tensor for tensor in qkv(dtype, 2))
    bias = torch.rand(LENGTH, LENGTH) > 0.5 if mask == "bool" else torch.randn(LENGTH, LENGTH, dtype=dtype)
    bias = bias[:1] if mask == "over keys" else bias
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = torch.randn(q.shape, dtype=dtype)
    reference, _ = float64_attention(*map(as_4d, doubles), as_4d(bias))
    expected = torch.autograd.grad(reference.view(q.shape), doubles, grad.double())
    out = attention_training(*inputs, bias, enable_gqa=True, **REFERENCE)
    with torch.profiler.profile() as profile:
        grads = torch.autograd.grad(out, inputs, grad)
    names = {event.name for event in profile.events()}  # type: ignore[no-untyped-call,union-attr]
    assert not names & {"aten::_softmax", "aten::bmm", "aten::_scaled_dot_product_attention_math"}, names
    for one, right, tensor in zip(grads, expected, inputs, strict=True):
        assert one.shape == tensor.shape and relative_l2(one, right) < max(8 * EPS[dtype], 1e-5)


class Block(nn.Module):
    """Attention between two projections, whose parameters require gradients."""

    def __init__(self, kv_heads: int = HEADS, masked: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, (HEADS + 2 * kv_heads) * DIM)
        self.out = nn.Linear(HEADS * DIM, 64)
        self.kv_heads, self.masked = kv_heads, masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x)
            .unflatten(-1, (-1, DIM))
            .transpose(1, 2)
            .split([HEADS, self.kv_heads, self.kv_heads], 1)
        )
        mask = x.mean(-1)[:, None, None] > -0.2 if self.masked else None
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.kv_heads != HEADS)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("called", "kv_heads", "masked"),
    [
        ("as it is", HEADS, False),
        ("as it is", 2, True),
        ("decomposed", 2, False),
        ("aot_eager", 2, True),
        ("saved", HEADS, False),
    ],
)
def test_an_exported_program_called_with_gradients_is_exact(
    called: str, kv_heads: int, masked: bool, tmp_path: Any
) -> None:
    torch._dynamo.reset()
    model, x = Block(kv_heads, masked), torch.randn(2, 40, 64)
    program = rewrite_exported(torch.export.export(model, (x,)), Config(kernel="reference"))
    assert "sage_inductor.attention" in str(program.graph)
    if called == "decomposed":
        program = program.run_decompositions()
    if called == "saved":
        torch.export.save(program, tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
    module = program.module()
    run = torch.compile(module, backend=called) if called == "aot_eager" else module
    y = x.clone().requires_grad_()
    out, expected = run(y), model(y)
    assert relative_l2(out, expected) < 1e-5
    (grad,), (right,) = (torch.autograd.grad(item.square().sum(), y) for item in (out, expected))
    assert relative_l2(grad, right) < 1e-5
    run(y).sum().backward()
    model(y).sum().backward()
    for name, parameter in module.named_parameters():
        assert relative_l2(parameter.grad, model.get_parameter(name).grad) < 1e-5
    with torch.no_grad():
        assert 1e-3 < relative_l2(run(y), expected) < 0.05  # in 8 bits again


def test_gradients_reach_the_lse_and_the_sink() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv(torch.float32))
    sink = torch.randn(HEADS, 1, requires_grad=True)
    out = ops.attention(q, k, v, sink=sink, **REFERENCE)
    _, lse = ops.attention_lse(q, k, v, **REFERENCE)
    scores = q @ k.mT * DIM**-0.5
    column = sink[:, :, None].expand(2, HEADS, LENGTH, 1)
    expected = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    assert relative_l2(out, expected) < 1e-5 and relative_l2(lse, scores.logsumexp(-1)) < 1e-5
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sink))
    right = torch.autograd.grad(expected.sum() + scores.logsumexp(-1).sum(), (q, k, v, sink))
    for one, other in zip(grads, right, strict=True):
        assert relative_l2(one, other) < 1e-4


@pytest.mark.parametrize("grad", [False, True])
def test_tangents(grad: bool) -> None:
    """Forward-mode gradients: exact where an operator is called, an error where a kernel is named that has none."""
    q, k, v = (tensor[:1, :2, :32] for tensor in qkv(torch.float32))
    tangent = torch.randn_like(k)

    def by_hand(k: Tensor) -> Tensor:
        return (q @ k.mT * DIM**-0.5).softmax(-1) @ v

    def named(k: Tensor) -> Tensor:
        return sage_attention(q, k, v, kernel="reference")  # type: ignore[return-value]

    with torch.set_grad_enabled(grad):
        expected = torch.func.jvp(by_hand, (k,), (tangent,))
        found = torch.func.jvp(lambda k: ops.attention(q, k, v, **REFERENCE), (k,), (tangent,))
        with pytest.raises(NotEligibleError, match="tangent=key"):
            torch.func.jvp(named, (k,), (tangent,))
        with fwAD.dual_level():
            dual = fwAD.make_dual(k, tangent)
            found += fwAD.unpack_dual(ops.attention(q, dual, v, **REFERENCE))
            with pytest.raises(NotEligibleError, match="tangent=of query, key or value"):
                attention_training(q, dual, v, **REFERENCE)
            assert relative_l2(ops.attention(q, k, v, **REFERENCE), expected[0]) > 1e-3  # in 8 bits
    for one, other in zip(found, (*expected, *expected), strict=True):
        assert relative_l2(one, other) < 1e-5


def test_bands_and_masks_together_are_exact() -> None:
    q, k, v = qkv(torch.bfloat16)
    for bias in (alibi(), lowest()):
        for params in (AttentionParams(is_causal=True), AttentionParams(window_left=7, window_right=3)):
            expected, _ = float64_attention(q, k, v, bias, params)
            out = ops.attention(
                q, k, v, bias, params.is_causal,
                window_left=params.window_left, window_right=params.window_right, kernel_name="sdpa",
            )  # fmt: skip
            assert_exact(out, expected)
    assert math.isfinite(float(out.abs().max()))
