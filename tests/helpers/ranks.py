"""Cases that run on several ranks, gloo on a CPU: a test file has them, and is the script that the ranks run.

    @on_every_rank
    def sum_of_ranks(mesh): ...

    test_on_two_ranks = on_ranks(__file__, 2)

    if __name__ == "__main__":
        main(globals())

One start of all ranks runs all cases of a file. A case passes where it raises on no rank; it is skipped where it raises
`unittest.SkipTest` on every rank. By hand: python FILE RANKS FOLDER [-k NAME].
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest

LIMIT = 600  # seconds that a rank takes for all cases of a file at most
_MARK = "_runs_on_every_rank"
_SKIPPED = "skipped: "


def on_every_rank(case: Callable[[Any], None]) -> Callable[[Any], None]:
    """Mark `case(mesh)`, which is given a mesh of all ranks."""
    setattr(case, _MARK, True)
    return case


def on_ranks(file: str, ranks: int) -> Callable[[str], None]:
    """A test for each case of `file`, on so many ranks."""
    names = re.findall(r"^@on_every_rank\ndef (\w+)", Path(file).read_text(), re.MULTILINE)

    @pytest.mark.xdist_group(f"{Path(file).stem} {ranks}")
    @pytest.mark.parametrize("case", names)
    def test(case: str) -> None:
        results = _results(file, ranks)
        found = {rank: result.get(case, f"did not run: {result}") for rank, result in enumerate(results)}
        skipped = [text for text in found.values() if text.startswith(_SKIPPED)]
        if len(skipped) == ranks:
            pytest.skip(skipped[0].removeprefix(_SKIPPED))
        for rank, text in found.items():
            assert text == "", f"rank {rank}: {text}"

    return test


@cache
def _results(file: str, ranks: int) -> list[dict[str, str]]:
    """What each rank's cases raised, by name."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, file, str(ranks), folder],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        return [
            json.loads(result.read_text()) if result.exists() else {"all": done.stderr[-3000:]}
            for result in (Path(folder, f"results_{rank}.json") for rank in range(ranks))
        ]


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


def forked(ranks: int) -> int | None:
    """The rank of this process: one of `ranks` copies of the one that calls, which gets None when all of them have ended. They
    begin after the imports, which take longer than most cases."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            return rank
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return None


def main(namespace: dict[str, Any]) -> None:
    """Run the cases of a file on as many ranks as the command line says."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    ranks, folder, named = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:5]
    rank = forked(ranks)
    if rank is None:
        return
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (ranks,))
    results = {}
    for name, case in list(namespace.items()):
        if not getattr(case, _MARK, False) or (named and named[0] not in name):
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        start = time.perf_counter()
        try:
            dist.barrier()
            case(mesh)
            results[name] = ""
        except SkipTest as skip:
            results[name] = f"{_SKIPPED}{skip}"
        except Exception:
            results[name] = traceback.format_exc()[-2500:]
        said = f"{name}, rank {rank}: {time.perf_counter() - start:.1f} s {results[name][-1500:]}"
        print(said, file=sys.stderr, flush=True)
    (folder / f"results_{rank}.json").write_text(json.dumps(results))
    # Not by way of what is left in the interpreter: a rank that failed may have left others waiting.
    os._exit(0)
