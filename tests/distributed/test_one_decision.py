"""Ranks that measure differently choose the same."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ranks import main, on_every_rank, on_ranks

from sage_inductor import Config, kernels
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.testing import RewritingBackend
from sage_inductor.tuning import Choice, Comparison, SdpaCall, agreement, choice, choose, measure
from sage_inductor.tuning.measure import CannotMeasure
from sage_inductor.tuning.store import Result, Timing

REFERENCE = type(kernels.get("reference"))


@cache
def _folder() -> str:
    return tempfile.mkdtemp(prefix=f"rank{torch.distributed.get_rank()}-", dir=sys.argv[2])


def mine_alone(**options: Any) -> Config:
    """A configuration whose measured times no other rank reads."""
    return Config(**{"cache_dir": _folder(), **options})


def compare(q_len: int, symbolic: bool = False, precision: str = "fast", whole: str = "") -> Comparison:
    spec = TensorSpec((1, 8, q_len, 64), (512 * q_len, 64, 512, 1), torch.bfloat16, torch.device("cpu"))
    problem = AttentionProblem(spec, spec, spec, None, AttentionParams(precision=precision))
    return Comparison(problem, SdpaCall(spec, spec, spec, None, False, None, False), whole)


@contextmanager
def measuring(ratio: Any, failed: str = "") -> Iterator[mock.Mock]:
    """ "auto" chooses on the CPU, by made-up times: the reference takes `ratio(q_len)` of SDPA's."""

    def stand_in(comparison: Comparison, names: list[str]) -> Result:
        q_len, kv_len = comparison.lengths
        found = ratio(q_len) if callable(ratio) else ratio
        if found is None:
            raise CannotMeasure("no memory")
        if failed:
            return Result(q_len, kv_len, 1.0, {}, {"reference": failed})
        return Result(q_len, kv_len, 1.0, {"reference": Timing(found, found, 0.0)})

    with (
        mock.patch.object(kernels, "AUTO_DEVICE_TYPES", ("cpu",)),
        mock.patch.object(kernels, "AUTO_ORDER", ("reference",)),
        mock.patch.object(measure, "measure", mock.Mock(side_effect=stand_in)) as spy,
    ):
        yield spy


def everyones(mesh: Any, found: Any) -> list[Any]:
    all_of_them: list[Any] = [None] * 2
    torch.distributed.all_gather_object(all_of_them, found)
    return all_of_them


@on_every_rank
def measurements_that_differ(mesh: Any) -> None:
    rank = mesh.get_local_rank()
    with measuring(0.5 if rank == 0 else 1.5):
        mine = choose(compare(1000), mine_alone())
    assert mine == Choice("reference", (), 2.0), mine
    with measuring(1.5 if rank == 0 else 0.5):
        mine = choose(compare(2000), mine_alone())
    assert mine.kernel is None and everyones(mesh, mine) == [mine, mine], mine


@on_every_rank
def crossovers_that_differ(mesh: Any) -> None:
    """A compiled graph of symbolic lengths: each rank finds the kernel to win from another length on."""
    rank = mesh.get_local_rank()

    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    backend = RewritingBackend(mine_alone())
    with torch.no_grad(), measuring(lambda length: 0.5 if length >= (256, 512)[rank] else 2.0):
        torch.compile(attend, backend=backend, dynamic=True)(torch.randn(1, 2, 1000, 32))
    (site,) = backend.sites
    found = everyones(mesh, (site.kernel, str(backend.graphs[0].graph)))
    assert found[0] == found[1] and "min_q_len" in found[0][1], found
    assert site.kernel == "reference"


@on_every_rank
def one_rank_that_knows_the_times(mesh: Any) -> None:
    """From its folder, or from before: it does not measure, and has its say all the same."""
    rank = mesh.get_local_rank()
    with measuring(0.5) as spy:
        if rank == 1:
            choice._of_this_rank(compare(3000), mine_alone(), [kernels.get("reference")], {}, {})
            choice._known.clear()
        before = spy.call_count
        assert choose(compare(3000), mine_alone()) == Choice("reference", (), 2.0)
        assert spy.call_count - before == (1 if rank == 0 else 0)


