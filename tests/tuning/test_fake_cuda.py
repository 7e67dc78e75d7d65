"""What "auto" does on a GPU, judged without one: Dynamo over fake CUDA tensors, the machine's capability pretended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_inductor import Config, Site
from sage_inductor.kernels import sageattention, triton
from sage_inductor.testing import RewritingBackend, graph_text


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with one GPU of compute capability 9.0 on which the Triton kernel runs and sageattention is missing."""
    monkeypatch.setattr(triton.TritonKernel, "unavailable_reasons", lambda self, device=None: [])
    monkeypatch.setattr(triton, "capability", lambda index: (9, 0))
    missing = ["sageattention=not installed"]
    monkeypatch.setattr(
        sageattention.SageAttentionKernel, "unavailable_reasons", lambda self, device=None: missing
    )
    monkeypatch.setattr(triton, "has_gpu", lambda: True)
    with torch.no_grad():
        yield


def judge(
    function: Any, *shapes: tuple[int, ...], config: Config | None = None, **kwargs: Any
) -> RewritingBackend:
    """`function` of fake bfloat16 CUDA tensors of these shapes, by the shipped table: a GPU that is there is not the
    one that is pretended."""
    torch.compiler.reset()
    backend = RewritingBackend(Config(tune="table") if config is None else config)
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        torch.compile(function, backend=backend, **kwargs)(*inputs)
    return backend


def site_of(backend: RewritingBackend) -> Site:
    (site,) = backend.sites
    return site


def block(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(2, (3, 24, 128)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_golden_of_a_video_sized_block() -> None:
    backend = judge(block, (1, 32760, 3 * 24 * 128))
    site = site_of(backend)
    assert (site.kernel, site.rewritten, site.query and site.query.layout) == ("triton", True, "NHD")
    # A CPU build traces SDPA's math path, whose output is laid out otherwise than that of the GPU's kernels.
    text = graph_text(backend.graphs[0].graph).replace(", memory_order=(0, 1, 2, 3)", "")
    assert_expected_inline(
        text,
        """\
a = input: 1x32760x9216
b = .unflatten(a, 2, (3, 24, 128)): 1x32760x3x24x128
c = .permute(b, 2, 0, 3, 1, 4): 3x1x24x32760x128
d = .unbind(c, 0)
e = getitem(d, 0): 1x24x32760x128
f = getitem(d, 1): 1x24x32760x128
g = getitem(d, 2): 1x24x32760x128
h = sage_inductor.attention(e, f, g, kernel_name='triton', precision='fast'): 1x24x32760x128
i = .transpose(h, 1, 2): 1x32760x24x128
j = .flatten(i, 2): 1x32760x3072
return (j)""",
    )


def test_small_problems_are_left_with_the_measured_limit() -> None:
    shape = (2, 8, 512, 64)
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape))
    assert not site.rewritten
    assert any("triton: kv_len=512 (faster than SDPA from" in reason for reason in site.reasons)
    assert any("sageattention: sageattention=not installed" in reason for reason in site.reasons)


def test_a_kernel_asked_for_by_name_takes_them() -> None:
    shape = (2, 8, 512, 64)
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape, config=Config(kernel="triton")))
    assert site.rewritten and site.kernel == "triton"


def test_cross_attention_and_odd_head_dims() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    text = site_of(judge(attend, (1, 12, 32760, 128), (1, 12, 512, 128), (1, 12, 512, 128)))
    assert not text.rewritten and "kv_len=512" in text.reasons[0]
    odd = site_of(judge(attend, *[(1, 16, 16384, 36)] * 3))
    assert "triton: head_dim=36 (supported: 16 to 256 in steps of 8)" in odd.reasons


