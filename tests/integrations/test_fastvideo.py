"""`integrations.fastvideo`, against a stand-in made from FastVideo's public interface (0.2.0).

FastVideo asks for CUDA packages and another torch. The stand-in has what its docs and signatures say: an Enum of backends, a
platform whose `get_attn_backend_cls(selected_backend, head_size, dtype)` names a class, a selector that keeps the answers,
and a layer that makes the backend's impl and calls it.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sage_inductor import Config, NotEligibleError
from sage_inductor.integrations import fastvideo as sage
from sage_inductor.measurement.ground_truth import float64_attention
from sage_inductor.testing import relative_l2

pytestmark = pytest.mark.usefixtures("inference")


class AttentionBackendEnum(enum.Enum):
    FLASH_ATTN = enum.auto()
    TORCH_SDPA = enum.auto()
    SAGE_ATTN = enum.auto()


class Platform:
    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: AttentionBackendEnum | None, head_size: int, dtype: torch.dtype
    ) -> str:
        return "sage_inductor.backends.SDPABackend"


class OnePlatform(Platform):
    """Inherits the answer."""


def make_selector() -> types.ModuleType:
    module = types.ModuleType("fastvideo.attention.selector")

    @functools.cache
    def cached(head_size: int, dtype: torch.dtype, requested: Any) -> Any:
        platform = sys.modules["fastvideo.platforms"].current_platform
        package, _, name = platform.get_attn_backend_cls(requested, head_size, dtype).rpartition(".")
        return getattr(import_module(package), name)

    def get_attn_backend(head_size: int, dtype: torch.dtype, *, requested: Any = None) -> Any:
        return cached(head_size, dtype, requested)

    module.cached = cached
    module.get_attn_backend = get_attn_backend
    return module


class LocalAttention(nn.Module):
    """Makes and calls an impl as FastVideo's layers do."""

    def __init__(self, requested: Any, **extra_impl_args: Any) -> None:
        super().__init__()
        backend = sys.modules["fastvideo.attention.selector"].get_attn_backend(
            64, torch.float32, requested=requested
        )
        self.attn_impl = backend.get_impl_cls()(
            num_heads=2, head_size=64, softmax_scale=0.125, num_kv_heads=2, causal=False, **extra_impl_args
        )
        self.metadata = backend.get_builder_cls()().build(current_timestep=3, attn_mask=None)
        self.backend = AttentionBackendEnum.__members__.get(backend.get_name())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = torch.cat([q, k, v]).chunk(3)
        return self.attn_impl.forward(q, k, v, self.metadata)


@pytest.fixture(params=[Platform, OnePlatform])
def fastvideo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Platform]]:
    platforms = types.ModuleType("fastvideo.platforms")
    platforms.AttentionBackendEnum = AttentionBackendEnum
    platforms.current_platform = request.param()
    attention = types.ModuleType("fastvideo.attention")
    attention.selector = make_selector()
    package = types.ModuleType("fastvideo")
    package.platforms, package.attention = platforms, attention
    for module in (package, platforms, attention, attention.selector):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield request.param
    if sage._original:
        sage.unregister()


def inputs() -> list[Tensor]:
    return [torch.randn(1, 96, 2, 64) for _ in range(3)]


def test_layers_that_ask_for_sage_get_it(fastvideo: type[Platform]) -> None:
    before = dict(fastvideo.__dict__)
    asked = LocalAttention(AttentionBackendEnum.SAGE_ATTN)  # answered and kept before
    assert asked.backend is AttentionBackendEnum.TORCH_SDPA
    sage.register(Config(kernel="reference", precision="balanced"))
    layer = LocalAttention(AttentionBackendEnum.SAGE_ATTN, rope_type="split")
    assert layer.backend is AttentionBackendEnum.SAGE_ATTN and type(layer.attn_impl) is sage.Impl
    assert (layer.attn_impl.kernel, layer.attn_impl.precision) == ("reference", "balanced")
    q, k, v = inputs()
    exact = float64_attention(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)
    out = layer(q, k, v)
    assert 1e-4 < relative_l2(out, exact) < 0.021 and out.is_contiguous()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(q, k, v)
    assert torch.equal(compiled, out)
    for other in (None, AttentionBackendEnum.FLASH_ATTN):
        assert LocalAttention(other).backend is AttentionBackendEnum.TORCH_SDPA
    sage.register()  # another config for the layers to come
    assert LocalAttention(AttentionBackendEnum.SAGE_ATTN).attn_impl.kernel == "auto"
    sage.unregister()
    assert LocalAttention(AttentionBackendEnum.SAGE_ATTN).backend is AttentionBackendEnum.TORCH_SDPA
    assert dict(fastvideo.__dict__) == before


def test_what_a_layer_asks_for_itself_goes_first(fastvideo: type[Platform]) -> None:
    sage.register(Config(kernel="reference"))
    layer = LocalAttention(AttentionBackendEnum.SAGE_ATTN, precision="accurate")
    assert layer.attn_impl.precision == "accurate"
    with pytest.raises(NotEligibleError, match="dropout_p=0.1"):
        LocalAttention(AttentionBackendEnum.SAGE_ATTN, dropout_p=0.1)


def test_what_is_not_valid(fastvideo: type[Platform], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"config.training=True \(valid here: kernel, precision"):
        sage.register(Config(training=True))
    with pytest.raises(ValueError, match="nothing is registered"):
        sage.unregister()
    monkeypatch.setattr(sys.modules["fastvideo.platforms"], "AttentionBackendEnum", enum.Enum("Old", "SDPA"))
    with pytest.raises(ImportError, match=r"this fastvideo has no SAGE_ATTN.*\(supported: 0.2\)"):
        sage.register()
    monkeypatch.setitem(sys.modules, "fastvideo", None)
    with pytest.raises(ImportError, match=r"fastvideo cannot be imported \(supported: 0.2\)"):
        sage.register()