@on_every_rank
def a_rank_that_cannot_run_the_choice(mesh: Any) -> None:
    rank = mesh.get_local_rank()
    why = ["compute capability=8.0 (supported: 9.0)"] if rank == 1 else []
    with measuring(0.5), mock.patch.object(REFERENCE, "unavailable_reasons", lambda *args: why):
        mine = choose(compare(4000), mine_alone())
    assert mine.kernel is None and "reference on rank 1" in mine.reasons[0] and "8.0" in mine.reasons[0]
    with measuring(0.5, failed="out of registers" if rank == 1 else ""):
        mine = choose(compare(5000), mine_alone())
    assert mine.kernel is None and "rank 1: out of registers" in mine.reasons[0], mine
    with measuring(0.5 if rank == 0 else None):  # a rank that cannot measure can run it
        assert choose(compare(6000), mine_alone()).kernel == "reference"


@on_every_rank
def precisions_that_differ(mesh: Any) -> None:
    rank = mesh.get_local_rank()
    with measuring(0.5):
        mine = choose(
            compare(7000, precision=("fast", "balanced")[rank]), mine_alone(), precision_is_open=True
        )
    assert mine.kernel is None and mine.reasons == (
        "precision=fast on rank 0, balanced on rank 1 (supported: one for all ranks)",
    )


@on_every_rank
def a_rank_that_never_comes_or_comes_too_late(mesh: Any) -> None:
    """It is waited for once; nothing is left open that it would have to answer."""
    rank = mesh.get_local_rank()
    with measuring(0.5), mock.patch.object(agreement, "WAIT", 0.3):
        if rank == 0:
            start = time.monotonic()
            assert choose(compare(8000), mine_alone()).kernel == "reference"
            assert time.monotonic() - start >= 0.3
            start = time.monotonic()
            assert choose(compare(9000), mine_alone()).kernel == "reference"
            assert time.monotonic() - start < 0.2
        torch.distributed.barrier()
    with measuring(2.0):  # SDPA wins here, but the others have decided
        assert choose(compare(8000), mine_alone()).kernel == "reference"
    if rank == 1:
        unable = mock.patch.object(REFERENCE, "unavailable_reasons", lambda *args: ["no FP8"])
        with measuring(0.5), unable:
            mine = choose(compare(9000), mine_alone())
        assert mine.kernel is None and "no FP8" in mine.reasons[0], mine
    torch.distributed.barrier()
    with measuring(0.5):
        assert choose(compare(10000), mine_alone()).kernel == "reference"
    assert not agreement._absent  # it is waited for again


@on_every_rank
def parts_of_other_sizes_are_one_comparison(mesh: Any) -> None:
    rank = mesh.get_local_rank()
    with measuring(0.5 if rank == 0 else 1.5):
        mine = choose(compare((11000, 12000)[rank], whole="query (1, 8, 23000, 64) tp=2: S(2)"), mine_alone())
    assert mine.kernel == "reference"


@on_every_rank
def what_is_asked_for_by_name_or_table_asks_nobody(mesh: Any) -> None:
    rank = mesh.get_local_rank()
    if rank == 0:
        with measuring(0.5), mock.patch.object(agreement, "WAIT", 60.0):
            start = time.monotonic()
            for config in (Config(tune="table"), Config(tune="off"), Config(kernel="reference")):
                choose(compare(13000), config)
            assert time.monotonic() - start < 5


@on_every_rank
def graphs_are_not_taken_from_a_cache(mesh: Any) -> None:
    from sage_inductor import SageAttentionPass

    def kind(config: Config) -> str:
        return type(SageAttentionPass(config).uuid()).__name__

    assert (kind(Config()), kind(Config(tune="table"))) == ("_Uncacheable", "tuple")


test_on_two_ranks = on_ranks(__file__, 2)

if __name__ == "__main__":
    main(globals())
