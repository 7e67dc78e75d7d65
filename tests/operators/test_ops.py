"""The operators: schema, strides, autocast, functional behaviour, symbolic shapes, errors."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from sage_inductor import NotEligibleError, kernels, sage_attention
from sage_inductor.graph.sizes import memory_order as order_of
from sage_inductor.kernels.cache import Cache
from sage_inductor.operators import inference as ops
from sage_inductor.testing import relative_l2

REFERENCE = {"kernel_name": "reference"}


def hnd(batch: int = 2, heads: int = 4, seq: int = 20, dim: int = 32, **kwargs: Any) -> Tensor:
    return torch.randn(batch, heads, seq, dim, **kwargs)


def nhd(batch: int = 2, heads: int = 4, seq: int = 20, dim: int = 32, **kwargs: Any) -> Tensor:
    return torch.randn(batch, seq, heads, dim, **kwargs).transpose(1, 2)


def fused(batch: int = 2, heads: int = 4, seq: int = 20, dim: int = 32) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection's output."""
    return tuple(torch.randn(batch, seq, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0))


def ids(*shape: int) -> Tensor:
    return torch.randint(-1, 3, shape, dtype=torch.int32)


SAMPLES: dict[str, tuple[tuple[Tensor | None, ...], dict[str, Any]]] = {
    "HND": ((hnd(), hnd(), hnd()), {}),
    "NHD": ((nhd(), nhd(), nhd()), {}),
    "fused qkv": (fused(), {}),
    "sequence-first": (tuple(torch.randn(20, 2, 4, 32).permute(1, 2, 0, 3) for _ in range(3)), {}),
    "GQA": ((nhd(), nhd(heads=2), nhd(heads=2)), {"enable_gqa": True}),
    "cross, ragged": ((hnd(), hnd(seq=13), hnd(seq=13, dim=16)), {}),
    "3-D": ((hnd()[0], hnd()[0], hnd()[0]), {}),
    "2-D": ((hnd()[0, 0], hnd()[0, 0], hnd()[0, 0]), {}),
    "key padding": ((hnd(), hnd(), hnd(), torch.rand(2, 1, 1, 20) > 0.3), {}),
    "bool mask": ((hnd(), hnd(), hnd(), torch.rand(20, 20) > 0.3), {}),
    "expanded mask": ((hnd(), hnd(), hnd(), (torch.rand(2, 1, 1, 20) > 0.3).expand(2, 4, 20, 20)), {}),
    "3-D, mask": ((hnd()[0], hnd()[0], hnd()[0], torch.rand(4, 20, 20) > 0.3), {}),
    "additive": ((hnd(), hnd(), hnd(), torch.randn(1, 4, 20, 20)), {"scale": 0.3}),
    "bfloat16": (tuple(hnd(dtype=torch.bfloat16) for _ in range(3)), {"precision": "accurate"}),
    "float16": (tuple(hnd(dtype=torch.float16) for _ in range(3)), {"precision": "balanced"}),
    "bottom-right": ((hnd(), hnd(seq=30), hnd(seq=30), None, True), {"bottom_right": True}),
    "window": ((hnd(), hnd(), hnd(), None, True), {"window_left": 4}),
    "memory order": ((hnd(), hnd(), hnd()), {"memory_order": [0, 2, 1, 3]}),
    "auto": ((hnd(), hnd(), hnd()), {"kernel_name": "auto"}),
    "segments": (
        (nhd(), nhd(seq=30, heads=2), nhd(seq=30, heads=2), None, True),
        {"query_segments": ids(2, 20), "key_segments": ids(2, 30), "enable_gqa": True},
    ),
    "3-D, segments": (
        (hnd()[0], hnd()[0], hnd()[0]),
        {"query_segments": ids(20), "key_segments": ids(20), "kernel_name": "auto"},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    args, kwargs = SAMPLES[name]
    kwargs = REFERENCE | kwargs
    torch.library.opcheck(ops.attention, args, kwargs)
    torch.library.opcheck(ops.attention_lse, args, kwargs)
    query, value = args[0], args[2]
    assert query is not None and value is not None
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_order"}
    output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    torch.library.opcheck(ops.attention_out, args, kwargs | {"output": output})


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "memory order"])
def test_strides_are_those_of_the_query_and_inputs_are_untouched(name: str) -> None:
    args, kwargs = SAMPLES[name]
    before = [tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in args]
    out = ops.attention(*args, **(REFERENCE | kwargs))
    query = args[0]
    assert query is not None
    assert order_of(out) == order_of(query)
    assert out.permute(order_of(out)).is_contiguous()
    for tensor, copy in zip(args, before, strict=True):
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, copy)  # type: ignore[arg-type]


