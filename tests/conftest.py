"""What every test runs under: seeded, caches of its own, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

# A test on a warm cache tests the run that filled it: graphs found there were rewritten by the code of that
# day. Workers of pytest-xdist inherit the folder of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sage_inductor-tests-")
    # Neither are choices among kernels to be those of an earlier day.
    os.environ["XDG_CACHE_HOME"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/xdg"
# NVRTC leaves the report of ptxas out of the log of what it finds in the driver's cache.
os.environ.setdefault("CUDA_CACHE_DISABLE", "1")
# Inductor's pool of compile processes takes seconds to start, more than the small graphs here take to
# compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor would try its vector instructions in every new cache and in every process, by compiling and loading a file for
# each: 8 s of CPU once, and 1 s a process. What the processor has, it reads in any case.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Models are made from configurations; one that asked for weights would hang where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from triton_interpreter import shorten

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Read when Triton is imported, which torch's compiler does and torch by itself does not.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; with a thread per core each they would mostly wait for one another.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


# What the package remembers as long as a process lives, by module: dictionaries, sets and cached functions.
REMEMBERED = {
    "sage_inductor.backends.abstract": ("_warned_of",),
    "sage_inductor.config": ("_read",),
    "sage_inductor.rewriting.graph_pass": ("source_hash",),
    "sage_inductor.integrations.transformers.promises": ("_answers",),
    "sage_inductor.kernels": ("get",),
    "sage_inductor.kernels.hopper.kept": ("_warned",),
    "sage_inductor.kernels.hopper.launch": ("_placed",),
    "sage_inductor.kernels.sageattention": ("_device_reasons",),
    "sage_inductor.kernels.triton": ("_varlen_calls",),
    "sage_inductor.kernels.triton.configs": ("_overrides",),
    "sage_inductor.kernels.triton.launcher": ("_rest",),
    "sage_inductor.operators.inference": ("_resolved",),
    "sage_inductor.operators.prequantized": ("_quantize", "_attend"),
    "sage_inductor.rewriting.scope": ("_inside", "_seen", "_warned"),
    "sage_inductor.tuning.agreement": ("_decided", "_absent", "_met_in"),
    "sage_inductor.tuning.choice": ("_known", "_unmeasurable", "_warned"),
    "sage_inductor.tuning.machine": ("_machine",),
    "sage_inductor.tuning.store": ("_warned",),
}


def forget() -> None:
    """As in a new process: nothing compiled, nothing known. Modules that were not imported have nothing to forget."""
    for module, names in REMEMBERED.items():
        if module in sys.modules:
            for name in names:
                remembered = getattr(sys.modules[module], name)
                (getattr(remembered, "cache_clear", None) or remembered.clear)()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def new_process() -> Iterator[Callable[[], None]]:
    """Every test starts seeded and as in a new process; one that needs to do so again in its middle calls this."""
    torch.manual_seed(0)
    forget()
    if not HAS_GPU:
        shorten()
    yield forget
    forget()


# What is registered with other libraries, by the module that did it: names or replaced functions.
REGISTERED = {
    "sage_inductor.integrations.diffusers.dispatch": "_registered",
    "sage_inductor.integrations.fastvideo": "_original",
    "sage_inductor.integrations.transformers": "_replaced",
    "sage_inductor.integrations.xdit": "_replaced",
}


def registered() -> dict[str, list[object]]:
    return {
        module: list(getattr(sys.modules[module], name)) if module in sys.modules else []
        for module, name in REGISTERED.items()
    }


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    """A registration holds for the whole process: one that a test leaves behind is found by whichever test comes next in it."""
    before = registered()
    yield
    assert registered() == before, "registered by this test, and not unregistered"


@pytest.fixture
def inference() -> Iterator[None]:
    """No gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Inductor would compile a graph, after our backend has rewritten it, the graph runs as it is: its kernels take a C++
    compiler a second each."""
    wrapper = torch._TorchCompileInductorWrapper
    monkeypatch.setattr(wrapper, "__call__", lambda self, graph_module, inputs: graph_module.forward)


@pytest.fixture
def fresh_compile() -> Iterator[None]:
    """Nothing is found in Inductor's caches: every pass runs."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
