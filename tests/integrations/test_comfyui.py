"""The node of examples/comfyui, against a stand-in of ComfyUI's call made from its interface (version 0.3.64).

ComfyUI is an application, not a package. The stand-in has what its attention functions and model patcher take: a wrapper that
looks for an override among `transformer_options`, an attention with folded or unfolded heads, and a model that is cloned with
its options copied deeply.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import NotEligibleError
from sage_inductor.testing import relative_l2

pytestmark = pytest.mark.usefixtures("inference")
FILE = Path(__file__).resolve().parents[2] / "examples" / "comfyui" / "sage_inductor_attention.py"
HEADS, DIM = 4, 32
own_calls: list[str] = []


def wrap_attn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        if "_inside_attn_wrapper" not in kwargs:
            options = kwargs.get("transformer_options") or {}
            kwargs["_inside_attn_wrapper"] = True
            if "optimized_attention_override" in options:
                return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@wrap_attn
def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    own_calls.append("own")
    if not skip_reshape:
        q, k, v = (x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    scale, gqa = kwargs.get("scale"), kwargs.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    return (
        out if skip_output_reshape else out.transpose(1, 2).reshape(out.shape[0], -1, heads * out.shape[-1])
    )


class Sampling:
    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


class Model:
    """What a MODEL of ComfyUI is to a node."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {"note": 1}}

    def clone(self) -> Model:
        cloned = Model()
        cloned.model_options = copy.deepcopy(self.model_options)
        return cloned

    def get_model_object(self, name: str) -> Sampling:
        assert name == "model_sampling"
        return Sampling()

    def attention(self, *args: Any, sigma: float = 0.5, **kwargs: Any) -> Tensor:
        options = {**self.model_options["transformer_options"], "sigmas": torch.tensor([sigma])}
        own_calls.clear()
        return optimized_attention(*args, transformer_options=options, **kwargs)


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """The node's file, loaded as ComfyUI loads it: by the path without its ending."""
    spec = importlib.util.spec_from_file_location(str(FILE.with_suffix("")), FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return module


def patched(node: ModuleType, **inputs: Any) -> Model:
    cls = node.NODE_CLASS_MAPPINGS["SageInductorAttention"]
    required = cls.INPUT_TYPES()["required"]
    assert required["kernel"][0][0] == "auto" and cls.RETURN_TYPES == ("MODEL",)
    given = {"kernel": "reference", "precision": "fast", "start_percent": 0.0, "end_percent": 1.0, **inputs}
    assert given.keys() <= required.keys() - {"model"}
    model = Model()
    (result,) = getattr(cls(), cls.FUNCTION)(model, **given)
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    assert result.model_options["transformer_options"]["note"] == 1
    return result.clone()  # as later nodes do


def draw(skip_reshape: bool, dtype: torch.dtype = torch.float32, keys: int = 40, heads: int = HEADS) -> Any:
    lengths = ((48, HEADS), (keys, heads), (keys, heads))
    tensors = [torch.randn(2, h, n, DIM, dtype=dtype) for n, h in lengths]
    return tensors if skip_reshape else [x.transpose(1, 2).reshape(2, x.shape[2], -1) for x in tensors]


MASKS: dict[str, Callable[[], Tensor]] = {
    "queries, keys": lambda: torch.rand(48, 40) > 0.4,
    "batch, queries, keys": lambda: torch.randn(2, 48, 40),
    "four dims, bool": lambda: torch.arange(40)[None, None, None].expand(2, 1, 1, 40) < 25,
    "by head": lambda: torch.randn(2, HEADS, 48, 40),
}


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize(
    ("skip_reshape", "skip_output_reshape"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_shapes_and_masks(
    node: ModuleType, mask: str | None, skip_reshape: bool, skip_output_reshape: bool
) -> None:
    q, k, v = draw(skip_reshape)
    kwargs = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    given = None if mask is None else MASKS[mask]()
    exact = Model().attention(q, k, v, HEADS, given, **kwargs)
    out = patched(node).attention(q, k, v, HEADS, given, **kwargs)
    assert own_calls == [] and out.shape == exact.shape and 1e-4 < relative_l2(out, exact) < 0.045
    assert out.is_contiguous() or skip_output_reshape
    by_name = patched(node).attention(q, k, v, heads=HEADS, mask=given, **kwargs)
    assert torch.equal(by_name, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(node: ModuleType, dtype: torch.dtype) -> None:
    q, k, v = draw(True, dtype)
    out = patched(node, precision="accurate").attention(q, k, v, HEADS, skip_reshape=True)
    exact = Model().attention(*(x.float() for x in (q, k, v)), HEADS, skip_reshape=True)
    assert out.dtype == dtype and 0 < relative_l2(out.float(), exact) < 0.015


def test_options_of_newer_versions(node: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(node)
    q, k, v = draw(True, heads=2)
    options = {"skip_reshape": True, "scale": 0.3, "enable_gqa": True}
    exact = Model().attention(q, k, v, HEADS, **options)
    assert relative_l2(model.attention(q, k, v, HEADS, **options), exact) < 0.045 and not own_calls
    q, k, v = draw(True)
    for exact_only in (
        {"low_precision_attention": False},
        {"attn_precision": torch.float32, "half": True},
        {"window": 3},
    ):
        half = exact_only.pop("half", False)
        given = [x.half() if half else x for x in (q, k, v)]
        for _ in range(2):
            model.attention(*given, HEADS, skip_reshape=True, **exact_only)
            assert own_calls == ["own"]
    assert [record.message for record in caplog.records if "window" in record.message] == [
        "attention with window stays ComfyUI's own: the node does not know it"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    model.attention(q, k, v, HEADS, skip_reshape=True, attn_precision=torch.float32)  # they are float32
    assert own_calls == []


def test_what_auto_and_a_named_kernel_do_without_a_gpu(node: ModuleType) -> None:
    q, k, v = draw(True)
    patched(node, kernel="auto").attention(q, k, v, HEADS, skip_reshape=True)
    assert own_calls == ["own"]
    if not torch.cuda.is_available():
        with pytest.raises(NotEligibleError, match="kernel=hopper"):
            patched(node, kernel="hopper").attention(q, k, v, HEADS, skip_reshape=True)


def test_a_range_of_steps(node: ModuleType) -> None:
    model = patched(node, start_percent=0.2, end_percent=0.9)
    q, k, v = draw(True)
    in_8_bits = []
    for percent in (0.0, 0.1, 0.2, 0.5, 0.85, 0.95):
        model.attention(q, k, v, HEADS, skip_reshape=True, sigma=1.0 - percent)
        in_8_bits.append(not own_calls)
    assert in_8_bits == [False, False, True, True, True, False]


def test_little_memory(node: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the copies do not fit, heads run in parts, with the same result."""
    q, k, v = draw(True)
    mask = MASKS["by head"]()
    whole = patched(node).attention(q, k, v, HEADS, mask, skip_reshape=True)
    seen, real = [], node.sage_attention

    def small(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.shape[1])
        if query.shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(query, *args, **kwargs)

    monkeypatch.setattr(node, "sage_attention", small)
    parts = patched(node).attention(q, k, v, HEADS, mask, skip_reshape=True)
    assert seen == [4, 2, 1, 1, 2, 1, 1] and relative_l2(parts, whole) < 1e-6

    def never(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(node, "sage_attention", never)
    with pytest.raises(torch.OutOfMemoryError):
        patched(node).attention(q, k, v, HEADS, skip_reshape=True)


def test_compiled(node: ModuleType) -> None:
    model = patched(node)
    q, k, v = draw(False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = model.model_options["transformer_options"]
        return optimized_attention(q, k, v, HEADS, transformer_options=options)

    out = torch.compile(run, backend="eager", fullgraph=True)(q, k, v)
    assert torch.equal(out, run(q, k, v))