def test_nhd_query_gives_nhd_memory_as_sdpa_does() -> None:
    q, k, v = nhd(), nhd(), nhd()
    out = ops.attention(q, k, v, **REFERENCE)
    assert out.stride() == F.scaled_dot_product_attention(q, k, v).stride()
    out.transpose(1, 2).view(2, 20, -1)


def test_out_form_writes_into_any_strides() -> None:
    q, k, v = hnd(), hnd(), hnd()
    buffer = torch.full((2, 20, 4, 40), 7.0)
    view = buffer.transpose(1, 2)[..., :32]
    assert sage_attention(q, k, v, kernel="reference", out=view) is view
    assert torch.equal(view, ops.attention(q, k, v, **REFERENCE))
    assert bool((buffer[..., 32:] == 7.0).all())


def test_expanded_out_is_refused_also_after_a_call_with_the_same_shapes() -> None:
    q, k, v = hnd(), hnd(), hnd()
    sage_attention(q, k, v, kernel="reference", out=torch.empty_like(q))
    once = torch.zeros_like(q[:1])
    with pytest.raises(RuntimeError, match="out is expanded in dim 0: its 2 elements are one in memory"):
        sage_attention(q, k, v, kernel="reference", out=once.expand_as(q))
    assert bool((once == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(dtype: torch.dtype) -> None:
    q, k, v, bias = hnd(), hnd().to(dtype), hnd(), torch.randn(20, 20)
    with torch.autocast("cpu", dtype=dtype):
        expected = F.scaled_dot_product_attention(q, k.float(), v, bias)
        out = ops.attention(q, k, v, bias, kernel_name="reference", precision="accurate")
        _, lse = ops.attention_lse(q, k, v, bias, kernel_name="reference")
        outer = torch.empty_like(q, dtype=dtype)
        ops.attention_out(q, k, v, bias, kernel_name="reference", precision="accurate", output=outer)
    assert out.dtype == expected.dtype == dtype and lse.dtype == torch.float32
    assert relative_l2(out, expected) < 0.02
    assert torch.equal(out, outer)


@pytest.mark.parametrize(
    "attend", [F.scaled_dot_product_attention, partial(sage_attention, kernel="reference")]
)
def test_no_float_of_ours_is_a_symbol(attend: Any) -> None:
    """AOTAutograd has Dynamo start again where a symbol turns out to be a number."""
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward))(graph, inputs)

    compiled = torch.compile(lambda x: attend(x, x, x) * 2, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (48, 80):
            compiled(torch.randn(1, 2, length, 32))
    assert len(traced) == 1


def test_fullgraph_dynamic_lengths_compile_once() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return sage_attention(q, k, v, kernel="reference").transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    for seq in (5, 17, 64, 130):
        q, k, v = nhd(seq=seq), nhd(seq=seq), nhd(seq=seq)
        expected = ops.attention(q, k, v, **REFERENCE).transpose(1, 2).reshape(2, seq, -1)
        assert torch.equal(attend(q, k, v), expected)
    assert counter.frame_count == 1


def test_auto_on_the_cpu_is_exact() -> None:
    q, k, v = nhd(), nhd(heads=2), nhd(heads=2)
    out, lse = sage_attention(q, k, v, is_causal=True, enable_gqa=True, return_lse=True)  # type: ignore[misc]
    scores = (q @ k.repeat_interleave(2, 1).mT * 32**-0.5).masked_fill(
        torch.ones(20, 20).triu(1).bool(), -torch.inf
    )
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)) < 1e-6
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5
    padding = torch.rand(2, 1, 1, 20) > 0.3
    masked = sage_attention(q, k, v, padding, enable_gqa=True)
    assert relative_l2(masked, F.scaled_dot_product_attention(q, k, v, padding, enable_gqa=True)) < 1e-6  # type: ignore[arg-type]
    windowed = ops.attention(q, q, q, None, True, window_left=3)
    distance = torch.arange(20) - torch.arange(20)[:, None]
    mask = (distance <= 0) & (distance >= -3)
    assert relative_l2(windowed, F.scaled_dot_product_attention(q, q, q, mask)) < 1e-6


