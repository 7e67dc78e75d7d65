"""`integrations.diffusers.register`: diffusers' models on the backend, against diffusers' own attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import (  # noqa: E402
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from models import BY_NAME  # noqa: E402
from zoo import entries, padding  # noqa: E402

from sage_inductor import Config, NotEligibleError, backend, explain  # noqa: E402
from sage_inductor.integrations import diffusers as sage  # noqa: E402
from sage_inductor.integrations import versions  # noqa: E402
from sage_inductor.testing import relative_l2  # noqa: E402

pytestmark = pytest.mark.usefixtures("inference")
OPTIONS = {"sage.kernel": "reference"}
BOUND = 0.04  # of "fast" in one attention; the models add their exact residuals to it


@pytest.fixture
def registered() -> Iterator[None]:
    sage.register(Config(kernel="reference"))
    yield
    sage.unregister()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that are compiled; they run as they were rewritten, without Inductor."""
    found: list[torch.fx.GraphModule] = []

    def run(graph_module: torch.fx.GraphModule, *args: Any) -> Callable[..., Any]:
        found.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(backend, "compile_with_inductor", run)
    return found


def operators(graphs: list[torch.fx.GraphModule]) -> int:
    """The number of attentions in 8 bits in graphs."""
    return sum(
        "sage_inductor.attention" in str(node.target) for graph in graphs for node in graph.graph.nodes
    )


def like_wan() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 24, 32), "return_dict": False,
    }  # fmt: skip


def like_flux() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[16, 24, 24],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 12, 32),
        "timestep": torch.tensor([500.0]), "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(12, 3), "return_dict": False,
    }  # fmt: skip


def chroma() -> tuple[nn.Module, dict[str, Any]]:
    (entry,) = [one for one in entries("diffusers") if one.name == "ChromaTransformer2DModel"]
    return entry.build("sdpa")


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    **{name: BY_NAME[name].build for name in ("wan", "flux", "ltx", "hunyuan_video", "qwen_image padded")},
    "chroma, padded": chroma,
    "skyreels": like_wan,
    "bria": like_flux,
}


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


@pytest.mark.parametrize("name", MODELS)
def test_models(
    name: str, registered: None, graphs: list[torch.fx.GraphModule], new_process: Callable[[], None]
) -> None:
    model, inputs = built(name)
    exact = model(**inputs)[0]
    model.set_attention_backend("sage_inductor")
    out = model(**inputs)[0]
    assert 0 < relative_l2(out, exact) < BOUND / 10
    assert out.dtype == exact.dtype and out.stride() == exact.stride()
    compiled = torch.compile(model, backend="sage_inductor", options=OPTIONS, fullgraph=True)
    assert relative_l2(compiled(**inputs)[0], out) < BOUND / 10
    assert len(graphs) == 1 and operators(graphs) >= 2
    # With diffusers' own attention plain torch.compile makes one graph of each, too.
    new_process()
    model.set_attention_backend("native")
    plain = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_l2(plain(**inputs)[0], exact) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_masks_of_padded_batches_count(registered: None) -> None:
    """What stands in the padding changes nothing, as with diffusers' own attention."""
    model, inputs = built("qwen_image padded")
    mask = inputs["encoder_hidden_states_mask"]
    assert not mask.all() and mask.any()
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][~mask.bool()] += 100.0
    with diffusers.attention_backend("sage_inductor"):
        assert relative_l2(model(**changed)[0], model(**inputs)[0]) < 1e-6
        unmasked = {**changed, "encoder_hidden_states_mask": None}
        assert relative_l2(model(**unmasked)[0], model(**inputs)[0]) > 1e-3


def rows(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "kind", ["2-D", "2-D additive", "4-D", "additive", "by query", "causal", "grouped", "scaled", "none"]
)
def test_what_the_dispatcher_passes(kind: str, compiled: bool, registered: None) -> None:
    heads = 1 if kind == "grouped" else 2
    q, k, v = torch.randn(2, 48, 2, 64), torch.randn(2, 40, heads, 64), torch.randn(2, 40, heads, 64)
    keep = padding(2, 40, 25).bool()
    mask = {
        "2-D": keep, "4-D": keep[:, None, None], "by query": torch.rand(2, 1, 48, 40) > 0.3,
        "2-D additive": torch.zeros(2, 40).masked_fill(~keep, -1e9),
        "additive": torch.zeros(2, 1, 1, 40).masked_fill(~keep[:, None, None], float("-inf")),
    }.get(kind)  # fmt: skip
    options: dict[str, Any] = {"causal": {"is_causal": True}, "grouped": {"enable_gqa": True}, "scaled": {"scale": 0.3}}.get(kind, {})  # fmt: skip

    def attend(name: str) -> Tensor:
        return dispatch_attention_fn(q, k, v, mask, backend=name, **options)

    def ours() -> Tensor:
        return attend("sage_inductor")

    out = torch.compile(ours, backend="eager", fullgraph=True)() if compiled else ours()
    exact = attend("native")
    assert 0 < relative_l2(out, exact) < BOUND
    assert out.shape == exact.shape and out.stride() == exact.stride()


