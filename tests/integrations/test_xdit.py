"""`integrations.xdit`, against a stand-in made from xDiT's interface (0.4.5): functions by backend, called with `[batch, heads,
seq, head_dim]` tensors, that return the output and its log-sum-exp."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sage_inductor import Config
from sage_inductor.integrations import xdit as sage
from sage_inductor.testing import relative_l2

pytestmark = pytest.mark.usefixtures("inference")


class AttentionBackendType(enum.Enum):
    SDPA = "SDPA"
    SAGE = "Sage Attention"


@pytest.fixture
def xfuser(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    backend = types.ModuleType("xfuser.core.distributed.attention_backend")
    backend.AttentionBackendType = AttentionBackendType
    backend.ATTENTION_FUNCTION_REGISTRY = {AttentionBackendType.SAGE: len}
    distributed = types.ModuleType("xfuser.core.distributed")
    distributed.attention_backend = backend
    distributed.degree = 1
    distributed.get_ring_parallel_world_size = lambda: distributed.degree
    for module in (types.ModuleType("xfuser"), types.ModuleType("xfuser.core"), distributed, backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield distributed
    if sage._replaced:
        sage.unregister()


def test_its_function_of_sage(xfuser: types.ModuleType) -> None:
    functions = xfuser.attention_backend.ATTENTION_FUNCTION_REGISTRY
    sage.register()
    sage.register(Config(kernel="reference"))
    attention = functions[AttentionBackendType.SAGE]
    q, k, v = torch.randn(3, 2, 2, 48, 64)
    keep = torch.arange(48)[None] < torch.tensor([[48], [20]])
    for kwargs, mask in (
        (None, None),
        ({"attn_mask": keep[:, None, None]}, keep[:, None, None]),
        ({"indices_k": keep.flatten().nonzero().flatten(), "max_seqlen_k": 48}, keep[:, None, None]),
    ):
        out, lse = attention(q, k, v, dropout_p=0.0, is_causal=False, attention_kwargs=kwargs)
        assert 1e-4 < relative_l2(out, F.scaled_dot_product_attention(q, k, v, mask)) < 0.04 and lse is None
    out, _ = attention(q, k, v, dropout_p=0.0, is_causal=True)
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 0.04
    xfuser.degree = 2
    _, lse = attention(q, k, v, dropout_p=0.0, is_causal=False)
    scores = (q @ k.mT).double() / 8
    assert lse.shape == (2, 2, 48) and (lse - scores.logsumexp(-1)).abs().max() < 0.02
    with pytest.raises(ValueError, match="in a ring"):
        attention(q, k, v, attention_kwargs={"attn_mask": keep[:, None, None]})
    sage.unregister()
    assert functions == {AttentionBackendType.SAGE: len}


def test_what_is_not_valid(xfuser: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"config.training=True \(valid here: kernel, precision, smoothing, skip_threshold, skip_by\)",
    ):
        sage.register(Config(training=True))
    with pytest.raises(ValueError, match="nothing is registered"):
        sage.unregister()
    del xfuser.attention_backend.ATTENTION_FUNCTION_REGISTRY
    with pytest.raises(ImportError, match=r"xfuser cannot be used \(supported: 0.4.5\)"):
        sage.register()
    monkeypatch.setitem(sys.modules, "xfuser.core.distributed", None)
    with pytest.raises(ImportError, match=r"xfuser cannot be used \(supported: 0.4.5\)"):
        sage.register()