@pytest.mark.parametrize("q_len,kv_len", [(0, 5), (5, 0)])
def test_empty_inputs(q_len: int, kv_len: int) -> None:
    out, lse = ops.attention_lse(hnd(seq=q_len), hnd(seq=kv_len), hnd(seq=kv_len), **REFERENCE)
    assert out.shape == (2, 4, q_len, 32) and bool((out == 0).all()) and bool((lse == -torch.inf).all())


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, 4, 32) for n in (10, 20)], layout=torch.jagged).mT


@pytest.mark.parametrize(
    ("tensors", "kwargs", "message"),
    [
        ((hnd(), hnd(dim=16), hnd()), {}, "head_dim of query is 32, of key 16"),
        ((hnd(), hnd(seq=5), hnd(seq=6)), {}, "kv_len of key is 5, of value 6"),
        ((hnd(), hnd(heads=2), hnd(heads=2)), {}, "enable_gqa is False"),
        ((hnd(), hnd(heads=3), hnd(heads=3)), {"enable_gqa": True}, "not a multiple of 3"),
        ((hnd(), hnd(batch=3), hnd(batch=3)), {}, "key has batch 3, query 2"),
        ((hnd(), hnd().half(), hnd()), {}, "key is torch.float16, query is torch.float32"),
        ((hnd(), hnd(device="meta"), hnd()), {}, "key is on meta, query on cpu"),
        ((hnd(), hnd(), hnd(), hnd(device="meta")), {}, "attn_mask is on meta, query on cpu"),
        ((hnd(), hnd(), hnd()[0, 0, 0]), {}, "value has 1 dimensions"),
        ((hnd()[None], hnd(batch=3)[None], hnd()[None]), {}, "do not broadcast: (1, 2, "),
        ((hnd(), hnd(), hnd(), torch.ones(20, 7).bool()), {}, "does not broadcast"),
        (
            (hnd(), hnd(), hnd(), torch.ones(20, 20).long()),
            {},
            "attn_mask is torch.int64 (valid: torch.bool, torch.float32)",
        ),
        ((hnd(), hnd()[:, :0], hnd()[:, :0]), {"enable_gqa": True}, "not a multiple of 0"),
        ((hnd().int(), hnd().int(), hnd().int()), {}, "are torch.int32 (valid: a floating-point dtype)"),
        ((hnd().to_sparse(), hnd(), hnd()), {}, "query is nested or sparse (valid: a strided tensor"),
        ((hnd(), jagged(), jagged()), {}, "key is nested or sparse"),
        ((hnd(), hnd(), hnd()), {"out": torch.empty(2, 4, 20, 31)}, "out is (2, 4, 20, 31)"),
        ((hnd(), hnd(), hnd(), torch.ones(20, 20).bool()), {"is_causal": True}, "exclude each other"),
    ],
)
def test_inputs_that_do_not_fit_raise_like_sdpa(tensors: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        sage_attention(*tensors, kernel="reference", **kwargs)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel": "magic"}, "valid: auto, hopper, triton, sageattention, reference"),
        ({"precision": "best"}, "valid: auto, fast, balanced, accurate"),
        ({"dropout_p": 2.0}, "valid: 0 to 1"),
        ({"dropout_p": "none"}, r"dropout_p='none' \(valid: 0 to 1\)"),
        ({"kernel": ["auto"]}, r"kernel=\['auto'\] \(valid: auto, "),
        ({"precision": ["fast"]}, "valid: auto, fast, balanced, accurate"),
        ({"smoothing": ["mean"]}, r"smoothing=\['mean'\] \(valid: mean, "),
        ({"wires": np.array(["inputs", "8-bit"])}, r"wires=array\(.* \(valid: inputs, 8-bit\)"),
        ({"skip_by": np.array(["scores", "sample"])}, r"skip_by=array\(.* \(valid: scores, sample\)"),
        ({"dropout_p": torch.zeros(2)}, r"dropout_p=tensor\(.* \(valid: 0 to 1\)"),
        ({"is_causal": "no"}, r"is_causal='no' \(valid: True, False\)"),
        ({"enable_gqa": 2}, r"enable_gqa=2 \(valid: True, False\)"),
    ],
)
def test_unknown_values_list_the_valid_ones(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sage_attention(hnd(), hnd(), hnd(), **kwargs)


def test_numbers_are_those_of_numpy_and_tensors_too() -> None:
    query, key, value = hnd(), hnd(), hnd()
    expected = sage_attention(query, key, value, is_causal=True, scale=0.5, kernel="reference")
    for scale, none, causal in (
        (np.float32(0.5), np.float32(0), np.bool_(True)),
        (torch.tensor(0.5), torch.tensor(0), 1),
    ):
        numbers: Any = {"scale": scale, "dropout_p": none, "skip_threshold": none, "is_causal": causal}
        assert torch.equal(sage_attention(query, key, value, kernel="reference", **numbers), expected)
    # SDPA breaks the graph there, too.
    compiled = torch.compile(lambda *args, scale: sage_attention(*args, scale=scale), backend="eager")
    exact = F.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(compiled(query, key, value, scale=torch.tensor(0.5)), exact)
    dropped = sage_attention(query, key, value, dropout_p=np.float32(1))  # type: ignore[arg-type]
    assert isinstance(dropped, Tensor) and not dropped.any()
    with pytest.raises(TypeError, match=r"scale='big' \(valid: a number, None\)"):
        sage_attention(query, key, value, scale="big")  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_what_is_no_tensor_is_named(kernel: str) -> None:
    for arguments, message in (
        ((None, hnd(), hnd()), "query is a NoneType"),
        ((hnd(), hnd().numpy(), hnd()), "key is a ndarray"),
        ((hnd(), hnd(), hnd(), [[True]]), "attn_mask is a list"),
    ):
        with pytest.raises(TypeError, match=message):
            sage_attention(*arguments, kernel=kernel)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out is a ndarray"):
        sage_attention(hnd(), hnd(), hnd(), kernel=kernel, out=hnd().numpy())  # type: ignore[arg-type]


def test_causal_biases_are_seen_through() -> None:
    query, key, value = hnd(seq=12), hnd(), hnd()
    for make in (causal_lower_right, causal_upper_left):
        bias = make(12, 20)
        expected = F.scaled_dot_product_attention(query, key, value, bias)
        out = sage_attention(query, key, value, bias, kernel="reference", precision="accurate")
        assert isinstance(out, Tensor) and relative_l2(out, expected) < 0.02
        exact = sage_attention(query.clone().requires_grad_(), key, value, bias)
        assert isinstance(exact, Tensor) and relative_l2(exact, expected) < 1e-6
        with pytest.raises(RuntimeError, match=r"for lengths \(12, 20\), not \(20, 20\)"):
            sage_attention(hnd(), key, value, bias)


def test_the_operator_itself_refuses_unknown_values() -> None:
    with pytest.raises(ValueError, match="valid: auto, fast, balanced, accurate"):
        ops.attention(hnd(), hnd(), hnd(), precision="best", **REFERENCE)
    with pytest.raises(ValueError, match="valid: hopper, triton"):
        ops.attention(hnd(), hnd(), hnd(), kernel_name="magic")


def test_what_a_quantised_kernel_cannot_give_is_exact_or_refused() -> None:
    q, k, v = hnd(), hnd(), hnd().requires_grad_()
    out = sage_attention(q, k, v)
    assert isinstance(out, Tensor) and out.requires_grad
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(NotEligibleError, match="requires_grad=value"):
        sage_attention(q, k, v, kernel="reference")
    with torch.no_grad():
        sage_attention(q, k, v, kernel="reference")
    with pytest.raises(NotEligibleError, match=r"dropout_p=0.5 \(supported: 0.0\)"):
        sage_attention(q, k, v.detach(), dropout_p=0.5, kernel="reference")
    torch.manual_seed(1)
    dropped = sage_attention(q, k, v.detach(), dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v.detach(), dropout_p=0.5))  # type: ignore[arg-type]
    with pytest.raises(NotEligibleError, match=r"dtype=float64 \(supported: float16, bfloat16, float32\)"):
        sage_attention(q.double(), k.double(), v.detach().double(), kernel="reference")