def test_the_log_sum_exp(registered: None) -> None:
    q, k, v = (torch.randn(2, 48, 2, 64) for _ in range(3))
    out, lse = dispatch_attention_fn(q, k, v, backend="sage_inductor", attention_kwargs={"return_lse": True})
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) / 8
    assert out.shape == q.shape and lse.shape == (2, 48, 2)
    assert (lse - scores.logsumexp(-1)).abs().max() < 0.02


def test_what_8_bits_cannot_serve_is_exact() -> None:
    q, k, v = (torch.randn(1, 32, 2, 64) for _ in range(3))
    sage.register()
    try:
        with diffusers.attention_backend("sage_inductor"):  # a CPU
            assert torch.equal(
                dispatch_attention_fn(q, k, v), dispatch_attention_fn(q, k, v, backend="native")
            )
        sage.register(Config(kernel="reference"))
        with pytest.raises(NotEligibleError, match="dropout_p=0.5"):
            dispatch_attention_fn(q, k, v, dropout_p=0.5, backend="sage_inductor")
        with torch.enable_grad(), pytest.raises(NotEligibleError, match="requires_grad"):
            dispatch_attention_fn(q.requires_grad_(), k, v, backend="sage_inductor")
        sage.register()
        with torch.enable_grad():
            dispatch_attention_fn(q, k, v, backend="sage_inductor").sum().backward()
        assert q.grad is not None
    finally:
        sage.unregister()


def test_register_and_unregister() -> None:
    before = [*AttentionBackendName], list(_AttentionBackendRegistry._backends)
    model, inputs = built("flux")
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("sage_inductor")
    sage.register(Config(kernel="reference", precision="accurate"))
    sage.register(Config(kernel="reference", precision="accurate"), name="another")
    model.set_attention_backend("another")
    assert _AttentionBackendRegistry._active_backend == "another"
    accurate = model(**inputs)[0]
    sage.register(Config(kernel="reference", precision="fast"), name="another")
    assert not torch.equal(model(**inputs)[0], accurate)
    report = explain(model, **inputs)
    assert not report.sites and all(one.is_own for one in report.operators) and len(report.operators) == 2
    sage.unregister("another")
    sage.unregister()
    assert ([*AttentionBackendName], list(_AttentionBackendRegistry._backends)) == before
    assert _AttentionBackendRegistry._active_backend == "native"
    with pytest.raises(ValueError, match=r"name='sage_inductor' \(valid: none, nothing is registered\)"):
        sage.unregister()
    model.reset_attention_backend()
    model(**inputs)


def test_what_is_not_valid() -> None:
    for name in ("native", "sage", "_flash_3"):
        with pytest.raises(ValueError, match=rf"name='{name}' \(valid: one that diffusers does not have"):
            sage.register(name=name)
    for bad in ("Sage", "a b", ""):
        with pytest.raises(ValueError, match=r"valid: an identifier in lower case"):
            sage.register(name=bad)
    for config in (
        Config(exclude=("*",)),
        Config(training=True),
        Config(fallback="error"),
        Config(tune="off"),
    ):
        with pytest.raises(ValueError, match=r"valid here: kernel, precision"):
            sage.register(config)
    with pytest.raises(TypeError, match="config="):
        sage.register({"kernel": "auto"})  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ["0.35.2", "0.9.0", "1.0.0"])
def test_versions_that_are_not_supported(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: found)
    with pytest.raises(
        ImportError, match=rf"diffusers {found} .*\(supported: diffusers 0.36 and newer, below 1\)"
    ):
        sage.register()


def test_a_dispatcher_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_AttentionBackendRegistry, "_supports_context_parallel")
    with pytest.raises(ImportError, match="0.36 to 0.42, which are supported: no _supports_context_parallel"):
        sage.register()
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(ImportError, match="0.36 to 0.42, which are supported: import of diffusers.models"):
        sage.register()
