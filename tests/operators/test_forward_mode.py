"""Forward-mode AD: rounding has a derivative of zero, so that a quantised kernel would carry a wrong tangent, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn

from sage_inductor import Config, NotEligibleError, attention_prequantized, quantize_key_value, sage_attention
from sage_inductor.backends import SageAttentionImpl
from sage_inductor.integrations.transformers.attention import make_forward
from sage_inductor.operators import inference
from sage_inductor.testing import relative_l2

REFERENCE = {"kernel_name": "reference"}
IMPL = SageAttentionImpl(2, 16, causal=False, softmax_scale=None, kernel="reference")


def qkv() -> list[Tensor]:
    return [torch.randn(1, 2, 40, 16) for _ in range(3)]


NAMED: dict[str, Callable[..., object]] = {
    "sage_attention": lambda q, k, v: sage_attention(q, k, v, kernel="reference"),
    "lse": lambda q, k, v: sage_attention(q, k, v, kernel="reference", return_lse=True),
    "out": lambda q, k, v: inference.attention_out(q, k, v, **REFERENCE, output=torch.empty(1, 2, 40, 16)),
    "quantised before": lambda q, k, v: attention_prequantized(
        q, quantize_key_value(k, v, kernel="reference")
    ),
    "backend class": lambda q, k, v: IMPL.forward(*(tensor.transpose(1, 2) for tensor in (q, k, v))),
}


@pytest.mark.parametrize("way", NAMED)
def test_a_kernel_named_refuses_tangents(way: str) -> None:
    for given in range(3):
        with fwd.dual_level(), torch.no_grad():
            inputs = qkv()
            inputs[given] = fwd.make_dual(inputs[given], torch.ones(1, 2, 40, 16))
            with pytest.raises(NotEligibleError, match="forward-mode tangent="):
                NAMED[way](*inputs)
    if way == "out":
        return  # functorch's tensors have no memory to write to
    with pytest.raises(NotEligibleError, match="forward-mode tangent="):
        torch.func.jvp(lambda q: NAMED[way](q, *qkv()[1:]), (qkv()[0],), (qkv()[0],))


def test_the_operator_and_auto_are_exact_where_there_are_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    tangent = torch.randn_like(q)

    def written_out(q: Tensor, k: Tensor, v: Tensor, *args: object, **options: object) -> Tensor:
        return torch.softmax(q @ k.mT / 4, -1) @ v  # SDPA's CPU kernel has no forward mode

    for module in ("operators.functional", "operators.unquantised"):
        monkeypatch.setattr(f"sage_inductor.{module}.builtin_sdpa", written_out)
    expected = torch.func.jvp(lambda q: written_out(q, k, v), (q,), (tangent,))[1]
    for attend in (sage_attention, lambda *inputs: inference.attention(*inputs, **REFERENCE)):
        found = torch.func.jvp(lambda q, attend=attend: attend(q, k, v), (q,), (tangent,))[1]
        assert relative_l2(found, expected) < 1e-6
        with fwd.dual_level():
            found = fwd.unpack_dual(attend(fwd.make_dual(q, tangent), k, v)).tangent
            assert relative_l2(found, expected) < 1e-6
            # What carries none is quantised.
            assert fwd.unpack_dual(inference.attention(q, k, v, **REFERENCE)).tangent is None


def test_transformers_function_is_exact_there() -> None:
    forward = make_forward(Config(kernel="reference", fallback="error"))
    q, k, v = qkv()
    with fwd.dual_level(), pytest.raises(NotEligibleError, match="forward-mode tangent="):
        forward(nn.Identity(), q, k, fwd.make_dual(v, v), None, is_causal=False)
