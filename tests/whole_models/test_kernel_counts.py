"""What Inductor makes of a compiled block: matrix products, fused kernels between them, our operator, and no copies."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._inductor.utils import get_code

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

CALL = re.compile(
    r"extern_kernels\.(?P<product>\w+)\(|(?<!def )\b(?P<fused>cpp_fused_\w+|triton_\w+?)(?:\.run)?\("
    r"|torch\.ops\.sage_inductor\.(?P<ours>\w+)\.\w+\(|torch\.ops\.aten\.(?P<aten>\w+)\.\w+\("
)


def calls(model: nn.Module, inputs: dict[str, Any], kernel: str | None) -> list[str]:
    """What the compiled `model` calls, in order: mm (any matrix product), fused, ours by name, aten's by name."""
    torch.compiler.reset()
    options: dict[str, Any] = {} if kernel is None else {"sage.kernel": kernel, "sage.fallback": "error"}
    compiled = torch.compile(
        model, backend="inductor" if kernel is None else "sage_inductor", options=options
    )
    with torch.no_grad():
        sources = get_code(lambda: compiled(**inputs))  # written, and not compiled
    found = []
    for source in sources:
        body = source.partition("def call(")[2].partition("\ndef ")[0]
        for match in CALL.finditer(body):
            kind, name = next((kind, name) for kind, name in match.groupdict().items() if name)
            found.append({"product": "mm", "fused": "fused"}.get(kind, name))
    return found


def wan(device: str = "cpu", dtype: torch.dtype = torch.float32, tokens: int = 96) -> tuple[nn.Module, Any]:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    torch.manual_seed(0)
    block = WanTransformerBlock(dim=128, ffn_dim=256, num_heads=2).eval().to(device, dtype)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 128, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 24, 128, device=device, dtype=dtype),
        "temb": torch.randn(1, 6, 128, device=device, dtype=dtype),
        "rotary_emb": tuple(torch.randn(1, tokens, 1, 64, device=device) for _ in range(2)),
    }
    return block, inputs


def llama(
    implementation: str, device: str = "cpu", dtype: torch.dtype = torch.float32, tokens: int = 48
) -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (2, tokens), device=device)
    return LlamaModel(config).eval().to(device, dtype), {"input_ids": ids, "use_cache": False}


def assert_nothing_is_copied(ours: list[str], plain: list[str]) -> None:
    """Out of each attention straight into the next product, and no kernel more than without us."""
    after = [following for call, following in zip(ours, ours[1:], strict=False) if call == "attention"]
    assert after and set(after) == {"mm"}, ours
    assert ours.count("fused") <= plain.count("fused"), (ours, plain)
    assert len(ours) <= len(plain), (ours, plain)


@pytest.mark.usefixtures("fresh_compile")
def test_wan_block() -> None:
    """Query and key are normalised and rotated by one fused kernel; self-attention, then cross-attention."""
    ours = calls(*wan(), "reference")
    assert_nothing_is_copied(ours, calls(*wan(), None))
    assert_expected_inline(
        " ".join(ours),
        """fused mm mm fused mm attention mm fused mm fused mm fused mm attention mm fused mm fused mm fused""",
    )


@pytest.mark.usefixtures("fresh_compile")
def test_llama() -> None:
    """Neither repeated heads nor masks are made, whichever way the attention is written."""
    plain = calls(*llama("sdpa"), None)
    for implementation in ("sdpa", "eager"):
        ours = calls(*llama(implementation), "reference")
        assert_nothing_is_copied(ours, plain)
        assert_expected_inline(
            " ".join(ours), """fused mm fused mm fused mm fused attention mm fused mm mm fused mm fused"""
        )


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("name", ["wan", "llama sdpa", "llama eager"])
def test_on_a_gpu(name: str) -> None:
    def model() -> tuple[nn.Module, Any]:
        place: Any = {"device": "cuda", "dtype": torch.bfloat16, "tokens": 512}
        return wan(**place) if name == "wan" else llama(name.partition(" ")[2], **place)

    assert_nothing_is_copied(calls(*model(), "triton"), calls(*model(), None))
