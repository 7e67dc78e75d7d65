"""Attention by hand keeps the promotion of its own nodes under autocast; SDPA calls keep SDPA's, which casts masks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, rewrite_exported, sage_attention
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
# An INT8 product and P in 16 bits, on the lengths here; what casting these masks would do is five times as much and more.
BOUND = 0.02
HEADS, LENGTH, DIM = 4, 256, 16
LOWEST = torch.finfo(torch.float32).min
DTYPES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("inference")


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, HEADS, LENGTH, DIM, dtype=dtype) for _ in range(3))
    return q, k, v


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def alibi() -> Tensor:
    """Slopes times the positions of keys, causal: 16 bits lose the differences of neighbours."""
    slopes = torch.tensor([13.0, 3.7, 1.9, 0.7])[:, None, None]
    return (slopes * torch.arange(LENGTH)).masked_fill(~causal(), -math.inf)[None]


def unseeing(number: float) -> Tensor:
    """A number hides keys, of the first queries all: eager gives those the mean of V."""
    hidden = torch.rand(2, 1, LENGTH, LENGTH) > 0.6
    hidden[:, :, :40] = True
    return torch.zeros(hidden.shape).masked_fill(hidden, number)


BIASES: dict[str, Callable[[], Tensor]] = {
    "alibi": alibi,
    "30 + noise": lambda: 30 + torch.randn(2, HEADS, LENGTH, LENGTH) / 8,
    "300 + noise": lambda: 300 + torch.randn(1, HEADS, LENGTH, LENGTH),
    "lowest": lambda: unseeing(LOWEST),
    "-1e9": lambda: unseeing(-1e9),
    "lowest * (1 - mask)": lambda: (1.0 - (torch.rand(2, 1, 1, LENGTH) > 1).float()) * LOWEST,
}

SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k, v, b: ((q @ k.mT) / 4 + b).softmax(-1) @ v,
    "bias first": lambda q, k, v, b: (b + 0.25 * (q @ k.transpose(-1, -2))).softmax(-1) @ v,
    "softmax in float32": lambda q, k, v, b: (
        F.softmax((q @ k.mT) / 4 + b, dim=-1, dtype=torch.float32).to(v.dtype) @ v
    ),
    "upcast": lambda q, k, v, b: ((q @ k.mT).float() / 4 + b).softmax(-1) @ v,
    "einsum": lambda q, k, v, b: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q / 4, k) + b).softmax(-1), v
    ),
    "in two parts": lambda q, k, v, b: ((q @ k.mT) / 4 + b / 2 + b / 2).softmax(-1) @ v,
    "subtracted": lambda q, k, v, b: ((q @ k.mT) / 4 - (-b)).softmax(-1) @ v,
    "maximum subtracted": lambda q, k, v, b: shifted((q @ k.mT) / 4 + b) @ v,
}


def shifted(logits: Tensor) -> Tensor:
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def float64(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with the operands of the products cast, and nothing else. (float32's lowest numbers lose scores that
    float64 would keep beside -1e9.)"""
    q, k, v = (tensor.to(dtype).double() for tensor in (q, k, v))
    hidden = (bias.double() <= -1e9) & (bias.double() > -math.inf)
    scores = (q @ k.mT / 4 + bias.double()).masked_fill(hidden, float(bias.min()))
    return scores.softmax(-1) @ v


