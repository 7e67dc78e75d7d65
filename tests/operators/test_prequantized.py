"""Quantise and attend apart: what comes out is what the whole call gives, bit for bit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sage_inductor
from sage_inductor import (
    NotEligibleError,
    QuantizedKeyValue,
    attention_prequantized,
    kernels,
    quantize_key_value,
    sage_attention,
)
from sage_inductor.kernels.key_value import KeyValueForm
from sage_inductor.kernels.smoothing import SMOOTHINGS as CHOICES
from sage_inductor.operators import prequantized
from sage_inductor.operators.distributed.wires import kernel_of_wires
from sage_inductor.testing import max_error, relative_l2

SMOOTHINGS = [name for name in CHOICES if name != "auto"]
ops = torch.ops.sage_inductor
pytestmark = pytest.mark.usefixtures("inference")


def inputs(
    batch: int = 2, q_len: int = 150, kv_len: int = 270, head_dim: int = 64, v_dim: int = 64,
    dtype: torch.dtype = torch.float32, kv_heads: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query and key lie in memory as `[batch, seq, heads, head_dim]`."""
    q = torch.randn(batch, q_len, 2 * kv_heads, head_dim).transpose(1, 2)
    k = torch.randn(batch, kv_len, kv_heads, head_dim).transpose(1, 2) + 2
    return q.to(dtype), k.to(dtype), (torch.randn(batch, kv_heads, kv_len, v_dim) + 1).to(dtype)


def check_bits(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, precision: str, smoothing: str, **options: Any
) -> None:
    how = {"kernel": kernel, "precision": precision, "smoothing": smoothing}
    whole, whole_lse = sage_attention(q, k, v, enable_gqa=True, return_lse=True, **options, **how)
    found = quantize_key_value(k, v, q, **how)
    out, lse = attention_prequantized(q, found, return_lse=True, **options)
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)
    assert out.stride() == whole.stride() and out.dtype == whole.dtype
    assert torch.equal(attention_prequantized(q, found, **options), whole)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_bits_of_the_whole_call(smoothing: str) -> None:
    for precision in kernels.PRECISIONS:
        check_bits(*inputs(kv_len=140), "reference", precision, smoothing)
    q, k, v = inputs(1, 130, 130, 96, 40, torch.bfloat16)
    check_bits(q, k, v, "reference", "fast", smoothing, is_causal=True, scale=-0.3)


CASES = [
    ("fast", "mean", {}, torch.float32),
    ("balanced", "both", {"is_causal": True}, torch.bfloat16),
    ("accurate", "equalise", {"scale": 0.2}, torch.float16),
]


