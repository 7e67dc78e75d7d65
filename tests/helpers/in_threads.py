"""Looks at models in four threads at once, some runs of each kind: `python tests/helpers/in_threads.py --runs 100`.

A crash ends the process: tests/ways_in/test_threads.py starts it as one of its own.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor

THREADS = 4
CONFIG = sage_inductor.Config(kernel="reference")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Attentions(nn.Module):
    """Two, with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def explained(model: nn.Module, x: Tensor) -> None:
    report = sage_inductor.explain(model, x, config=CONFIG)
    assert len(report.rewritten) == 2, f"{len(report.sites)} sites in {report.graphs} graphs"


def calibrated(model: nn.Module, x: Tensor) -> None:
    plan = sage_inductor.calibrate(model, (x,), effect="none")
    assert len(plan.sites) == 2, plan


def at_once(jobs: list[Callable[[], None]]) -> None:
    """Raises what the first job that failed has raised."""
    failed: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def shared(look: Callable[[nn.Module, Tensor], None]) -> None:
    model, x = Attentions(), torch.randn(1, 8, 16)
    at_once([lambda: look(model, x)] * THREADS)


def separate(look: Callable[[nn.Module, Tensor], None]) -> None:
    x = torch.randn(1, 8, 16)
    at_once([lambda model=Attentions(): look(model, x) for _ in range(THREADS)])


def running(look: Callable[[nn.Module, Tensor], None]) -> None:
    """One thread compiles and runs the model, another one of the same code for the first time, two look at it."""
    torch.compiler.reset()
    models, x = [Attentions(), Attentions()], torch.randn(1, 8, 16)
    looked = threading.Event()

    def run(model: nn.Module) -> None:
        compiled, expected = torch.compile(model, backend="eager"), model(x)
        while True:
            assert torch.equal(compiled(x), expected)
            if looked.wait(0):
                return

    def look_twice() -> None:
        try:
            look(models[0], x)
            look(models[0], x)
        finally:
            looked.set()

    at_once([lambda model=model: run(model) for model in models] + [look_twice] * 2)


KINDS = {kind.__name__: kind for kind in (shared, separate, running)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--kind", choices=tuple(KINDS), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.kind or KINDS:
        for look in (explained, calibrated):
            for _ in range(options.runs):
                KINDS[name](look)
            print(f"{options.runs} runs, {look.__name__}, {name}: none ended", flush=True)


if __name__ == "__main__":
    main()
