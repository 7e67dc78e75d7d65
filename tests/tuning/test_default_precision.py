"""precision="auto": the fastest form of attention that a GPU has; one that is named is kept to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_inductor import Config, NotEligibleError, SageAttentionPass, explain, kernels, sage_attention
from sage_inductor.backends import SageAttentionBackend
from sage_inductor.kernels import sageattention, triton
from sage_inductor.operators import inference
from sage_inductor.report.report import Report

CUDA = torch.device("cuda", 0)
LONG = (1, 16, 16384, 128)


@pytest.fixture(params=[(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=lambda found: "sm_{}{}".format(*found))
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A machine with one GPU of that compute capability, on which the Triton kernel runs, and no sageattention."""
    monkeypatch.setattr(triton.TritonKernel, "unavailable_reasons", lambda self, device=None: [])
    monkeypatch.setattr(triton, "capability", lambda index: request.param)
    monkeypatch.setattr(triton, "has_gpu", lambda: True)
    monkeypatch.setattr(
        sageattention.SageAttentionKernel, "unavailable_reasons", lambda self, device=None: ["not installed"]
    )
    with torch.no_grad():
        yield request.param


def of_default(capability: tuple[int, int]) -> str:
    return "fast" if capability >= (8, 9) else "balanced"


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.mT * 128**-0.5).softmax(-1) @ x


def judged(config: Config, function: object = attend) -> Report:
    with FakeTensorMode():
        return explain(function, torch.empty(LONG, dtype=torch.bfloat16, device="cuda"), config=config)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("function", [attend, by_hand])
def test_the_default_takes_what_the_gpu_has(
    capability: tuple[int, int], kernel: str, function: object
) -> None:
    report = judged(Config(kernel=kernel, tune="off"), function)  # type: ignore[arg-type]
    (site,) = report.sites
    assert (site.rewritten, site.kernel, site.precision) == (True, "triton", of_default(capability))
    says_so = 'precision="auto" is balanced here' in str(report)
    assert says_so == (capability < (8, 9))


@pytest.mark.parametrize("precision", ["fast", "balanced", "accurate"])
def test_a_precision_by_name_is_a_demand(capability: tuple[int, int], precision: str) -> None:
    report = judged(Config(precision=precision, tune="off"))  # type: ignore[arg-type]
    (site,) = report.sites
    assert site.precision == precision
    assert site.rewritten == (precision != "fast" or capability >= (8, 9))
    assert "auto" not in report.summary()
    if not site.rewritten:
        found = "{}.{}".format(*capability)
        assert f"triton: compute capability={found} (supported: 8.9 and newer)" in site.reasons


def test_the_graph_names_what_was_taken(capability: tuple[int, int]) -> None:
    from sage_inductor.testing import RewritingBackend

    backend = RewritingBackend(Config(tune="off"))
    with FakeTensorMode():
        torch.compile(attend, backend=backend)(torch.empty(LONG, dtype=torch.bfloat16, device="cuda"))
    nodes = [node for node in backend.graphs[0].graph.nodes if node.target is inference.attention]
    assert [node.kwargs["precision"] for node in nodes] == [of_default(capability)]


def test_the_choice_by_device_and_kernel(capability: tuple[int, int]) -> None:
    assert kernels.precision_on(CUDA, "auto") == of_default(capability)
    assert kernels.precision_on(CUDA, "auto", "triton") == of_default(capability)
    assert kernels.precision_on(CUDA, "auto", "reference") == "fast"
    for name in kernels.PRECISIONS:
        assert kernels.precision_on(CUDA, name) == name


def test_a_kernel_with_one_precision_gives_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sageattention, "installed_version", lambda: "1.0.6")
    monkeypatch.setattr(
        sageattention.SageAttentionKernel, "unavailable_reasons", lambda self, device=None: []
    )
    assert kernels.precision_on(CUDA, "auto", "sageattention") == "accurate"


def test_default_is_readable_and_part_of_the_uuid() -> None:
    assert Config().precision == "auto" and "precision='auto'" in repr(Config())
    assert SageAttentionPass(Config()).uuid() != SageAttentionPass(Config(precision="fast")).uuid()
    with pytest.raises(ValueError, match="valid: auto, fast, balanced, accurate"):
        Config(precision="medium")  # type: ignore[arg-type]


def test_direct_calls_and_backend_classes() -> None:
    x = torch.randn(1, 2, 64, 32)
    fast = sage_attention(x, x, x, kernel="reference", precision="fast")
    assert torch.equal(sage_attention(x, x, x, kernel="reference"), fast)  # type: ignore[arg-type]
    assert torch.equal(
        inference.attention(x, x, x, kernel_name="reference", precision="auto"),
        fast,  # type: ignore[arg-type]
    )
    impl = SageAttentionBackend.get_impl_cls()(2, 32, False, None, kernel="reference")
    assert torch.equal(impl.forward(*(x.transpose(1, 2) for _ in range(3))).transpose(1, 2), fast)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid: auto, fast, balanced, accurate"):
        sage_attention(x, x, x, precision="medium")


def test_the_backend_selector_on_a_gpu_without_fp8(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_inductor.backends import get_attn_backend, selector

    monkeypatch.setattr(selector, "_current_device", lambda: CUDA)
    monkeypatch.setattr(triton.TritonKernel, "not_chosen_reasons", lambda self, problem: [])
    assert get_attn_backend(128, torch.bfloat16) is SageAttentionBackend
    with pytest.raises(NotEligibleError):
        get_attn_backend(127, torch.bfloat16, requested="SAGE_ATTN")
