"""Somebody else's function in the place of `F.scaled_dot_product_attention`, before or after the package is loaded."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import sage_inductor
from sage_inductor import Config, explain, sage_attention
from sage_inductor.operators import inference
from sage_inductor.operators.schemas import EXACT
from sage_inductor.testing import RewritingBackend, relative_l2
from sage_inductor.torch_internals.sdpa import builtin_sdpa

REFERENCE = Config(kernel="reference", precision="accurate")


def plain_wrapper(*args: Any, **kwargs: Any) -> Tensor:
    return builtin_sdpa(*args, **kwargs)


@functools.wraps(builtin_sdpa)
def wraps(*args: Any, **kwargs: Any) -> Tensor:
    return builtin_sdpa(*args, **kwargs)


def with_signature(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
    return builtin_sdpa(query, key, value, attn_mask, **kwargs)


class Callable_:
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return builtin_sdpa(*args, **kwargs)


PATCHES: dict[str, Callable[..., Any]] = {
    "wrapper": plain_wrapper,
    "functools.wraps": wraps,
    "signature": with_signature,
    "object": Callable_(),
    "partial": functools.partial(builtin_sdpa),
    "sage_attention": sage_attention,
}


@pytest.fixture(params=PATCHES)
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    torch.compiler.reset()
    monkeypatch.setattr(F, "scaled_dot_product_attention", PATCHES[request.param])
    with torch.no_grad():
        yield request.param
    torch.compiler.reset()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 4, 16, 32) for _ in range(3))  # type: ignore[return-value]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True) * 2


def test_the_builtin_is_known_by_what_it_is() -> None:
    assert type(builtin_sdpa).__name__ in ("builtin_function_or_method", "OpOverload")
    assert builtin_sdpa is torch._C._nn.scaled_dot_product_attention


def test_the_inner_call_of_a_patch_is_found(patched: str) -> None:
    query, key, value = inputs()
    backend = RewritingBackend(REFERENCE)
    out = torch.compile(attend, backend=backend, fullgraph=True)(query, key, value)
    expected = 2 * builtin_sdpa(query, key, value, is_causal=True)
    # sage_attention is an operator of its own in the graph, and exact on a CPU, where "auto" takes no kernel.
    assert [site.rewritten for site in backend.sites] == ([] if patched == "sage_attention" else [True])
    assert relative_l2(out, expected) < 0.02
    assert (relative_l2(out, expected) > 1e-5) == (patched != "sage_attention")


def test_explain_and_a_layer_of_torch(patched: str) -> None:
    layer = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.randn(2, 16, 32)
    backend = RewritingBackend(REFERENCE)
    out = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0], backend=backend)(x)
    assert relative_l2(out, layer(x, x, x, need_weights=False)[0]) < 0.02
    torch.compiler.reset()
    sites = explain(attend, *inputs(), config=REFERENCE).sites
    assert len(sites) == (0 if patched == "sage_attention" else 1)


def test_exact_attention_is_torch_s_own(patched: str) -> None:
    query, key, value = inputs()
    expected = builtin_sdpa(query, key, value)
    assert torch.equal(inference.attention(query, key, value, kernel_name=EXACT), expected)
    assert torch.equal(sage_attention(query, key, value), expected)  # a CPU: no kernel to take
    assert torch.equal(F.scaled_dot_product_attention(query, key, value), expected)
    torch.manual_seed(0)
    first = builtin_sdpa(query, key, value, None, 0.5)
    torch.manual_seed(0)
    assert torch.equal(sage_attention(query, key, value, None, 0.5), first)


def test_the_backend_classes(patched: str) -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs())
    for name in ("SAGE_ATTN", "TORCH_SDPA"):
        backend = sage_inductor.backends.get_attn_backend(32, torch.float32, requested=name) if (
            name == "TORCH_SDPA"
        ) else sage_inductor.backends.SageAttentionBackend  # fmt: skip
        out = backend.get_impl_cls()(4, 32, False, None).forward(query, key, value)
        expected = builtin_sdpa(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)
        assert relative_l2(out, expected) < 1e-5


def test_gradients(patched: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    with torch.enable_grad():
        expected = torch.autograd.grad(builtin_sdpa(*leaves).sum(), leaves)
        found = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
        backend = RewritingBackend(Config(kernel="reference", training=True))
        compiled = torch.compile(attend, backend=backend)
        trained = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        causal = torch.autograd.grad(2 * builtin_sdpa(*leaves, is_causal=True).sum(), leaves)
    for first, second in (*zip(found, expected, strict=True), *zip(trained, causal, strict=True)):
        assert relative_l2(first, second) < 1e-5


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("lengths", [(16, 16), (16, 24)])
def test_causal_biases_that_fall_back(
    patched: str, variant: Callable[[int, int], Tensor], lengths: tuple[int, int]
) -> None:
    query, key, value = (torch.randn(1, 2, length, 32) for length in (lengths[0], lengths[1], lengths[1]))
    allowed = torch.ones(lengths, dtype=torch.bool)
    allowed = allowed.tril(lengths[1] - lengths[0] if variant is causal_lower_right else 0)
    query.requires_grad_()
    with torch.enable_grad():
        out = sage_attention(query, key, value, variant(*lengths))
    assert isinstance(out, Tensor)
    assert relative_l2(out.detach(), builtin_sdpa(query.detach(), key, value, allowed)) < 1e-5


def test_the_tuner_times_torch_s_own(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
    from sage_inductor.tuning import Comparison, SdpaCall, measure

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the patch was timed")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    spec = TensorSpec((1, 2, 64, 32), (4096, 2048, 32, 1), torch.float32, torch.device("cpu"))
    problem = AttentionProblem(spec, spec, spec, None, AttentionParams())
    comparison = Comparison(problem, SdpaCall(spec, spec, spec, None, False, None, False))
    assert measure.measure(comparison, ["reference"]).sdpa_ms > 0


BEFORE = """
import functools, os, sys, torch, torch._dynamo, torch.nn.functional as F
original = F.scaled_dot_product_attention
assert "sage_inductor" not in sys.modules
for patch in {patches}:
    if os.fork() == 0:  # a process that has not loaded the package
        exec(patch)
        break
    os.wait()
else:
    sys.exit()

def attend(x):
    return F.scaled_dot_product_attention(x, x, x)

import sage_inductor
from sage_inductor.testing import RewritingBackend

x = torch.randn(1, 2, 16, 32)
with torch.no_grad():
    backend = RewritingBackend(sage_inductor.Config(kernel="reference"))
    out = torch.compile(attend, backend=backend)(x)
    F.scaled_dot_product_attention = original
    torch.compiler.reset()
    after = RewritingBackend(sage_inductor.Config(kernel="reference"))
    torch.compile(attend, backend=after)(x)
    exact = sage_inductor.sage_attention(x, x, x)
print([site.pattern for site in backend.sites], [site.pattern for site in after.sites])
print(torch.equal(exact, original(x, x, x)), (out - exact).norm().item() > 0, flush=True)
"""
FIRST_PATCHES = {
    "wrapper": "F.scaled_dot_product_attention = lambda *args, **kwargs: original(*args, **kwargs)",
    "functools.wraps": (
        "F.scaled_dot_product_attention = "
        "functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))"
    ),
    "partial": (
        "F.scaled_dot_product_attention = functools.update_wrapper(functools.partial(original), original)"
    ),
}


def test_a_patch_from_before_the_package_was_loaded() -> None:
    script = BEFORE.format(patches=list(FIRST_PATCHES.values()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    expected = ["['sdpa'] ['sdpa']", "True True"] * len(FIRST_PATCHES)
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr[-2000:]
