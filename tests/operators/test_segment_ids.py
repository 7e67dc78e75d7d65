"""Segments in the operators and `sage_attention`: values, rows without keys, gradients, compilation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from sage_inductor import NotEligibleError, sage_attention
from sage_inductor.kernels import AttentionParams, Segments
from sage_inductor.measurement.ground_truth import DOCUMENTED, float64_attention
from sage_inductor.operators import inference as ops
from sage_inductor.operators.training import attention_training
from sage_inductor.testing import relative_l2

Q_LEN, KV_LEN = 40, 50


def qkv(**kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, Q_LEN, 4, 32, **kwargs).transpose(1, 2),
        torch.randn(2, 2, KV_LEN, 32, **kwargs),
        torch.randn(2, 2, KV_LEN, 32, **kwargs),
    )


def segments() -> Segments:
    """Negative ids, ids that come back, and, in the second sequence, queries whose id no key has."""
    query = torch.randint(-2, 2, (2, Q_LEN), dtype=torch.int32)
    key = torch.randint(-2, 2, (2, KV_LEN), dtype=torch.int32)
    key[1, key[1] == 1] = -2
    return Segments(query, key)


def allowed(ids: Segments) -> Tensor:
    return (ids.query[:, :, None] == ids.key[:, None])[:, None]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_strides_and_rows_without_keys(kernel: str, is_causal: bool) -> None:
    q, k, v = qkv()
    ids = segments()
    out, lse = sage_attention(
        q, k, v, is_causal=is_causal, enable_gqa=True, kernel=kernel, precision="accurate", return_lse=True,
        query_segments=ids.query, key_segments=ids.key,
    )  # fmt: skip
    expected, expected_lse = float64_attention(q, k, v, None, AttentionParams(is_causal), segments=ids)
    assert relative_l2(out, expected) < (1e-6 if kernel == "auto" else DOCUMENTED["accurate"])
    assert out.stride() == q.stride()
    blind = expected_lse.isinf()
    assert blind[1].any() and torch.equal(lse.isinf(), blind) and not out[blind].any()
    # As from a mask that rules out all keys of a row.
    band = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril() if is_causal else torch.tensor(True)
    masked, masked_lse = sage_attention(
        q, k, v, allowed(ids) & band, enable_gqa=True, kernel=kernel, precision="accurate", return_lse=True
    )
    assert relative_l2(out, masked) < 1e-6 and torch.equal(masked_lse.isinf(), blind)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(2, 1, 1, KV_LEN), (1, 4, Q_LEN, KV_LEN), (Q_LEN, KV_LEN)])
@pytest.mark.parametrize("additive", [False, True])
def test_beside_masks(kernel: str, shape: tuple[int, ...], additive: bool) -> None:
    q, k, v = qkv()
    ids = segments()
    mask = torch.randn(shape) if additive else torch.rand(shape) > 0.3
    out = sage_attention(
        q, k, v, mask, enable_gqa=True, kernel=kernel, query_segments=ids.query, key_segments=ids.key
    )
    expected, _ = float64_attention(q, k, v, mask, segments=ids)
    assert isinstance(out, Tensor)
    assert relative_l2(out, expected) < (1e-6 if kernel == "auto" else DOCUMENTED["fast"])


def test_dropout_and_gradients_get_exact_attention() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv(dtype=torch.float64))
    ids = segments()
    names = {"query_segments": ids.query, "key_segments": ids.key}
    expected = F.scaled_dot_product_attention(q, k, v, allowed(ids), enable_gqa=True)
    out = sage_attention(q, k, v, enable_gqa=True, **names)
    assert isinstance(out, Tensor) and relative_l2(out, expected) < 1e-12
    causal = sage_attention(q, k, v, is_causal=True, enable_gqa=True, **names)
    band = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()
    assert isinstance(causal, Tensor)
    assert relative_l2(causal, F.scaled_dot_product_attention(q, k, v, allowed(ids) & band, enable_gqa=True)) < 1e-12  # fmt: skip
    dropped = sage_attention(q.detach(), k.detach(), v.detach(), dropout_p=1.0, enable_gqa=True, **names)
    assert isinstance(dropped, Tensor) and not dropped.any()


def test_the_gradient_is_that_of_exact_attention() -> None:
    inputs = [tensor.requires_grad_() for tensor in qkv()]
    ids = segments()
    names = {"query_segments": ids.query, "key_segments": ids.key, "enable_gqa": True}
    grad = torch.randn(2, 4, Q_LEN, 32)
    expected = torch.autograd.grad(
        F.scaled_dot_product_attention(*inputs, allowed(ids), enable_gqa=True), inputs, grad
    )
    out = attention_training(*inputs, kernel_name="reference", **names)
    assert (
        relative_l2(out, ops.attention(*(x.detach() for x in inputs), kernel_name="reference", **names)) == 0
    )
    for result in (out, ops.attention(*inputs, kernel_name="reference", **names)):
        for one, right in zip(torch.autograd.grad(result, inputs, grad), expected, strict=True):
            assert relative_l2(one, right) < 1e-5
    torch.library.opcheck(attention_training, inputs, {"kernel_name": "reference", **names})


def test_autocast_leaves_the_ids() -> None:
    q, k, v = qkv()
    ids = segments()
    names = {"query_segments": ids.query, "key_segments": ids.key, "enable_gqa": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.attention(q, k, v, kernel_name="reference", **names)
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, float64_attention(q, k, v, segments=ids)[0]) < DOCUMENTED["fast"] + 2 * 2.0**-8


def test_dynamic_lengths_compile_once() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q: Tensor, ids: Tensor) -> Any:
        return sage_attention(q, q, q, kernel="reference", query_segments=ids, key_segments=ids)

    for seq in (5, 17, 130):
        q, ids = torch.randn(2, 2, seq, 32), torch.randint(3, (2, seq), dtype=torch.int32)
        expected = ops.attention(q, q, q, kernel_name="reference", query_segments=ids, key_segments=ids)
        assert torch.equal(attend(q, ids), expected)
    assert counter.frame_count == 1


def test_fewer_dims_have_ids_without_a_batch() -> None:
    q, k, v = (tensor[:, :2] for tensor in qkv())
    ids = segments()
    expected, _ = float64_attention(q, k, v, segments=ids)
    for kernel in ("auto", "reference"):
        for inputs, right in (((q[1], k[1], v[1]), expected[1]), ((q[1, 0], k[1, 0], v[1, 0]), expected[1, 0])):  # fmt: skip
            out = sage_attention(*inputs, kernel=kernel, query_segments=ids.query[1], key_segments=ids.key[1])
            assert isinstance(out, Tensor) and out.shape == right.shape
            assert relative_l2(out, right) < DOCUMENTED["fast"]


IDS = torch.zeros(2, Q_LEN, dtype=torch.int32)
KEY_IDS = torch.zeros(2, KV_LEN, dtype=torch.int32)


@pytest.mark.parametrize(
    ("query_segments", "key_segments", "message"),
    [
        (IDS, None, "query_segments without key_segments (valid: both, or neither)"),
        (None, KEY_IDS, "key_segments without query_segments (valid: both, or neither)"),
        (IDS.long(), KEY_IDS, "query_segments is torch.int64 (valid: torch.int32)"),
        (IDS, KEY_IDS.bool(), "key_segments is torch.bool (valid: torch.int32)"),
        (IDS[:1], KEY_IDS, "query_segments is (1, 40) (valid: [batch, q_len], (2, 40))"),
        (IDS, IDS, "key_segments is (2, 40) (valid: [batch, kv_len], (2, 50))"),
        (IDS[0], KEY_IDS[0], "query_segments is (40,) (valid: [batch, q_len], (2, 40))"),
        (IDS, KEY_IDS.to("meta"), "key_segments is on meta, query on cpu"),
    ],
)
@pytest.mark.parametrize("wanting", [False, True])
def test_ids_that_do_not_fit_raise(
    query_segments: Any, key_segments: Any, message: str, wanting: bool
) -> None:
    q, k, v = qkv()
    for call in (sage_attention, ops.attention):
        with pytest.raises(RuntimeError) as raised:
            call(
                q.requires_grad_(wanting), k, v, enable_gqa=True,
                query_segments=query_segments, key_segments=key_segments,
            )  # fmt: skip
        assert message in str(raised.value)


def test_other_bad_input_raises() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match="key_segments is a list"):
        sage_attention(q, k, v, query_segments=IDS, key_segments=[0] * KV_LEN)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"segments of inputs with 5 dims \(valid: 2 to 4\)"):
        sage_attention(q[None], q[None], q[None], query_segments=IDS, key_segments=IDS)
    with pytest.raises(NotEligibleError, match=r"segments \(supported: none\)"):
        sage_attention(
            q.half(), k.half(), v.half(), enable_gqa=True, kernel="sageattention",
            query_segments=IDS, key_segments=KEY_IDS,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="out shares memory with query_segments"):
        base = torch.zeros(2, 1, 16, 16)
        ids = base.view(torch.int32).view(-1)[:32].view(2, 16)
        sage_attention(*(torch.randn(2, 1, 16, 16) for _ in range(3)), out=base, query_segments=ids, key_segments=ids)  # fmt: skip
