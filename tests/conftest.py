"""What every test runs under: seeded, caches of its own, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

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
# Models are made from configurations; one that asked for weights would hang where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def inference() -> Iterator[None]:
    """No gradients, and nothing that Dynamo compiled before."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_compile() -> Iterator[None]:
    """Nothing compiled before, nothing found in a cache: every pass runs."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()
