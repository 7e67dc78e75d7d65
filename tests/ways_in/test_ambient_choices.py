"""What holds around a compile: the choice of SDPA's backend, torch's settings of attention, and what caches know of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import Config, SageAttentionPass, explain
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.tuning import Comparison, SdpaCall

REFERENCE = Config(kernel="reference", precision="accurate", tune="off")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
pytestmark = pytest.mark.usefixtures("inference")


@contextmanager
def flags(**enabled: bool) -> Iterator[None]:
    """SDPA's global flags, by the functions of `torch.backends.cuda`."""
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in enabled}
    for name, value in enabled.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def is_rewritten(function: Callable[[Tensor], Tensor] = attend) -> list[bool]:
    torch.compiler.reset()
    return [site.rewritten for site in explain(function, torch.randn(1, 2, 16, 32), config=REFERENCE).sites]


@pytest.mark.parametrize(
    "off", [("math",), ("math", "mem_efficient"), ("flash",), ("flash", "mem_efficient", "cudnn"), ("cudnn",)]
)
def test_a_flag_of_the_whole_process_is_no_choice(off: tuple[str, ...]) -> None:
    with flags(**dict.fromkeys(off, False)):
        assert is_rewritten() == [True]


@pytest.mark.parametrize(
    "around",
    [
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: sdpa_kernel(FUSED),
        lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
    ],
)
def test_a_region_is_a_choice(around: Callable[[], AbstractContextManager[Any]]) -> None:
    with around():
        assert is_rewritten() == [False]
    assert is_rewritten() == [True]

    def inside(x: Tensor) -> Tensor:
        with around():
            x = attend(x)
        return attend(x)

    assert is_rewritten(inside) == [False, True]


def test_a_region_of_a_decorated_caller_counts() -> None:
    assert sdpa_kernel(SDPBackend.MATH)(is_rewritten)() == [False]


def test_a_region_beside_a_global_flag() -> None:
    """Behind a region in the graph the flags are what they were before it, which pins nothing."""

    def inside(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            x = attend(x)
        return attend(x)

    with flags(math=False):
        assert is_rewritten(inside) == [False, True]
        with sdpa_kernel(SDPBackend.MATH):
            assert is_rewritten() == [False]


def test_a_region_within_a_region() -> None:
    def inside(x: Tensor) -> Tensor:
        with sdpa_kernel(FUSED):
            x = attend(x)
            with sdpa_kernel([*FUSED, SDPBackend.MATH]):
                x = attend(x)
            return attend(x)

    assert is_rewritten(inside) == [False, True, False]


def test_a_region_that_was_left_is_none() -> None:
    with pytest.raises(KeyError), sdpa_kernel(SDPBackend.MATH):
        raise KeyError
    with flags(math=False):
        assert is_rewritten() == [True]


def _uuid() -> Any:
    return SageAttentionPass(REFERENCE).uuid()


def _key() -> Any:
    spec = TensorSpec((1, 2, 64, 32), (4096, 2048, 32, 1), torch.float32, torch.device("cpu"))
    problem = AttentionProblem(spec, spec, spec, None, AttentionParams())
    return Comparison(problem, SdpaCall(spec, spec, spec, None, False, None, False)).key()


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "priority": lambda: sdpa_kernel([*FUSED[::-1], SDPBackend.MATH], set_priority=True),
    "flag": lambda: flags(flash=False),
    "cudnn": lambda: torch.backends.cudnn.flags(enabled=False),
    "cudnn.benchmark": lambda: attribute(torch.backends.cudnn, "benchmark", True),
    "float32": lambda: attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "float16": lambda: attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("key", [_uuid, _key])
def test_keys_of_caches_hold_what_was_looked_at(key: Callable[[], Any], name: str) -> None:
    before = key()
    with SETTINGS[name]():
        assert key() != before
    assert key() == before


def test_a_region_and_a_flag_of_the_same_backends_are_two_keys() -> None:
    with sdpa_kernel([*FUSED, SDPBackend.OVERRIDEABLE]):
        in_region = _uuid()
    with flags(math=False):
        assert _uuid() != in_region


def test_the_dtype_of_autocast_is_in_the_key_of_the_pass_alone() -> None:
    before, timed = _uuid(), _key()
    with torch.autocast("cpu", torch.bfloat16):
        assert _uuid() != before and _key() == timed


def test_the_flash_implementation_is_in_both_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _uuid(), _key()
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    after = _uuid(), _key()
    assert before[0] != after[0] and before[1] != after[1]


COMPILE = """
import os, sys, torch, torch._inductor.compile_fx, torch.nn.functional as F, sage_inductor
from contextlib import nullcontext
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

config = sage_inductor.Config(kernel="reference")

def attend(x):
    return F.scaled_dot_product_attention(x, x, x) * 2.4375  # a graph that no other test has

def compare(choices):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 32)
    for choice in choices:
        torch.compiler.reset()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH) if choice == "math" else nullcontext():
            exact = attend(x)
            with sage_inductor.enabled(config):
                by_pass = torch.compile(attend)(x)
            torch.compiler.reset()
            by_name = torch.compile(attend, backend="sage_inductor", options={"sage.kernel": "reference"})(x)
        errors = (((out - exact).norm() / exact.norm()).item() for out in (by_pass, by_name))
        print(*errors, flush=True)

for choices in (["none"], ["math", "none"]):
    if os.fork() == 0:  # each is a process of its own, which has imported what it needs
        compare(choices)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_cached_graph_serves_nobody_who_chose_otherwise() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, math, again = ([float(error) for error in line.split()] for line in done.stdout.splitlines())
    assert all(0.005 < error < 0.06 for error in (*first, *again))
    assert math[0] < 1e-6 and math[1] < 1e-6