def assert_close(out: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert relative_l2(out, expected) < bound
    assert max_error(out, expected) < 3 * bound * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
def test_biases_by_hand_under_autocast(bias: str, dtype: torch.dtype) -> None:
    q, k, v = qkv()
    b = BIASES[bias]()
    expected = float64(q, k, v, b, dtype)
    for spelling in ("matmul", "softmax in float32"):
        torch._dynamo.reset()
        attend, backend = SPELLINGS[spelling], RewritingBackend(CONFIG)
        with torch.autocast("cpu", dtype):
            eager, out = attend(q, k, v, b), torch.compile(attend, backend=backend)(q, k, v, b)
        assert backend.sites[0].rewritten and out.dtype == eager.dtype and out.stride() == eager.stride()
        assert_close(eager, expected)
        assert_close(out, expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str) -> None:
    q, k, v = qkv()
    attend, b = SPELLINGS[spelling], alibi()

    def inside(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v, b)

    backend = RewritingBackend(CONFIG)
    out = torch.compile(inside, backend=backend)(q, k, v, b)
    assert backend.sites[0].rewritten
    assert_close(out, float64(q, k, v, b, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_baddbmm_keeps_its_rule(dtype: torch.dtype) -> None:
    """Autocast casts the bias of baddbmm, unlike that of an addition."""
    q, k, v = (tensor.flatten(0, 1) for tensor in qkv())
    b = torch.randn(2 * HEADS, LENGTH, LENGTH) * 3

    def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(torch.baddbmm(b, q, k.mT, alpha=0.25).softmax(-1), v)

    backend = RewritingBackend(CONFIG)
    with torch.autocast("cpu", dtype):
        out = torch.compile(attend, backend=backend)(q, k, v, b)
    assert backend.sites[0].rewritten
    assert_close(out, float64(q, k, v, b, dtype))


@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_every_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """By hand (bool: masked_fill), in the dtype of the inputs and under autocast."""
    q, k, v = qkv()
    is_bool = mask_dtype == torch.bool
    mask = causal() if is_bool else (20 + 3 * torch.randn(LENGTH, LENGTH)).to(mask_dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT) / 4
        scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
        return scores.softmax(-1).to(v.dtype) @ v

    bias = torch.zeros(LENGTH, LENGTH).masked_fill(~mask, -math.inf) if is_bool else mask
    expected = float64(q, k, v, bias, dtype)
    for cast in (False, True):
        torch._dynamo.reset()
        inputs = (q, k, v) if cast else tuple(tensor.to(dtype) for tensor in (q, k, v))
        backend = RewritingBackend(CONFIG)
        with torch.autocast("cpu", dtype, enabled=cast):
            out = torch.compile(attend, backend=backend)(*inputs, mask)
        assert backend.sites[0].rewritten
        # The sums of 16-bit scores and a mask of that dtype are rounded in eager: not here.
        assert_close(out, expected)


def test_two_biases_of_16_bits_are_added_as_far_as_the_scores_go() -> None:
    q, k, v = (tensor.bfloat16() for tensor in qkv())
    one, other = (256 + 8 * torch.randn(LENGTH, LENGTH)).bfloat16(), torch.randn(LENGTH, LENGTH).bfloat16()

    def attend(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return ((q @ k.mT).float() / 4 + one + other).softmax(-1).bfloat16() @ v

    out = torch.compile(attend, backend=RewritingBackend(CONFIG))(q, k, v, one, other)
    assert_close(out, float64(q, k, v, one.double() + other.double(), torch.bfloat16))


SDPA_WAYS = ("ambient", "inside", "16 bits already", "off inside", "subgraph", "exported", "sage_attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", SDPA_WAYS)
def test_sdpa_keeps_its_rule(way: str, dtype: torch.dtype) -> None:
    """Cast to 16 bits the lowest float32 is -inf: queries that see no key get 0, not the mean of V. Without autocast a
    float32 mask beside 16-bit inputs is read as it is."""
    casts = way != "off inside"
    q, k, v = qkv(dtype if way in ("16 bits already", "off inside") else torch.float32)
    b = unseeing(LOWEST)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, b)

    def inside(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            if way == "off inside":
                with torch.autocast("cpu", enabled=False):
                    return sdpa(q, k, v, b)
            if way == "subgraph":
                return torch.utils.checkpoint.checkpoint(sdpa, q, k, v, b, use_reentrant=False)  # type: ignore[no-any-return]
            if way == "sage_attention":
                out = sage_attention(q, k, v, b, kernel="reference", precision="accurate")
                assert isinstance(out, Tensor)
                return out
            return sdpa(q, k, v, b)

    eager = F.scaled_dot_product_attention(
        *(tensor.to(dtype) for tensor in (q, k, v)), b.to(dtype) if casts else b
    )
    assert bool((eager[:, :, :40] == 0).all()) == casts
    if way == "exported":

        class Called(nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
                return inside(q, k, v, b)

        program = rewrite_exported(torch.export.export(Called(), (q, k, v, b)), CONFIG)
        assert "sage_inductor.attention" in program.graph_module.print_readable(print_output=False)
        out = program.module()(q, k, v, b)
    elif way == "ambient":
        with torch.autocast("cpu", dtype):
            out = torch.compile(sdpa, backend=RewritingBackend(CONFIG))(q, k, v, b)
    else:
        out = torch.compile(inside, backend=RewritingBackend(CONFIG))(q, k, v, b)
    assert out.dtype == eager.dtype and out.stride() == eager.stride()
    assert_close(out, eager.double())
    assert bool((out[:, :, :40] == 0).all()) == casts


def test_layers_that_share_a_mask_work_it_out_once() -> None:
    def layers(x: Tensor) -> Tensor:
        positions = torch.arange(LENGTH)
        mask = torch.where(positions[:, None] >= positions, 0.0, LOWEST)
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, mask).float()
        return x

    x = torch.randn(1, 2, LENGTH, DIM)
    backend = RewritingBackend(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(layers, backend=backend)(x)
        assert [site.mask for site in backend.sites] == ["causal"] * 3
        assert relative_l2(out, layers(x)) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_attention_by_hand_under_autocast(dtype: torch.dtype) -> None:
    inputs = [tensor.requires_grad_() for tensor in qkv()]
    b = alibi().clamp(min=-1e9)
    config = Config(kernel="reference", precision="accurate", training=True)
    backend = RewritingBackend(config)
    with torch.enable_grad():
        with torch.autocast("cpu", dtype):
            out = torch.compile(SPELLINGS["matmul"], backend=backend)(*inputs, b)
        assert backend.sites[0].rewritten
        doubles = [tensor.detach().to(dtype).double().requires_grad_() for tensor in inputs]
        expected = (doubles[0] @ doubles[1].mT / 4 + b.double()).softmax(-1) @ doubles[2]
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        right = torch.autograd.grad(expected.square().sum(), doubles)
    assert_close(out, expected)
    for one, other in zip(grads, right, strict=True):
        assert relative_l2(one, other) < 0.06