def test_masks_that_differ_from_query_to_query_are_taken_where_they_were_measured() -> None:
    shape = (1, 16, 16384, 128)

    def masked(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask > 0)

    site = site_of(judge(masked, shape, (1, 1, 16384, 16384)))
    assert site.rewritten and (site.mask, site.kernel) == ("bool", "triton")
    site = site_of(judge(masked, shape, (1, 16, 16384, 16384)))
    assert site.rewritten and (site.mask, site.kernel) == ("bool", "triton")

    def biased(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask)

    site = site_of(judge(biased, shape, (1, 1, 16384, 16384)))
    assert not site.rewritten and any("attn_mask dtype=" in reason for reason in site.reasons)
    site = site_of(judge(masked, shape, (1, 1, 1, 16384)))
    assert site.rewritten and site.mask == "key_padding"

    def causal(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    site = site_of(judge(causal, shape))
    assert site.rewritten and site.mask == "causal"


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="a CPU build cannot trace SDPA with symbolic lengths"
)
def test_dynamic_lengths_are_judged_by_their_hint_without_a_guard() -> None:
    backend = judge(block, (1, 32760, 3 * 24 * 128), dynamic=True)
    assert site_of(backend).rewritten and "s" in str(backend.sites[0].query and backend.sites[0].query.shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_table_decides_and_says_so() -> None:
    shape = (2, 8, 512, 64)
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape, config=Config()))
    assert site.reasons[-1] == "tune=measure: no GPU to measure on (decided by the shipped table)"
    assert any("triton: kv_len=512 (faster than SDPA from" in reason for reason in site.reasons)
    shape = (1, 16, 16384, 128)
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape, config=Config()))
    assert site.kernel == "triton" and site.speedup is None
    small = (2, 8, 512, 64)
    site = site_of(judge(F.scaled_dot_product_attention, small, small, small, config=Config(tune="off")))
    assert site.kernel == "triton"


def test_older_and_newer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 16, 16384, 128)
    monkeypatch.setattr(triton, "capability", lambda index: (8, 6))
    fast = Config(precision="fast", tune="table")
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape, config=fast))
    assert "triton: compute capability=8.6 (supported: 8.9 and newer)" in site.reasons  # no FP8 on Ampere
    balanced = Config(precision="balanced", tune="table")
    assert site_of(judge(F.scaled_dot_product_attention, shape, shape, shape, config=balanced)).rewritten
    monkeypatch.setattr(triton, "capability", lambda index: (10, 0))
    site = site_of(judge(F.scaled_dot_product_attention, shape, shape, shape))
    assert any("compute capability=10.0 (measured up to 9.0)" in reason for reason in site.reasons)


def packed(x: Tensor) -> Tensor:
    """Within documents, each of which a flag begins."""
    q, k, v = x.unflatten(2, (3, 32, 128)).permute(2, 0, 3, 1, 4).unbind(0)
    ids = (x.select(-1, 0) > 3).cumsum(-1).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, ids.unsqueeze(-1) == ids.unsqueeze(-2))


@pytest.mark.parametrize(
    ("config", "reads_ids"),
    [
        (Config(kernel="triton"), True),
        # No measurements are shipped for ids, but there are some for masks.
        (Config(tune="table"), False),
        (Config(tune="off"), False),
    ],
)
def test_segments_go_to_triton_by_name_or_by_measurement(config: Config, reads_ids: bool) -> None:
    backend = judge(packed, (1, 16384, 3 * 32 * 128), config=config)
    site = site_of(backend)
    assert (site.kernel, site.mask) == ("triton", "segments")
    assert ("query_segments" in graph_text(backend.graphs[0].graph)) == reads_ids


def test_segments_that_no_kernel_takes_stay_with_the_reasons_of_both_readings() -> None:
    backend = judge(packed, (1, 512, 3 * 32 * 128))
    site = site_of(backend)
    assert not site.rewritten and site.mask == "segments"
    assert 'triton: segments (not measured yet: by tune="measure", or kernel="triton")' in site.reasons
    assert "sageattention: segments (supported: none)" in site.reasons
    assert any("kv_len=512" in text for text in site.reasons)
