"""skip_threshold on its way from the caller to a kernel: sage_attention, the operators, Config, the rewritten graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sage_inductor
from sage_inductor import Config, NotEligibleError, explain, sage_attention
from sage_inductor.kernels.reference import algorithm as reference
from sage_inductor.operators.distributed.wires import kernel_of_wires
from sage_inductor.testing import RewritingBackend

THRESHOLD = 0.05


def planted(heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Two blocks of keys of which each query is about one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 256, 16) for _ in range(3))
    topic = F.one_hot(torch.arange(256) // 128, 16)
    return 0.5 * q + 5 * topic, 0.5 * k + 5 * topic, v


def expected(q: Tensor, k: Tensor, v: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
    return reference.attention(q, k, v, precision="fast", skip_threshold=threshold)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    found = planted()
    assert not torch.equal(expected(*found)[0], expected(*found, 0.0)[0])
    return found


@torch.no_grad()
def test_sage_attention_hands_it_to_the_kernel(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    options: dict[str, Any] = {"kernel": "reference", "precision": "fast", "skip_threshold": THRESHOLD}
    out, lse = sage_attention(*inputs, **options, return_lse=True)
    for got, wanted in zip((out, lse), expected(*inputs), strict=True):
        assert torch.equal(got, wanted)
    buffer = torch.empty_like(out)
    assert sage_attention(*inputs, **options, out=buffer) is buffer and torch.equal(buffer, out)
    # A call of the same kind but for the threshold is another one.
    assert not torch.equal(sage_attention(*inputs, **{**options, "skip_threshold": 0.0}), out)
    compiled = torch.compile(
        lambda q, k, v: sage_attention(q, k, v, **options), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*inputs), out)


@torch.no_grad()
def test_operators_take_it_last_and_without_it_are_what_they_were(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    for op in (
        torch.ops.sage_inductor.attention.default,
        torch.ops.sage_inductor.attention.out,
        torch.ops.sage_inductor.attention_lse.default,
    ):
        last = [(argument.name, argument.default_value) for argument in op._schema.arguments[-2:]]
        assert last == [("skip_threshold", 0.0), ("skip_by", "scores")]
    assert "skip_threshold" not in str(torch.ops.sage_inductor.attention_training.default._schema)
    kernel = {"kernel_name": "reference", "precision": "fast"}
    old = torch.ops.sage_inductor.attention(*inputs, **kernel)
    assert torch.equal(old, expected(*inputs, 0.0)[0])
    arguments = (*inputs, None, False), {**kernel, "skip_threshold": THRESHOLD}
    torch.library.opcheck(torch.ops.sage_inductor.attention.default, *arguments)
    arguments[1]["skip_by"] = "sample"
    torch.library.opcheck(torch.ops.sage_inductor.attention.default, *arguments)


@pytest.mark.parametrize("value", [1.0, -0.5, math.nan])
def test_values_that_are_no_threshold(inputs: tuple[Tensor, Tensor, Tensor], value: float) -> None:
    message = r"skip_threshold=\S+ \(valid: a number from 0"
    with pytest.raises(ValueError, match=message):
        sage_attention(*inputs, kernel="reference", skip_threshold=value)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        torch.ops.sage_inductor.attention(*inputs, kernel_name="reference", skip_threshold=value)
    with pytest.raises(ValueError, match=message):
        Config(skip_threshold=value)
    with pytest.raises(ValueError, match=message):
        sage_inductor.backends.SageAttentionBackend.get_impl_cls()(2, 64, False, None, skip_threshold=value)


@torch.no_grad()
def test_a_sample_decides_where_it_is_asked_to(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = (x[:, :, :200] for x in inputs)  # of the second tile the middle of 16 is not the last
    q = q.clone()
    q[:, :, 0], q[:, :, 0, 1] = (
        0.0,
        5.0,
    )  # a query of the first tile, beside its sample, that is about the second block
    k = k.repeat(1, 1, 2, 1)
    v = torch.randn_like(k)
    by_scores, by_sample = (
        reference.attention(q, k, v, precision="fast", skip_threshold=THRESHOLD, skip_by=skip_by)[0]
        for skip_by in ("scores", "sample")
    )
    assert not torch.equal(by_scores, by_sample)
    options: dict[str, Any] = {"kernel": "reference", "precision": "fast", "skip_threshold": THRESHOLD}
    assert torch.equal(sage_attention(q, k, v, **options), by_scores)
    options["skip_by"] = "sample"
    assert torch.equal(sage_attention(q, k, v, **options), by_sample)
    config = Config(**options)
    assert torch.equal(torch.compile(attend, backend=RewritingBackend(config))(q, k, v), by_sample)
    (site,) = explain(attend, q, k, v, config=config).sites
    assert site.skip_by == "sample" and "skip_threshold=0.05 by a sample" in str(site)
    impl = sage_inductor.backends.SageAttentionBackend.get_impl_cls()(2, 16, False, None, **options)
    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(impl.forward(*tokens).transpose(1, 2), by_sample)


@torch.no_grad()
def test_a_sample_says_nothing_about_masks_of_queries_and_segments(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    options: dict[str, Any] = {"kernel": "reference", "skip_threshold": THRESHOLD, "skip_by": "sample"}
    mask = torch.ones(256, 256, dtype=torch.bool).tril(3)
    with pytest.raises(NotEligibleError, match=r'attn_mask with skip_by="sample"=1, 1, 256, 256 \(supported'):
        sage_attention(*inputs, mask, **options)
    ids = torch.zeros(1, 256, dtype=torch.int32)
    with pytest.raises(NotEligibleError, match=r'segments with skip_by="sample" \(supported: none\)'):
        sage_attention(*inputs, query_segments=ids, key_segments=ids, **options)
    keys = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    assert isinstance(sage_attention(*inputs, keys, **options), Tensor)


@pytest.mark.parametrize("value", ["both", "vote", ""])
def test_values_that_decide_nothing(inputs: tuple[Tensor, Tensor, Tensor], value: str) -> None:
    message = rf"skip_by='{value}' \(valid: .?scores.?, .?sample.?\)"
    with pytest.raises(ValueError, match=message):
        sage_attention(*inputs, kernel="reference", skip_by=value)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        torch.ops.sage_inductor.attention(*inputs, kernel_name="reference", skip_by=value)
    with pytest.raises(ValueError, match=message):
        Config(skip_by=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        sage_inductor.backends.SageAttentionBackend.get_impl_cls()(2, 64, False, None, skip_by=value)


def test_values_of_other_types() -> None:
    with pytest.raises(TypeError, match="skip_threshold='0.1'"):
        Config(skip_threshold="0.1")  # type: ignore[arg-type]
    assert repr(Config(skip_threshold=0)) == repr(Config())


def test_kernels_that_leave_out_nothing(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(NotEligibleError, match=r"skip_threshold=0.05 \(supported: 0\)"):
        sage_attention(*inputs, kernel="sageattention", skip_threshold=THRESHOLD)
    with pytest.raises(NotEligibleError, match=r"skip_threshold=0.05 \(supported: 0\)"):
        sage_inductor.backends.SageAttentionBackend.get_impl_cls()(
            2, 64, False, None, kernel="sageattention", skip_threshold=THRESHOLD
        )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def test_a_rewritten_graph_has_it(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    config = Config(kernel="reference", precision="fast", skip_threshold=THRESHOLD)
    backend = RewritingBackend(config)
    assert torch.equal(torch.compile(attend, backend=backend)(*inputs), expected(*inputs)[0])
    report = explain(attend, *inputs, config=config)
    assert report.sites[0].skip_threshold == THRESHOLD
    assert "reference fast, skip_threshold=0.05" in " ".join(str(report).split())
    assert "fast, skip_threshold=0.05" in report.to_html()


def test_training_refuses_it(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    config = Config(kernel="reference", precision="fast", training=True, skip_threshold=THRESHOLD)
    q, k, v = inputs
    (site,) = explain(attend, q.requires_grad_(), k, v, config=config).sites
    assert site.reasons == ("skip_threshold=0.05 (supported: 0 where gradients are wanted)",)


def test_inputs_that_need_gradients_get_exact_attention(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = inputs
    out = sage_attention(q.requires_grad_(), k, v, skip_threshold=THRESHOLD)
    torch.testing.assert_close(out, attend(q, k, v))
    assert isinstance(out, Tensor) and out.requires_grad


def test_wires_of_8_bits_leave_nothing_out(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """They say so: the halves of a call take no threshold."""
    options = {"kernel_name": "reference", "precision": "fast"}
    assert kernel_of_wires(*inputs, options) == ("reference", "fast", "both")
    with pytest.raises(NotEligibleError, match=r"wires=\"8-bit\": skip_threshold=0.05 \(supported: 0\)"):
        kernel_of_wires(*inputs, {**options, "skip_threshold": THRESHOLD})


def test_wires_that_there_are_not(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"wires='4-bit' \(valid: inputs, 8-bit\)"):
        torch.ops.sage_inductor.attention(*inputs, kernel_name="reference", wires="4-bit")