@pytest.mark.parametrize(("precision", "smoothing", "options", "dtype"), CASES)
def test_bits_of_the_triton_kernels(
    precision: str, smoothing: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    tensors = (tensor.to(DEVICE) for tensor in inputs(1, 20, 140, 48, 32, dtype, kv_heads=1))
    check_bits(*tensors, "triton", precision, smoothing, **options)


@pytest.mark.gpu
@pytest.mark.skipif(bool(kernels.get("hopper").unavailable_reasons()), reason="needs a Hopper GPU")
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_bits_of_the_hopper_kernel(precision: str, smoothing: str, is_causal: bool) -> None:
    for shape in ((2, 500, 1000, 128, 128), (1, 300, 3000, 96, 160), (3, 129, 333, 64, 40)):
        q, k, v = (tensor.cuda() for tensor in inputs(*shape, dtype=torch.bfloat16))
        check_bits(q, k, v, "hopper", precision, smoothing, is_causal=is_causal)
        how = {"kernel": "hopper", "precision": precision, "smoothing": smoothing}
        found = quantize_key_value(k, v, q, **how)
        out = attention_prequantized(q, found.first(200))
        exact = F.scaled_dot_product_attention(q, k[:, :, :200], v[:, :, :200], enable_gqa=True)
        assert relative_l2(out, exact) < 0.02


def test_the_hopper_kernel_is_given_what_the_whole_call_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """attention.cu does not run here; its operands are made by the Triton kernels, which do."""
    pytest.importorskip("triton")
    from sage_inductor.kernels import AttentionParams
    from sage_inductor.kernels.hopper import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(launch.driver, "tensor_map", lambda *args: SimpleNamespace(getPtr=lambda: args))
    q, k, v = inputs(2, 20, 140, 40, 24, torch.bfloat16, kv_heads=1)
    for precision, smoothing in (("accurate", "both"), ("fast", "mean")):
        params = AttentionParams(precision=precision, smoothing=smoothing)
        out, lse = torch.empty(2, 2, 20, 24, dtype=q.dtype), torch.empty(2, 2, 20)
        whole = launch.HopperAttention(q, k, v, None, params, out, lse)
        workspace = whole.quantize(q, k, v, None)
        form = KeyValueForm(2, 1, 140, 40, 24, q.dtype, precision, smoothing)
        packed = launch.HopperKeyValueQuantization(k, v, q, form).run(k, v, q)
        call = launch.PrequantizedHopperAttention(q, form, 140, params, out, lse)
        seen: dict[str, Tensor] = {}
        monkeypatch.setattr(call, "attend", lambda workspace, *_, packed: seen.update(workspace=workspace))
        call.run(q, packed, out, lse)
        apart = seen["workspace"]
        assert torch.equal(call.q8.of(apart), whole.q8.of(workspace))
        for name in ("k8", "v8"):
            part, expected = getattr(call, name).of(apart, packed), getattr(whole, name).of(workspace)
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8)), name
        # All sections that are written without a mask: what lies behind V's channels is a zero after five numbers a sequence.
        scales, expected = call.scales.of(apart), whole.scales.of(workspace)
        written = scales.numel() - 5 * 2 - 1
        if precision == "accurate":  # V's are not written
            written = call.sizes.q_size + form.kv_heads * 2 * form.blocks
        assert torch.equal(scales[:written], expected[:written]) and scales[-1] == 0
        one, other = (launch._placed(item, 1 << 20, 1 << 30) for item in (whole, call))
        names = ("q_scale", "k_scale", "v_scale", "v_channel", "used_keys", "ticket")
        distances = [
            [getattr(placed.numbers, name) - placed.numbers.q_scale for name in names]
            for placed in (one, other)
        ]
        assert distances[0] == distances[1]
        assert other.addresses[1][0] == (1 << 30) + call.k8.offset and other.numbers.kv_pitch == form.blocks
        # Shapes and boxes of the maps are the same.
        assert [args[1:] for args in one.addresses] == [args[1:] for args in other.addresses]


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_the_first_keys(kernel: str) -> None:
    """In the same memory, of several sequences, in the middle of a block."""
    device = "cpu" if kernel == "reference" else DEVICE
    q, k, v = (tensor.to(device) for tensor in inputs(2, 20, 300, 32, 32, kv_heads=1))
    found = quantize_key_value(k, v, kernel=kernel, precision="fast").first(150)
    out, lse = attention_prequantized(q, found, return_lse=True)
    exact = F.scaled_dot_product_attention(q, k[:, :, :150], v[:, :, :150], enable_gqa=True)
    one = sage_attention(q, k[:, :, :150], v[:, :, :150], enable_gqa=True, kernel=kernel, precision="fast")
    assert relative_l2(out, exact) < 1.1 * relative_l2(one, exact)
    scores = q @ k[:, :, :150].mT * 32**-0.5
    assert max_error(lse, scores.logsumexp(-1)) < 0.02
    assert found.packed.data_ptr() == found.first(10).packed.data_ptr()
    with pytest.raises(ValueError, match=r"keys=301 \(valid: 1 to 300\)"):
        found.first(301)


def test_parts_and_buffers() -> None:
    q, k, v = inputs()
    found = quantize_key_value(k, v, kernel="reference", precision="fast", smoothing="mean")
    parts = found.parts()
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "key_scale": (torch.float32, (2, 2, 3)),
        "key_mean": (torch.float32, (2, 2, 1, 64)),
        "value_scale": (torch.float32, (2, 2, 3)),
        "value_channel": (torch.float32, (2, 2, 1, 64)),
        "value_mean": (torch.float32, (2, 2, 1, 64)),
        "first_value": (torch.float32, (2, 2, 1, 64)),
        "key": (torch.int8, (2, 2, 384, 64)),
        "value": (torch.float8_e4m3fn, (2, 2, 384, 64)),
    }
    key = parts["key"].float().unflatten(2, (3, 128)) * parts["key_scale"][..., None, None]
    assert relative_l2(key.flatten(2, 3)[:, :, :270] + parts["key_mean"], k) < 0.005
    value = parts["value"].float().unflatten(2, (3, 128)) * parts["value_scale"][..., None, None]
    value = value.flatten(2, 3)[:, :, :270] * parts["value_channel"] + parts["value_mean"]
    value[:, :, :1] += parts["first_value"]  # which is 0 in 8 bits
    assert relative_l2(value, v) < 0.03  # e4m3 has 4 digits: 2 ** -4 / sqrt(12) on the average
    received = found.empty_like()
    received.packed.copy_(found.packed)
    assert torch.equal(attention_prequantized(q, received), attention_prequantized(q, found))
    amid = torch.cat([received.packed[:3], found.packed])[3:]  # at an odd address
    assert torch.equal(attention_prequantized(q, found.with_packed(amid)), attention_prequantized(q, found))
    with pytest.raises(RuntimeError, match=r"packed is \(3,\) torch.float32 \(valid: "):
        found.with_packed(torch.empty(3))


