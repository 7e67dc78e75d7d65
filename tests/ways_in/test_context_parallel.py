"""Inside torch's `context_parallel` each rank holds a part of the sequence: attention to that part alone must not pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")

RANK = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from sage_inductor import sage_attention, backends

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = [torch.randn(1, 2, 64, 32) for _ in range(3)]
exact = F.scaled_dot_product_attention(*whole)
impl = backends.SageAttentionBackend.get_impl_cls()(2, 32, False, None)

def by_class(q, k, v):
    return impl.forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

ways = {
    "eager": sage_attention,
    "kernel by name": lambda q, k, v: sage_attention(q, k, v, kernel="reference"),
    "in place of SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "backend class": by_class,
    "compiled": torch.compile(lambda q, k, v: sage_attention(q, k, v), backend="eager"),
    "compiled before": torch.compile(lambda q, k, v: sage_attention(q, k, v) * 1, backend="eager"),
}

def refused(way):
    try:
        ways[way](*buffers)
    except RuntimeError as error:
        return "context_parallel" in str(error)
    return False

with torch.no_grad():
    ways["compiled before"](*whole)
    buffers = [tensor.clone() for tensor in whole]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        assert buffers[0].shape[2] == 32
        inside = F.scaled_dot_product_attention
        for way in ways:
            if way == "in place of SDPA":
                F.scaled_dot_product_attention = sage_attention
            assert refused(way), way
            F.scaled_dot_product_attention = inside
    for way in ways:
        out = ways[way](*whole)
        assert (out - exact).norm() / exact.norm() < 0.06, way
dist.barrier()
print("well")
"""


def test_sage_attention_and_the_backend_classes_say_so(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert out.endswith("well\n"), err[-3000:]


SHARDED = """
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from sage_inductor import NotEligibleError, sage_attention

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.backends.cuda.enable_flash_sdp(False)  # DTensor takes minutes to find a strategy for the CPU's flash kernel
x = torch.randn(2, 4, 16, 32)
for placement in (Shard(0), Shard(1)):
    sharded = distribute_tensor(x, mesh, [placement])
    with torch.no_grad():
        for attend in (sage_attention, torch.compile(lambda q, k, v: sage_attention(q, k, v), backend="eager")):
            out = attend(sharded, sharded, sharded)
            assert (out.full_tensor() - F.scaled_dot_product_attention(x, x, x)).abs().max() < 1e-5
        try:
            sage_attention(sharded, sharded, sharded, kernel="reference")
        except NotEligibleError as error:
            assert "DTensor" in str(error), error
        else:
            raise AssertionError
dist.destroy_process_group()
print("well")
"""


def test_dtensors_get_torch_s_own_attention() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("well\n"), done.stderr[-3000:]
