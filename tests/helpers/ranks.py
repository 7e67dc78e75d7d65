"""Cases that run on two ranks, gloo on a CPU: a test file has them, and is the script that each rank runs.

    @on_every_rank
    def sum_of_ranks(mesh): ...

    test_on_two_ranks = two_ranks(__file__)

    if __name__ == "__main__":
        main(globals())

One start of both ranks runs all cases of a file. A case passes where it raises on no rank.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

WORLD = 2
_MARK = "_runs_on_every_rank"


def on_every_rank(case: Callable[[Any], None]) -> Callable[[Any], None]:
    """Mark `case(mesh)`, which is given a mesh of all ranks."""
    setattr(case, _MARK, True)
    return case


def two_ranks(file: str) -> Callable[[str], None]:
    """A test for each case of `file`."""
    names = re.findall(r"^@on_every_rank\ndef (\w+)", Path(file).read_text(), re.MULTILINE)

    @pytest.mark.xdist_group(Path(file).stem)
    @pytest.mark.parametrize("case", names)
    def test(case: str) -> None:
        for rank, results in enumerate(_results(file)):
            assert results.get(case, "did not run") == "", f"rank {rank}: {results.get(case, results)}"

    return test


@cache
def _results(file: str) -> list[dict[str, str]]:
    """What each rank's cases raised, by name."""
    import tempfile

    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, file, str(rank), folder],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(WORLD)
        ]  # fmt: skip
        for rank in ranks:
            out, err = rank.communicate(timeout=600)
            last = out.splitlines()[-1] if out else ""
            found.append(json.loads(last) if last.startswith("{") else {"all": err[-3000:]})
    return found


def teach_dtensors_sdpa_of_cpus() -> None:
    """torch 2.13 knows no sharding of the CPU's SDPA kernel, for which DTensor searches minutes; its decomposition takes no
    causality. On a GPU torch's own kernels need none of this."""
    import torch
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    placements = (Shard(0), Shard(1), Replicate())
    register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)(
        lambda q, k, v, *args, **kwargs: [([one] * 2, [one] * 3 + [None] * len(args)) for one in placements]
    )
    register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default)(
        lambda *args, **kwargs: [([one] * 3, [one] * 6 + [None] * (len(args) - 6)) for one in placements]
    )


def main(namespace: dict[str, Any]) -> None:
    """Run the cases of a file as the rank that the command line says. `-k NAME` behind runs those of that name."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for name, case in list(namespace.items()):
        if not getattr(case, _MARK, False) or (sys.argv[3:4] == ["-k"] and sys.argv[4] not in name):
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        start = time.perf_counter()
        try:
            dist.barrier()
            case(mesh)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-2500:]
        print(f"{name}: {time.perf_counter() - start:.1f} s {results[name][-1500:]}", file=sys.stderr)
    print(json.dumps(results), flush=True)
    # Not by way of what is left in the interpreter: a rank that failed may have left others waiting.
    os._exit(0)