def test_the_operator_exists_after_the_import_alone() -> None:
    code = "import torch, sage_inductor; print(torch.ops.sage_inductor.attention.default._schema.name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "sage_inductor::attention"


def test_the_operator_is_exact_for_inputs_that_need_gradients() -> None:
    q, k, v = hnd().requires_grad_(), hnd(), hnd()
    assert torch.equal(ops.attention(q, k, v, **REFERENCE), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(NotEligibleError, match="requires_grad=query"):
        ops.attention_out(q, k, v, **REFERENCE, output=torch.empty_like(v))
    with torch.no_grad():
        assert not ops.attention(q, k, v, **REFERENCE).requires_grad


def test_few_queries_or_keys_get_exact_attention() -> None:
    """The dispatch of symbolic lengths: below `min_q_len` or `min_kv_len` SDPA, in the strides that were promised."""
    q, k = nhd(), nhd(seq=30)
    exact, quantised = F.scaled_dot_product_attention(q, k, k), ops.attention(q, k, k, **REFERENCE)
    assert not torch.equal(exact, quantised)
    for least, expected in (
        ({"min_q_len": 21}, exact),
        ({"min_kv_len": 31}, exact),
        ({"min_q_len": 20, "min_kv_len": 31}, exact),
        ({"min_q_len": 20, "min_kv_len": 30}, quantised),
    ):
        out = ops.attention(q, k, k, **REFERENCE, **least)
        assert torch.equal(out, expected) and out.stride() == quantised.stride(), least
        buffer = torch.empty_like(q)
        ops.attention_out(q, k, k, **REFERENCE, **least, output=buffer)
        assert torch.equal(buffer, expected), least
        for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
            out = ops.attention(q, k, k, **REFERENCE, **least, memory_order=order)
            assert torch.equal(out, expected) and order_of(out) == order
        single = ops.attention(q[0, 0], k[0, 0], k[0, 0], **REFERENCE, **least)
        assert relative_l2(single, expected[0, 0]) < 1e-6
    out, lse = ops.attention_lse(q, k, k, None, True, **REFERENCE, min_kv_len=31)
    scores = (q @ k.mT * 32**-0.5).masked_fill(torch.ones(20, 30).triu(1).bool(), -torch.inf)
    assert relative_l2(out, F.scaled_dot_product_attention(q, k, k, is_causal=True)) < 1e-6
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the reference kernel is prepared for: strides of the output, shape of the LSE, parameters."""
    kinds: list[tuple[Any, ...]] = []
    kernel = type(kernels.get("reference"))
    prepare = kernel.prepare

    def recorded(self: Any, *args: Any) -> Any:
        params, out, lse = args[4:]
        kinds.append((out.stride(), None if lse is None else tuple(lse.shape), params))
        return prepare(self, *args)

    monkeypatch.setattr(kernel, "prepare", recorded)
    monkeypatch.setattr(ops, "_resolved", Cache(8))
    return kinds


def test_calls_of_one_kind_are_resolved_once(prepared: list[tuple[Any, ...]]) -> None:
    q, k, v = nhd(), nhd(), nhd()
    outs = [ops.attention(q.clone(), k, v, **REFERENCE) for _ in range(3)]
    assert len(prepared) == 1
    assert torch.equal(outs[0], outs[2]) and len({out.data_ptr() for out in outs}) == 3
    assert outs[0].stride() == outs[2].stride() == q.stride()
    assert not torch.equal(ops.attention(v, k, q, **REFERENCE), outs[0]) and len(prepared) == 1


def test_whatever_a_call_depends_on_is_part_of_its_kind(prepared: list[tuple[Any, ...]]) -> None:
    q, k, v = nhd(), nhd(), nhd()
    padded, mask = torch.empty(2, 4, 20, 40)[..., :32], torch.rand(20, 20) > 0.2
    expected = ops.attention(q, k, v, **REFERENCE)
    different: list[tuple[Any, dict[str, Any]]] = [
        (lambda **options: ops.attention_out(q, k, v, output=torch.empty(2, 4, 20, 32), **options), {}),
        (lambda **options: ops.attention_out(q, k, v, output=padded, **options), {}),
        (lambda **options: ops.attention_lse(q, k, v, **options), {}),
        (lambda **options: ops.attention(q, k, v, mask, **options), {}),
        (lambda **options: ops.attention(q, k, v, mask.mT, **options), {}),
        (lambda **options: ops.attention(q, k.clone(), v.contiguous(), **options), {}),
        (lambda **options: ops.attention(q[:, :, :19], k, v, **options), {}),
        *((lambda **options: ops.attention(q, k, v, **options), options) for options in (
            {"is_causal": True}, {"bottom_right": True}, {"window_left": 3}, {"window_right": 3}, {"scale": 2.0},
            {"precision": "accurate"}, {"memory_order": [1, 0, 2, 3]}, {"memory_order": [0, 1, 2, 3]},
        )),
    ]  # fmt: skip
    for number, (call, options) in enumerate(different):
        for _ in range(2):
            call(**REFERENCE, **options)
        assert len(prepared) == 2 + number, options
    assert len(set(prepared)) > 8 and 0 < len(ops._resolved) <= 8
    ops.attention_out(q, k, v, output=padded, **REFERENCE)
    assert torch.equal(padded, expected)
    # Exact attention is not prepared, and does not replace what is.
    before = len(prepared)
    exact = ops.attention(q, k, v, **REFERENCE, min_kv_len=21)
    assert torch.equal(exact, F.scaled_dot_product_attention(q, k, v)) and len(prepared) == before
    assert torch.equal(ops.attention(q, k, v, **REFERENCE), expected)


def test_what_is_refused_is_refused_again(prepared: list[tuple[Any, ...]]) -> None:
    q, k = nhd(), nhd(dim=16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="head_dim of query is 32"):
            ops.attention(q, k, k, **REFERENCE)
        with pytest.raises(RuntimeError, match=r"memory_order=\[0, 1\] is no order"):
            ops.attention(q, q, q, **REFERENCE, memory_order=[0, 1])
        with pytest.raises(NotEligibleError):
            ops.attention(q, q, q, kernel_name="hopper", min_kv_len=1000)
    assert not ops._resolved and not prepared


def test_dispatched_calls_pass_opcheck() -> None:
    for memory_order in (None, [0, 1, 2, 3]):
        for least in (10, 1000):
            kwargs = REFERENCE | {"min_q_len": least, "min_kv_len": least, "memory_order": memory_order}
            torch.library.opcheck(ops.attention, (nhd(), nhd(), nhd()), kwargs)
    torch.library.opcheck(ops.attention_lse, (nhd(), nhd(), nhd()), REFERENCE | {"min_kv_len": 1000})
    wanting = tuple(nhd().requires_grad_() for _ in range(3))  # exact attention, at symbolic numbers of heads
    torch.library.opcheck(ops.attention, wanting, REFERENCE, test_utils="test_aot_dispatch_dynamic")


def test_training_dispatches_too() -> None:
    from sage_inductor.operators.training import attention_training

    q, k, v = (nhd().requires_grad_() for _ in range(3))
    out = attention_training(q, k, v, **REFERENCE, min_kv_len=1000)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out, exact)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, expected in zip(grads, torch.autograd.grad(exact.sum(), (q, k, v)), strict=True):
        assert relative_l2(grad, expected) < 1e-5