def test_parts_are_traced_without_a_break_at_any_length(new_process: None) -> None:
    """torch cuts views in another dtype short that come out of a graph and whose sizes are symbolic."""

    def parts(found: QuantizedKeyValue) -> dict[str, Tensor]:
        return found.parts()

    fast = torch.compile(parts, backend="aot_eager", fullgraph=True, dynamic=True)
    for kv_len in (270, 500):
        found = quantize_key_value(*inputs(kv_len=kv_len)[1:], kernel="reference")
        for name, part in fast(found).items():
            assert torch.equal(part.view(torch.uint8), found.parts()[name].view(torch.uint8)), name


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_layouts_of_the_triton_kernels(precision: str, smoothing: str) -> None:
    """A receiver knows sizes without a variant of the kernels; `_check_layout` compares the two."""
    pytest.importorskip("triton")
    from sage_inductor.kernels.triton.prequantized import KeyValueQuantization

    for dim, v_dim in ((16, 256), (64, 64), (96, 40), (136, 200), (192, 128), (256, 16)):
        k, v = torch.empty(2, 2, 300, dim), torch.empty(2, 2, 300, v_dim)
        form = KeyValueForm(2, 2, 300, dim, v_dim, k.dtype, precision, smoothing)
        call = KeyValueQuantization(k, v, k, form)
        pieces = kernels.get("triton").key_value_layout(form).pieces
        # A tensor descriptor's address is a multiple of 16 bytes, that of attention.cu's maps, too.
        assert all(pieces[name].offset % 128 == 0 for name in ("key", "value"))
        ends = [piece.offset + piece.elements * piece.dtype.itemsize for piece in pieces.values()]
        begins = [piece.offset for piece in pieces.values()]
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
        assert ends[-1] <= call.workspace_bytes


def test_parts_of_a_sequence_merge_by_their_lse() -> None:
    """Each has a mean of its own."""
    q, k, v = (tensor.double() for tensor in inputs())
    k[:, :, :100] += 3
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    q, k, v = q.float(), k.float(), v.float()
    outs, lses = zip(
        *(
            attention_prequantized(
                q, quantize_key_value(k[:, :, part], v[:, :, part], kernel="reference"), return_lse=True
            )
            for part in (slice(0, 100), slice(100, None))
        ),
        strict=True,
    )
    weights = torch.stack(lses).softmax(0)[..., None]
    merged = (weights * torch.stack(outs)).sum(0)
    one = sage_attention(q, k, v, enable_gqa=True, kernel="reference")
    assert relative_l2(merged, exact) < 1.1 * relative_l2(one, exact)


def test_non_finite_inputs_show() -> None:
    q, k, v = inputs()
    k[0, 0, 3, 5], v[1, 1, 200, 0] = float("inf"), float("nan")
    out = attention_prequantized(q, quantize_key_value(k, v, kernel="reference"))
    whole = sage_attention(q, k, v, enable_gqa=True, kernel="reference")
    assert torch.equal(out.isnan(), whole.isnan()) and out.isnan().any() and not out.isnan().all()


def test_nothing_to_attend_to() -> None:
    q, k, v = inputs()
    for query, keys in ((q, 0), (q[:, :, :0], 5), (q[:0], 5)):
        batch = query.shape[0]
        found = quantize_key_value(k[:batch, :, :keys], v[:batch, :, :keys], kernel="reference")
        out, lse = attention_prequantized(query, found, return_lse=True)
        assert out.shape == query.shape and not out.any() and (lse == float("-inf")).all()


def test_operators_keep_their_contracts() -> None:
    q, k, v = inputs(1, 20, 30, 32, 16)
    how = {"kernel_name": "reference", "smoothing": "both"}
    torch.library.opcheck(ops.quantize_key_value.default, (k, v, q), how)
    packed = ops.quantize_key_value(k, v, q, **how)
    sizes = {"kv_heads": 2, "kv_len": 30, "stored_len": 30, "value_head_dim": 16}
    torch.library.opcheck(ops.attention_prequantized.default, (q, packed), {**how, **sizes})


