"""Cases that run on several ranks, gloo on a CPU: a test file has them, and is the script that the ranks run.

    @on_every_rank
    def sum_of_ranks(mesh): ...

    test_on_two_ranks = on_ranks(__file__, 2)

    if __name__ == "__main__":
        main(globals())

The files that are tested on so many ranks share one process that has imported what they need; of it the ranks of each file
are copies, which run all its cases. A case passes where it raises on no rank; it is skipped where it raises `unittest.SkipTest` on every rank.
By hand: python FILE RANKS FOLDER [-k NAME].
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
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


def on_ranks(file: str, ranks: int) -> Callable[..., None]:
    """A test for each case of `file`, on so many ranks."""
    names = re.findall(r"^@on_every_rank\ndef (\w+)", Path(file).read_text(), re.MULTILINE)

    @pytest.mark.xdist_group(f"{ranks} ranks")
    @pytest.mark.parametrize("case", names)
    def test(case: str, request: pytest.FixtureRequest) -> None:
        items = (getattr(item, "function", None) for item in request.session.items)
        files = dict.fromkeys(item.file for item in items if getattr(item, "ranks", None) == ranks)
        name = f"{Path(file).stem}.{case}"
        results = _results(tuple(files), ranks)
        found = {rank: result.get(name, f"did not run: {result}") for rank, result in enumerate(results)}
        skipped = [text for text in found.values() if text.startswith(_SKIPPED)]
        if len(skipped) == ranks:
            pytest.skip(skipped[0].removeprefix(_SKIPPED))
        for rank, text in found.items():
            assert text == "", f"rank {rank}: {text}"

    test.file, test.ranks = file, ranks  # type: ignore[attr-defined]
    return test


@cache
def _results(files: tuple[str, ...], ranks: int) -> list[dict[str, str]]:
    """What each rank's cases raised, by file and name."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, str(ranks), folder, *files],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        results: list[dict[str, str]] = [{} for _ in range(ranks)]
        for file in files:
            for rank, result in enumerate(results):
                path = Path(folder, f"{Path(file).stem}_{rank}.json")
                result |= json.loads(path.read_text()) if path.exists() else {file: done.stderr[-3000:]}
        return results


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


def import_before_forking() -> None:
    """What most cases need, and what torch imports while it traces for the first time: they take longer than most cases."""
    import torch
    import torch._inductor.compile_fx
    import torch.distributed.tensor.experimental

    from sage_inductor import Config
    from sage_inductor.testing import RewritingBackend

    query = torch.ones(1, 1, 4, 16)
    attend = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend=RewritingBackend(Config(kernel="reference"))
    )
    attend(query, query, query)
    torch.compiler.reset()


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
    import_before_forking()
    _run(namespace, named=sys.argv[4] if len(sys.argv) > 4 else "")


def _run(namespace: dict[str, Any], named: str = "") -> None:
    """The cases of a file, on ranks that end with it. Its `before_forking`, if it has one, runs once for all of them."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    namespace.get("before_forking", lambda: None)()
    ranks, folder, file = int(sys.argv[1]), Path(sys.argv[2]), Path(namespace["__file__"]).stem
    rank = forked(ranks)
    if rank is None:
        return
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / f"{file}_store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (ranks,))
    results = {}
    for name, case in list(namespace.items()):
        if not getattr(case, _MARK, False) or named not in name:
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        start = time.perf_counter()
        try:
            dist.barrier()
            case(mesh)
            result = ""
        except SkipTest as skip:
            result = f"{_SKIPPED}{skip}"
        except Exception:
            result = traceback.format_exc()[-2500:]
        results[f"{file}.{name}"] = result
        said = f"{file}.{name}, rank {rank}: {time.perf_counter() - start:.1f} s {result[-1500:]}"
        print(said, file=sys.stderr, flush=True)
    (folder / f"{file}_{rank}.json").write_text(json.dumps(results))
    # Not by way of what is left in the interpreter: a rank that failed may have left others waiting.
    os._exit(0)


if __name__ == "__main__":
    import_before_forking()
    for path in map(Path, sys.argv[3:]):
        sys.path.insert(0, str(path.parent))
        _run(vars(importlib.import_module(path.stem)))
