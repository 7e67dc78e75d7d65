"""The explicit backend classes: what they compute, write, honour and refuse; and the selector."""

from __future__ import annotations

import enum
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import NotEligibleError, backends, kernels
from sage_inductor.backends import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    SageAttentionBackend,
    SageAttentionImpl,
    SDPABackend,
    SDPAImpl,
    get_attn_backend,
)

# Relative L2 error against float64 on normal inputs: INT8 scores .012, e4m3 P and V .038.
BOUNDS = {"fast": 0.045, "accurate": 0.02}
MAKE: dict[str, Callable[..., AttentionImpl]] = {
    "sage": lambda *args, **kwargs: SageAttentionImpl(
        *args, **{"kernel": "reference", "precision": "accurate"}, **kwargs
    ),
    "sage auto": SageAttentionImpl,
    "sdpa": SDPAImpl,
}


def inputs(
    q_len: int = 33,
    kv_len: int = 33,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, q_len, heads, head_size),
        (batch, kv_len, kv_heads, head_size),
        (batch, kv_len, kv_heads, head_size),
    )
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """float64, by the formula: `visible` and `bias` broadcast to [batch, heads, q, k]."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bound(impl: str, dtype: torch.dtype = torch.float32) -> float:
    return BOUNDS["accurate"] if impl == "sage" else 4 * torch.finfo(dtype).eps


def check(impl: str, actual: Tensor, expected: Tensor) -> None:
    assert relative(actual, expected) < bound(impl, actual.dtype)
    assert (actual.double() - expected).abs().max() < 5 * bound(impl, actual.dtype) * expected.abs().max()


every_impl = pytest.mark.parametrize("impl", list(MAKE))


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [64**-0.5, 0.02])
def test_scale_causal_and_gqa(
    impl: str, dtype: torch.dtype, causal: bool, kv_heads: int, scale: float
) -> None:
    query, key, value = inputs(kv_heads=kv_heads, dtype=dtype)
    attention = MAKE[impl](4, 64, causal, scale, kv_heads)
    out = attention.forward(query, key, value, AttentionMetadata(current_timestep=3))
    assert out.shape == query.shape and out.dtype == dtype and out.is_contiguous()
    check(impl, out, exact(query, key, value, causal=causal, scale=scale))


@every_impl
def test_causal_is_aligned_top_left(impl: str) -> None:
    query, key, value = inputs(q_len=20, kv_len=50)
    out = MAKE[impl](4, 64, True, None, 2).forward(query, key, value, None)
    check(impl, out, exact(query, key, value, causal=True))


def padding(lengths: list[int], kv_len: int) -> Tensor:
    return torch.arange(kv_len) < torch.tensor(lengths)[:, None]


def case_2d(dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    keep = padding([33, 20], 33)
    return keep.to(dtype), keep[:, None, None], None


def case_2d_float() -> tuple[Tensor, Tensor | None, Tensor | None]:
    bias = torch.where(padding([33, 20], 33), 0.5, -math.inf)
    return bias, None, bias[:, None, None]


def case_short() -> tuple[Tensor, Tensor | None, Tensor | None]:
    keep = padding([10, 4], 10)  # of the last 10 keys; the 23 before them are attended
    return keep.long(), F.pad(keep, (23, 0), value=True)[:, None, None], None


def case_short_float() -> tuple[Tensor, Tensor | None, Tensor | None]:
    bias = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return bias, None, F.pad(bias, (23, 0))[:, None, None]


def case_3d() -> tuple[Tensor, Tensor | None, Tensor | None]:
    keep = torch.rand(2, 33, 33, generator=torch.Generator().manual_seed(1)) < 0.5
    return keep, keep[:, None], None


def case_4d() -> tuple[Tensor, Tensor | None, Tensor | None]:
    bias = torch.randn(1, 4, 33, 33, generator=torch.Generator().manual_seed(1))
    return bias, None, bias


MASKS: dict[str, Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]] = {
    "2-D bool": lambda: case_2d(torch.bool),
    "2-D int64": lambda: case_2d(torch.int64),
    "2-D uint8": lambda: case_2d(torch.uint8),
    "2-D float": case_2d_float,
    "2-D short": case_short,
    "2-D short float64": case_short_float,
    "3-D bool": case_3d,
    "4-D float": case_4d,
}


@every_impl
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("causal", [False, True])
def test_masks(impl: str, mask: str, causal: bool) -> None:
    query, key, value = inputs()
    attn_mask, visible, bias = MASKS[mask]()
    before = attn_mask.clone()
    metadata = AttentionMetadataBuilder().build(current_timestep=0, attn_mask=attn_mask)
    out = MAKE[impl](4, 64, causal, None, 2).forward(query, key, value, metadata)
    check(impl, out, exact(query, key, value, visible, bias, causal))
    assert torch.equal(attn_mask, before)


@every_impl
def test_float_mask_with_half_inputs(impl: str) -> None:
    query, key, value = inputs(dtype=torch.bfloat16)
    attn_mask, visible, bias = case_2d_float()
    out = MAKE[impl](4, 64, True, None, 2).forward(query, key, value, AttentionMetadata(0, attn_mask))
    check(impl, out, exact(query, key, value, visible, bias, causal=True))


@every_impl
def test_causal_by_metadata(impl: str) -> None:
    query, key, value = inputs()
    keep = padding([33, 20], 33)
    attention = MAKE[impl](4, 64, False, None, 2)
    for attn_mask, visible in ((None, None), (keep, keep[:, None, None])):
        out = attention.forward(query, key, value, AttentionMetadata(0, attn_mask, is_causal=True))
        check(impl, out, exact(query, key, value, visible, causal=True))


@every_impl
def test_metadata_of_other_packages(impl: str) -> None:
    class Strict:  # raises for what it lacks, as FastVideo's base class does
        current_timestep = 5

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    class WithMask:
        attn_mask = padding([33, 20], 33)

    query, key, value = inputs()
    attention = MAKE[impl](4, 64, False, None, 2)
    out = attention.forward(query, key, value, Strict())  # type: ignore[arg-type]
    check(impl, out, exact(query, key, value))
    out = attention.forward(query, key, value, WithMask())  # type: ignore[arg-type]
    check(impl, out, exact(query, key, value, WithMask.attn_mask[:, None, None]))


@every_impl
@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 34), "covers 34 keys.*up to the 33"), ((33,), "1 dimensions"), ((1, 1, 1, 1, 33), "5 dimensions")],
)
def test_masks_that_do_not_fit(impl: str, shape: tuple[int, ...], message: str) -> None:
    attention = MAKE[impl](4, 64, False, None, 2)
    with pytest.raises(ValueError, match=message):
        attention.forward(*inputs(), AttentionMetadata(0, torch.ones(shape)))


@every_impl
def test_what_would_be_taken_for_something_else_is_refused(impl: str) -> None:
    query, key, value = inputs()
    attention = MAKE[impl](4, 64, False, None, 2)
    with pytest.raises(
        RuntimeError, match=r"query has 3 dimensions \(valid: 4, \[batch, seq, heads, head_size"
    ):
        attention.forward(query[0], key[0], value[0], output=torch.empty_like(query[0]))
    with pytest.raises(RuntimeError, match=r"query has head_size 32 \(valid: 64\)"):
        attention.forward(query[..., :32], key[..., :32], value)
    # FastVideo's layer for sparse attention passes its gate in front of the metadata.
    for metadata in ({"attn_mask": torch.zeros(2, 33)}, query, [None], 3, AttentionMetadata):
        with pytest.raises(TypeError, match=f"attn_metadata is a {type(metadata).__name__}"):
            attention.forward(query, key, value, metadata)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attn_metadata.is_causal='no' \(valid: True, False\)"):
        attention.forward(query, key, value, AttentionMetadata(0, is_causal="no"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attn_mask is torch.complex64"):
        attention.forward(query, key, value, AttentionMetadata(0, torch.ones(2, 33).cfloat()))
    with pytest.raises(TypeError, match="attn_mask is a list"):
        attention.forward(query, key, value, AttentionMetadata(0, [[1] * 33] * 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"key is a NoneType \(valid: a tensor\)"):
        attention.forward(query, None, value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"output is a list \(valid: a tensor\)"):
        attention.forward(query, key, value, output=[])  # type: ignore[arg-type]


@every_impl
def test_output_buffer_is_written_and_returned(impl: str) -> None:
    query, key, value = inputs()
    attention = MAKE[impl](4, 64, False, None, 2)
    wide = torch.full((2, 33, 4, 80), 7.0)
    for buffer in (
        torch.full_like(query, math.nan),
        wide[..., :64],
        torch.empty(2, 4, 33, 64).transpose(1, 2),
    ):
        out = attention.forward(query, key, value, None, output=buffer)
        assert out is buffer
        check(impl, buffer, exact(query, key, value))
    assert (wide[..., 64:] == 7).all()
    with torch.autocast("cpu", torch.bfloat16):
        buffer = torch.empty_like(query)  # of another dtype than autocast's
        assert attention.forward(query, key, value, None, output=buffer) is buffer
    assert relative(buffer, exact(query, key, value)) < 0.05
    assert SageAttentionBackend.accept_output_buffer and SDPABackend.accept_output_buffer


@every_impl
def test_contiguous_output_for_any_query_layout(impl: str) -> None:
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs())
    out = MAKE[impl](4, 64, False, None, 2).forward(query, key, value, None)
    assert out.is_contiguous() and not query.is_contiguous()
    check(impl, out.view(2, 33, 256).view_as(query), exact(query, key, value))


def test_inputs_are_not_written() -> None:
    qkv = torch.randn(2, 33, 3, 4, 64)
    before = qkv.clone()
    MAKE["sage"](4, 64, False, None).forward(*qkv.unbind(2), None)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("head_size", SageAttentionBackend.get_supported_head_sizes())
def test_every_listed_head_size_runs(head_size: int) -> None:
    query, key, value = inputs(q_len=5, kv_len=9, head_size=head_size)
    attention = SageAttentionImpl(4, head_size, False, None, 2, kernel="reference")
    assert (
        relative(attention.forward(query, key, value, None), exact(query, key, value)) < 1.5 * BOUNDS["fast"]
    )


def test_listed_head_sizes_are_those_of_the_gpu_kernels() -> None:
    sizes = SageAttentionBackend.get_supported_head_sizes()
    assert {64, 128} <= set(sizes) and sizes == sorted(set(sizes))
    families = [kernels.get(name) for name in kernels.AUTO_ORDER]
    assert all(any(size in family.head_dims for family in families) for size in sizes)
    assert SDPABackend.get_supported_head_sizes() is None
    dtypes = {dtype for family in families for dtype in family.dtypes}
    assert dtypes == set(SageAttentionBackend.get_supported_dtypes())


@pytest.mark.parametrize(
    ("backend", "name"), [(SageAttentionBackend, "SAGE_ATTN"), (SDPABackend, "TORCH_SDPA")]
)
def test_backend_classes(backend: type[AttentionBackend], name: str) -> None:
    assert backend.get_name() == name
    impl = backend.get_impl_cls()(num_heads=2, head_size=64, softmax_scale=0.1, num_kv_heads=2, causal=False)
    assert isinstance(impl, AttentionImpl)
    metadata = backend.get_builder_cls()().build(current_timestep=7)
    assert isinstance(metadata, backend.get_metadata_cls())
    assert metadata.current_timestep == 7 and metadata.attn_mask is None and not metadata.is_causal
    tensor = torch.ones(3)
    assert (
        impl.preprocess_qkv(tensor, metadata) is tensor
        and impl.postprocess_output(tensor, metadata) is tensor
    )
    backend.get_builder_cls()().prepare()
    assert sorted(backends.__all__, key=str.lower) == sorted(
        {name for name in dir(backends) if name[0].isupper() or name == "get_attn_backend"}, key=str.lower
    )


def test_metadata_as_a_dict() -> None:
    mask = torch.ones(2, 16)
    metadata = AttentionMetadataBuilder().build(3, mask, is_causal=True)
    assert metadata.asdict_zerocopy()["attn_mask"] is mask
    assert metadata.asdict_zerocopy({"attn_mask"}) == {
        "current_timestep": 3,
        "is_causal": True,
        "VSA_sparsity": 0.0,
    }


def test_extra_arguments(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sage_inductor"):
        for impl in (SageAttentionImpl, SDPAImpl):
            impl(
                2,
                64,
                False,
                0.1,
                2,
                "blocks.0",
                dropout_rate=0,
                dropout_p=0.0,
                rope_type="split",
                nvfp4_fa4=None,
            )
    assert "rope_type='split' has no meaning" in caplog.text
    with pytest.warns(
        UserWarning,
        match=r"kernal='auto' is not used \(valid: kernel, precision, smoothing, skip_threshold, skip_by, dropout_p",
    ):
        SageAttentionImpl(2, 64, False, 0.1, kernal="auto")
    with pytest.warns(UserWarning, match="kernel='auto' is not used"):
        SDPAImpl(2, 64, False, 0.1, kernel="auto")
    with pytest.raises(ValueError, match=r"kernel='flash' \(valid: auto, "):
        SageAttentionImpl(2, 64, False, 0.1, kernel="flash")
    # vLLM's: what asks for nothing is taken, what asks for other weights is refused.
    for impl in (SageAttentionImpl, SDPAImpl):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            impl(2, 64, False, 0.1, sliding_window=None, alibi_slopes=None, logits_soft_cap=0.0, sinks=None)
        for name, value in (
            ("sliding_window", 8),
            ("alibi_slopes", torch.ones(2)),
            ("alibi_slopes", np.ones(2)),
            ("logits_soft_cap", 30.0),
        ):
            with pytest.raises(ValueError, match=rf"{name}=.* \(valid: None"):
                impl(2, 64, False, 0.1, **{name: value})
    with pytest.raises(ValueError, match=r"precision='exact' \(valid: auto, fast, balanced, accurate\)"):
        SageAttentionImpl(2, 64, False, 0.1, precision="exact")
    with pytest.raises(ValueError, match="num_heads=6, num_kv_heads=4"):
        SageAttentionImpl(6, 64, False, 0.1, 4)
    with pytest.raises(ValueError, match=r"dropout_p=1.5 \(valid: 0 to 1\)"):
        SDPAImpl(2, 64, False, 0.1, dropout_p=1.5)


@pytest.mark.parametrize("implementation", [SageAttentionImpl, SDPAImpl])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 64.0}, r"head_size=64.0 \(valid: an int\)"),
        ({"num_heads": "2"}, r"num_heads='2' \(valid: an int\)"),
        ({"num_kv_heads": 1.0}, r"num_kv_heads=1.0 \(valid: an int\)"),
        ({"softmax_scale": "x"}, r"softmax_scale='x' \(valid: a finite number, None\)"),
        ({"softmax_scale": math.nan}, "softmax_scale=nan"),
        ({"softmax_scale": True}, "softmax_scale=True"),
        ({"head_size": True}, "head_size=True"),
        ({"causal": torch.ones(2)}, r"causal=tensor\(.* \(valid: True, False\)"),
        ({"dropout_p": np.ones(2)}, r"dropout_p=array\(.* \(valid: 0 to 1\)"),
        ({"causal": "no"}, r"causal='no' \(valid: True, False\)"),
        ({"dropout_rate": "none"}, r"dropout_rate='none' \(valid: 0 to 1\)"),
    ],
)
def test_sizes_and_scales(implementation: type[AttentionImpl], change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"num_heads": 2, "head_size": 64, "causal": False, "softmax_scale": 0.1}
    assert implementation(**sizes, num_kv_heads=None).num_kv_heads == 2
    numpy = {"num_heads": np.int64(2), "softmax_scale": np.float32(0.5), "causal": np.bool_(True)}
    made = implementation(**{**sizes, **numpy}, dropout_p=torch.tensor(0.0))
    assert (made.num_heads, made.softmax_scale, made.causal) == (2, 0.5, True)
    with pytest.raises(ValueError, match=message):
        implementation(**{**sizes, **change})


@pytest.mark.parametrize("name", ["dropout_p", "dropout_rate"])
def test_dropout(name: str) -> None:
    with pytest.raises(NotEligibleError, match=r"blocks\.0: dropout_p=0\.1 \(supported: 0\.0\)"):
        SageAttentionImpl(2, 64, False, 0.1, prefix="blocks.0", **{name: 0.1})
    query, key, value = inputs()
    out = SDPAImpl(4, 64, False, None, 2, **{name: 1.0}).forward(query, key, value, None)
    assert (out == 0).all()


def test_named_kernel_that_cannot_serve_raises() -> None:
    with pytest.raises(NotEligibleError) as caught:
        SageAttentionImpl(2, 80, False, 0.1, kernel="sageattention", precision="balanced")
    assert caught.value.reasons == (
        "head_size=80 (supported: 64, 96, 128)",
        "precision=balanced (supported: fast, accurate)",
    )
    attention = SageAttentionImpl(4, 64, False, None, 2, kernel="sageattention", precision="accurate")
    with pytest.raises(NotEligibleError, match="attn_mask=bool"):
        attention.forward(*inputs(), AttentionMetadata(0, torch.ones(2, 33, dtype=torch.bool)))


def test_gradients() -> None:
    query, key, value = inputs()
    query.requires_grad_()
    out = SageAttentionImpl(4, 64, True, None, 2).forward(query, key, value, None)
    out.sum().backward()
    assert query.grad is not None
    with pytest.raises(NotEligibleError, match="requires_grad=query"):
        MAKE["sage"](4, 64, True, None, 2).forward(query, key, value, None)
    with torch.no_grad():
        check(
            "sage",
            MAKE["sage"](4, 64, True, None, 2).forward(query, key, value, None),
            exact(query, key, value, causal=True),
        )


class Layer(torch.nn.Module):
    def __init__(self, attention: AttentionImpl) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata | None
    ) -> Tensor:
        out = self.attention.forward(query * 1.0, key, value, metadata)
        return out.view(*out.shape[:2], -1) + 1.0


@every_impl
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole_and_once_for_all_lengths(impl: str, masked: bool, causal: bool) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    layer = Layer(MAKE[impl](4, 64, causal, None, 2))
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (33, 40, 57):
            query, key, value = inputs(length, length)
            metadata = AttentionMetadata(0, padding([length, 20], length).long() if masked else None)
            torch.testing.assert_close(
                compiled(query, key, value, metadata), layer(query, key, value, metadata)
            )
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["sage", "sdpa"])
def test_compiles_with_inductor_and_output_buffer(impl: str) -> None:
    attention = MAKE[impl](4, 64, True, None, 2)

    @torch.compile(fullgraph=True)
    def step(
        query: Tensor, key: Tensor, value: Tensor, buffer: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        return attention.forward(query, key, value, metadata, output=buffer) * 2

    query, key, value = inputs()
    metadata = AttentionMetadata(0, padding([33, 20], 33).long())
    buffer = torch.zeros_like(query)
    with torch.no_grad():
        doubled = step(query, key, value, buffer, metadata)
    check(impl, buffer, exact(query, key, value, metadata.attn_mask.bool()[:, None, None], causal=True))
    torch.testing.assert_close(doubled, buffer * 2)


# The selector.


class Theirs(enum.Enum):
    SAGE_ATTN = enum.auto()
    TORCH_SDPA = enum.auto()
    FLASH_ATTN = enum.auto()


class FastKernel(kernels.Kernel):
    """A kernel that can run here: head_dim 64, 16 bits, at "fast"."""

    name = "triton"
    precisions = ("fast",)
    dtypes = (torch.float16, torch.bfloat16)
    device_types = ("cpu", "cuda")
    head_dims = (64,)
    not_chosen: tuple[str, ...] = ()

    def unavailable_reasons(self, device: torch.device | None = None) -> list[str]:
        return []

    def not_chosen_reasons(self, problem: kernels.AttentionProblem) -> list[str]:
        return list(self.not_chosen)

    def run(self, *args: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fast_kernel(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> FastKernel:
    kernel = FastKernel()
    get = kernels.get
    monkeypatch.setattr(kernels, "get", lambda name: kernel if name == "triton" else get(name))
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("triton",))
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu", "cuda"))
    return kernel


def test_automatic_choice(fast_kernel: FastKernel) -> None:
    assert get_attn_backend(64, torch.bfloat16) is SageAttentionBackend
    assert get_attn_backend(80, torch.bfloat16) is SDPABackend
    assert get_attn_backend(64, torch.float32) is SDPABackend
    fast_kernel.not_chosen = ("slower",)
    assert get_attn_backend(64, torch.bfloat16) is SDPABackend
    assert get_attn_backend(64, torch.bfloat16, requested="SAGE_ATTN") is SageAttentionBackend


def test_automatic_choice_without_a_gpu(no_gpu: None) -> None:
    assert get_attn_backend(64, torch.bfloat16) is SDPABackend
    assert get_attn_backend(64, torch.bfloat16, default_backend="SAGE_ATTN") is SDPABackend
    with pytest.raises(NotEligibleError, match="only backend the layer supports.*device=cpu"):
        get_attn_backend(64, torch.bfloat16, ("SAGE_ATTN",))


@pytest.mark.parametrize("form", ["SAGE_ATTN", " sage_attn ", Theirs.SAGE_ATTN, SageAttentionBackend])
def test_request(form: Any, fast_kernel: FastKernel) -> None:
    assert get_attn_backend(64, torch.bfloat16, requested=form) is SageAttentionBackend
    with pytest.raises(NotEligibleError) as caught:
        get_attn_backend(80, torch.float32, requested=form)
    assert caught.value.reasons == (
        "triton: dtype=float32 (supported: float16, bfloat16)",
        "triton: head_dim=80 (supported: 64)",
        "triton: value_head_dim=80 (supported: 64)",
    )
    supported = (Theirs.FLASH_ATTN, Theirs.TORCH_SDPA)
    with pytest.raises(ValueError, match=r"requested=SAGE_ATTN \(supported by the layer: TORCH_SDPA\)"):
        get_attn_backend(64, torch.bfloat16, supported, requested=form)


@pytest.mark.parametrize("form", ["TORCH_SDPA", Theirs.TORCH_SDPA, SDPABackend])
def test_sdpa_serves_everything(form: Any, fast_kernel: FastKernel) -> None:
    assert get_attn_backend(80, torch.float64, requested=form) is SDPABackend
    assert get_attn_backend(64, torch.bfloat16, default_backend=form) is SDPABackend
    assert get_attn_backend(64, torch.bfloat16, (form,)) is SDPABackend


def test_default_gives_way_to_request_and_to_what_runs(fast_kernel: FastKernel) -> None:
    assert (
        get_attn_backend(64, torch.bfloat16, None, "TORCH_SDPA", requested="SAGE_ATTN")
        is SageAttentionBackend
    )
    assert get_attn_backend(80, torch.bfloat16, None, "SAGE_ATTN") is SDPABackend
    assert (
        get_attn_backend(64, torch.bfloat16, ("SAGE_ATTN", "FLASH_ATTN"), "TORCH_SDPA")
        is SageAttentionBackend
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"requested": "FLASH_ATTN"}, r"requested='FLASH_ATTN' \(valid: SAGE_ATTN, TORCH_SDPA\)"),
        ({"requested": Theirs.FLASH_ATTN}, r"requested='FLASH_ATTN' \(valid"),
        ({"default_backend": "NABLA"}, r"default_backend='NABLA' \(valid"),
        ({"supported_attention_backends": ()}, r"\[\] \(valid: at least one of SAGE_ATTN, TORCH_SDPA\)"),
        ({"supported_attention_backends": (Theirs.FLASH_ATTN,)}, r"\['FLASH_ATTN'\] \(valid"),
        ({"supported_attention_backends": "SAGE_ATTN"}, r"='SAGE_ATTN' \(valid: a list of backends\)"),
        ({"head_size": "64"}, r"head_size='64' \(valid: an int from 1\)"),
        ({"dtype": "bfloat16"}, r"dtype='bfloat16' \(valid: a torch.dtype\)"),
    ],
)
def test_unknown_backends(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_attn_backend(**{"head_size": 64, "dtype": torch.bfloat16, **arguments})


def test_request_without_a_gpu(no_gpu: None) -> None:
    with pytest.raises(NotEligibleError, match=r"requested=SAGE_ATTN: device=cpu \(supported: cuda\)"):
        get_attn_backend(64, torch.bfloat16, requested="SAGE_ATTN")


def test_refused_request_names_every_kernel(fast_kernel: FastKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("triton", "sageattention"))
    with pytest.raises(NotEligibleError) as caught:
        get_attn_backend(64, torch.float64, requested="SAGE_ATTN")
    assert {text.split(":")[0] for text in caught.value.reasons} == {"triton", "sageattention"}


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "explicit_backend.py"
    spec = importlib.util.spec_from_file_location("explicit_backend", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    errors = example.main(["--seq-len", "100"])
    assert list(errors) == ["full", "causal", "key padding", "causal, key padding"]
    assert all(
        error["SAGE_ATTN"] < BOUNDS["fast"] and error["TORCH_SDPA"] < 0.01 for error in errors.values()
    )
    assert "kernel reference: can run" in capsys.readouterr().out