def test_in_a_graph() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = quantize_key_value(k, v, kernel="reference", precision="fast")
        return attention_prequantized(q, found) + attention_prequantized(q * 2, found.first(100))

    q, k, v = inputs()
    fast = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(q, k, v), attend(q, k, v))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"kernel": "sageattention"},
            NotEligibleError,
            r"kernel=sageattention \(supported: hopper, triton, reference\)",
        ),
        ({"kernel": "hopper"}, NotEligibleError, "kernel=hopper: "),
        ({"kernel": "sdpa"}, ValueError, "valid: auto, hopper"),
        ({"precision": "best"}, ValueError, "valid: auto, fast"),
        ({"smoothing": "none"}, ValueError, "valid: mean"),
        ({"smoothing": "equalise", "query": None}, RuntimeError, "smoothing='equalise' without query"),
        ({"key": torch.zeros(2, 270, 64)}, RuntimeError, "key has 3 dimensions"),
        ({"value": torch.zeros(2, 2, 271, 64)}, RuntimeError, "kv_len of key is 270, of value 271"),
        ({"key": torch.zeros(2, 2, 270, 64, requires_grad=True)}, NotEligibleError, "requires_grad=key"),
    ],
)
def test_what_cannot_be_quantised(change: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k, v = inputs()
    given = {"key": k, "value": v, "query": q, "kernel": "reference"} | change
    with torch.enable_grad(), pytest.raises(error, match=words):
        quantize_key_value(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels")
def test_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage_inductor.kernels.triton.interpreted", lambda: False)
    _, k, v = inputs()
    with pytest.raises(NotEligibleError, match=r"kernel=auto: .*triton: device=cpu"):
        quantize_key_value(k, v)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q[0], "query has 3 dimensions"),
        (lambda q: q[:, :3], "3 query heads are not a multiple of 2 key heads"),
        (lambda q: q[:1], r"packed is .* \(valid: .*keys for a query \(1, 4, 150, 64\)"),
        (lambda q: q[..., :32], "keys for a query"),
        (lambda q: q.to("meta"), "packed is on cpu, query on meta"),
    ],
)
def test_what_cannot_attend(change: Any, words: str) -> None:
    q, k, v = inputs()
    found = quantize_key_value(k, v, kernel="reference")
    with pytest.raises(RuntimeError, match=words):
        prequantized._attention_prequantized(
            change(q),
            found.packed,
            kv_heads=2,
            kv_len=270,
            stored_len=270,
            value_head_dim=64,
            kernel_name="reference",
        )


def test_dtypes_must_be_alike() -> None:
    q, k, v = inputs()
    found = quantize_key_value(k, v, kernel="reference")
    with pytest.raises(RuntimeError, match=r"query is torch.bfloat16, keys were torch.float32"):
        attention_prequantized(q.bfloat16(), found)


def test_arguments_of_other_kinds_are_named() -> None:
    q, k, v = inputs()
    found = quantize_key_value(k, v, kernel="reference")
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: attention_prequantized(q, (k, v)), TypeError, "key_value is a tuple"),
        (lambda: attention_prequantized(q.numpy(), found), TypeError, "query is a ndarray"),
        (lambda: attention_prequantized(q, found, scale="big"), TypeError, r"scale='big' \(valid: a number"),
        (
            lambda: attention_prequantized(q, found, "no"),
            ValueError,
            r"is_causal='no' \(valid: True, False\)",
        ),
        (lambda: quantize_key_value(None, v), TypeError, "key is a NoneType"),
        (lambda: quantize_key_value(k, v, 1.0), TypeError, r"query is a float \(valid: a tensor, None\)"),
    ]
    for call, error, words in calls:
        with pytest.raises(error, match=words):
            call()


def test_public_names() -> None:
    assert {"QuantizedKeyValue", "quantize_key_value", "attention_prequantized"} <= set(sage_inductor.__all__)


@pytest.mark.parametrize("dynamic", [True, None])
def test_the_halves_of_a_call_at_symbolic_sizes(dynamic: bool | None) -> None:
    """Head dims, too, which are numbers in the graph. Dynamo has nothing to warn of."""
    options: dict[str, Any] = {"kernel": "reference", "precision": "accurate", "smoothing": "auto"}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        found = quantize_key_value(k, v, q, **options)
        return attention_prequantized(q, found, is_causal=True)

    graphs = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (64, 48, 200):
            given = [torch.randn(2, 2, length, 32) for _ in range(3)]
            assert torch.equal(fast(*given), sage_attention(*given, is_causal=True, **options)), length
    assert graphs.frame_count == (1 if dynamic else 2)
    assert not [str(warning.message) for warning in caught if "ynamo" in str(warning.message)]


def test_what_quantises_shards_that_travel() -> None:
    """A kernel that was named or raises with its reasons, or what is exact."""
    given = [torch.randn(2, 2, 40, 32) for _ in range(3)]
    for smoothing, meant in (("auto", "both"), ("mean", "mean"), ("rotate", "rotate")):
        options = {"kernel_name": "reference", "precision": "balanced", "smoothing": smoothing}
        assert kernel_of_wires(*given, options) == ("reference", "balanced", meant)
        assert kernel_of_wires(*given, {**options, "min_kv_len": 41}) is None
    assert kernel_of_wires(*given, {"kernel_name": "sdpa"}) is None
    named = {"kernel_name": "sageattention", "precision": "fast"}
    with pytest.raises(NotEligibleError, match=r"kernel=sageattention with wires=\"8-bit\": "):
        kernel_of_wires(*given, named)
    assert kernel_of_wires(*given, {**named, "or_exact": True}) is None
