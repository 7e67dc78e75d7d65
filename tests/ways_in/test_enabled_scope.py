"""What `enabled()` covers: threads, nested contexts, passes of others; and the warnings where it covered nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx

from sage_inductor import Config, enabled
from sage_inductor.torch_internals.inductor import configured_pre_grad_pass

REFERENCE = Config(kernel="reference")
pytestmark = pytest.mark.usefixtures("fresh_compile")


def quick(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
    """Inductor with all of its passes and no code."""
    return compile_fx(graph_module, example_inputs, inner_compile=lambda graph, *args, **kwargs: graph)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def add(x: Tensor) -> Tensor:
    return x + 1


def compiled(function: Callable[[Tensor], Tensor] = attend, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, backend=quick, **kwargs)


@torch.no_grad()
def is_exact(function: Callable[[Tensor], Tensor], length: int = 16) -> bool:
    x = torch.randn(1, 2, length, 32, generator=torch.Generator().manual_seed(length))
    return bool(torch.allclose(function(x), attend(x), atol=1e-5))


def in_thread(function: Callable[..., bool], *args: Any) -> bool:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.fixture(autouse=True)
def no_warning(request: pytest.FixtureRequest) -> Any:
    """A test that expects none gets none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sage_inductor.enabled")
        yield


def test_a_worker_thread_inside() -> None:
    with enabled(REFERENCE):
        assert not in_thread(is_exact, compiled())
    torch.compiler.reset()
    assert in_thread(is_exact, compiled())


def test_a_thread_that_was_there_before() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(configured_pre_grad_pass).result() is None
        with enabled(REFERENCE):
            assert not pool.submit(is_exact, compiled()).result()
            assert pool.submit(configured_pre_grad_pass).result() is None
        torch.compiler.reset()
        assert pool.submit(is_exact, compiled()).result()


def test_a_new_length_in_a_thread_and_in_the_caller() -> None:
    function = compiled(dynamic=False)
    with enabled(REFERENCE):
        assert not is_exact(function)
        assert not in_thread(is_exact, function, 24)
        assert not is_exact(function, 32)


def test_several_threads_at_once() -> None:
    with enabled(REFERENCE), ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda length: is_exact(compiled(dynamic=False), length), range(16, 48, 8))
        assert list(found) == [False] * 4


def test_the_innermost_context_counts_in_threads() -> None:
    with enabled(Config(kernel="reference", exclude=("*",))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert in_thread(is_exact, compiled())
        torch.compiler.reset()
        with enabled(REFERENCE):
            assert not in_thread(is_exact, compiled())
        torch.compiler.reset()
        assert in_thread(is_exact, compiled())


def test_a_pass_of_the_thread_s_own_runs_too() -> None:
    seen: list[str] = []

    def with_own_pass() -> bool:
        with inductor_config.patch(pre_grad_custom_pass=lambda graph: seen.append("own")):
            return is_exact(compiled())

    with enabled(REFERENCE):
        assert not in_thread(with_own_pass)
    assert seen == ["own"]


def test_an_error_inside_leaves_nothing_behind() -> None:
    with pytest.raises(KeyError), enabled(REFERENCE):
        raise KeyError
    assert configured_pre_grad_pass() is None
    assert is_exact(compiled())
    assert in_thread(is_exact, compiled())


def test_nothing_compiled_inside_warns_once() -> None:
    function = compiled()
    assert is_exact(function)
    with pytest.warns(UserWarning, match="nothing was compiled inside"), enabled(REFERENCE):
        assert is_exact(function)
    with enabled(REFERENCE):
        pass


def test_a_context_around_torch_compile_alone_warns() -> None:
    with pytest.warns(UserWarning, match="first call of a compiled model"), enabled(REFERENCE):
        function = compiled()
    assert is_exact(function)


def test_a_later_context_around_what_an_earlier_one_compiled_is_silent() -> None:
    function = compiled()
    for _ in range(3):
        with enabled(REFERENCE):
            assert not is_exact(function)


def test_a_reset_inside_is_no_reason_to_warn() -> None:
    with enabled(REFERENCE):
        torch.compiler.reset()
        assert not is_exact(compiled())


def test_a_recompile_outside_warns_once() -> None:
    function = compiled(dynamic=False)
    with enabled(REFERENCE):
        assert not is_exact(function)
    assert not is_exact(function)
    with pytest.warns(UserWarning, match="compiled again outside"):
        assert is_exact(function, 24)
    assert is_exact(function, 32)


def test_a_recompile_outside_in_a_thread_warns() -> None:
    function = compiled(dynamic=False)
    with enabled(REFERENCE):
        assert not is_exact(function)
    with pytest.warns(UserWarning, match="compiled again outside"):
        assert in_thread(is_exact, function, 24)


def test_a_recompile_of_what_has_no_attention_is_nobody_s_concern() -> None:
    function, other = compiled(dynamic=False), compiled(add, dynamic=False)
    with enabled(REFERENCE):
        assert not is_exact(function)
        other(torch.ones(3))
    other(torch.ones(4))


def test_other_code_that_is_compiled_outside_is_silent() -> None:
    with enabled(REFERENCE):
        assert not is_exact(compiled(dynamic=False))
    other = compiled(lambda x: attend(x) * 1, dynamic=False)
    assert is_exact(other) and is_exact(other, 24)
