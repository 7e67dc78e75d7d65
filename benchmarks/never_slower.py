"""Is any site slower than SDPA with the kernel that was chosen for it? Choose first, then measure in a run of its own.

    python benchmarks/never_slower.py --out never_slower.json --budget 500

Sites are the grid of attention.py at every precision, and others where a choice can go wrong: cross attention, few
heads, GQA, masks (padded, ragged, packed), lengths that are not known, head dims that no table knows. The first process lets `explain` choose for each, with an empty
cache folder beside the results; the second, which reads nothing but the names, times the chosen kernel and SDPA with
this folder's timer, not the package's. Run again, it goes on where the budget ended. Exits with 1 when a chosen
kernel was more than 3% slower than SDPA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import HEAD_DIMS, HEADS, SIZES
from timing import machine, median_ms, sets_beyond_l2
from torch import Tensor

from sage_inductor import Config, explain
from sage_inductor.kernels import PRECISIONS
from sage_inductor.operators import inference as ops

ALLOWED = 0.03
REPEATS = 3  # of the timer, SDPA and the kernel in turns
DEVICE = "cuda"


@dataclass(frozen=True)
class Site:
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    is_causal: bool = False
    mask: str = "none"
    """none; padding: one row of bools for all sequences; ragged: a row for each, of another length; left: such rows padded in
    front, and causal; tril: a tensor that is causal; packed: sequences behind one another, causal within each."""
    layout: str = "NHD"
    precision: str = "fast"
    dynamic: bool = False
    """Whether it is compiled for lengths that are not known."""

    def inputs(self) -> tuple[Tensor, ...]:
        query = self._normal(self.heads, self.q_len)
        key, value = (self._normal(self.kv_heads, self.kv_len) for _ in range(2))
        if self.mask in ("none", "tril"):
            return query, key, value
        at = torch.arange(self.kv_len, device=DEVICE)
        if self.mask == "packed":
            ends = torch.randperm(self.kv_len - 1, device=DEVICE)[: max(1, self.kv_len // 512)] + 1
            ids = torch.bucketize(at, ends.sort().values, right=True, out_int32=True)
            return query, key, value, ids.expand(self.batch, -1).contiguous()
        lengths = torch.full((self.batch, 1), self.kv_len * 3 // 4, device=DEVICE)
        if self.mask != "padding":
            lengths = torch.linspace(self.kv_len // 4, self.kv_len, self.batch, device=DEVICE).long()[:, None]
        keys = at < lengths
        keys = keys.flip(-1) if self.mask == "left" else keys
        return query, key, value, keys[:, None, None].contiguous()

    def _normal(self, heads: int, length: int) -> Tensor:
        outer, inner = (length, heads) if self.layout == "NHD" else (heads, length)
        tensor = torch.randn(self.batch, outer, inner, self.head_dim, device=DEVICE, dtype=torch.bfloat16)
        return tensor.transpose(1, 2) if self.layout == "NHD" else tensor

    def model(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor | None = None) -> Tensor:
        """What is compiled. It makes a causal mask itself, so that the choice can be made by what it holds."""
        return self.sdpa(query, key, value, self._mask(query.shape[2], key.shape[2], read))

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.is_causal, enable_gqa=gqa
        )

    def baseline(self) -> Callable[..., Tensor]:
        """SDPA on its own: the mask, which the model has already, is made beforehand."""
        made: dict[int | None, Tensor | None] = {}

        def run(query: Tensor, key: Tensor, value: Tensor, read: Tensor | None = None) -> Tensor:
            at = None if read is None else read.data_ptr()
            if at not in made:
                made[at] = self._mask(self.q_len, self.kv_len, read)
            return self.sdpa(query, key, value, made[at])

        return run

    def _mask(self, q_len: int, kv_len: int, read: Tensor | None) -> Tensor | None:
        """The mask of what is `read`: the row over keys, or the ids."""
        if self.mask in ("none", "padding", "ragged"):
            return read
        if self.mask == "tril":
            return torch.ones(q_len, kv_len, dtype=torch.bool, device=DEVICE).tril()
        causal = torch.arange(kv_len, device=DEVICE) <= torch.arange(q_len, device=DEVICE)[:, None]
        assert read is not None
        if self.mask == "packed":
            read = (read[:, :, None] == read[:, None])[:, None]
        return causal & read

    def kernel(self, name: str) -> Callable[..., Tensor]:
        is_causal = self.is_causal or self.mask in ("tril", "left", "packed")

        def run(query: Tensor, key: Tensor, value: Tensor, read: Tensor | None = None) -> Tensor:
            ids = {"query_segments": read, "key_segments": read} if self.mask == "packed" else {}
            return ops.attention(
                query, key, value, None if ids else read,
                **({"is_causal": True} if is_causal else {}),
                enable_gqa=self.heads != self.kv_heads, kernel_name=name, precision=self.precision, **ids,
            )  # fmt: skip

        return run


def grid() -> Iterator[Site]:
    for precision in PRECISIONS:
        for head_dim in HEAD_DIMS:
            for is_causal in (False, True):
                for seq in SIZES:
                    batch = 4 if seq <= 4096 else 1
                    yield Site(batch, HEADS, HEADS, seq, seq, head_dim, is_causal, precision=precision)
    yield from others()


def others() -> Iterator[Site]:
    for kv_len in (512, 4096):
        yield Site(1, 12, 12, 32760, kv_len, 128)  # cross attention of a video model
    for seq in (2048, 4096, 8192, 16384):
        yield Site(1, 8, 8, seq, seq, 128)  # few heads: the GPU is not full
        yield Site(1, 32, 8, seq, seq, 128, is_causal=True, layout="HND")
        yield Site(1, 32, 8, seq, seq, 128, mask="tril")
        yield Site(2, 16, 16, seq, seq, 64, mask="padding")
        yield Site(1, 16, 16, seq, seq, 96)
        yield Site(1, 16, 16, seq, seq, 256)
    for seq in (512, 2048, 8192):
        for mask in ("ragged", "left", "packed"):
            batch = max(1, min(64, 2**15 // seq))
            yield Site(batch, 16, 16, seq, seq, 64, mask=mask)
            yield Site(batch, 32, 8, seq, seq, 128, mask=mask)
            yield Site(batch, 32, 8, seq, seq, 128, mask=mask, dynamic=True)
        yield Site(1, 32, 8, seq, seq, 128, mask="tril", dynamic=True)
    yield Site(64, 12, 12, 512, 512, 64, mask="padding")
    for seq in (3000, 5000, 6007, 7000):  # between the powers of two, ragged
        yield Site(1, 24, 24, seq, seq, 128)
        yield Site(2, 20, 20, seq, seq, 64)


Row = dict[str, Any]


class Results:
    """Rows on disk, one for each site of this machine, written after each step."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path, self.facts = path, facts
        self.rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def of(self, site: Site) -> Row | None:
        wanted = {**self.facts, **asdict(site)}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def update(self, site: Site, figures: Row) -> None:
        row = self.of(site)
        if row is None:
            row = {**self.facts, **asdict(site)}
            self.rows.append(row)
        row.update(figures)
        self.path.write_text(json.dumps(self.rows, indent=0) + "\n")


def choose(site: Site, cache: Path) -> Row:
    """The decision of the package, made as a compile makes it."""
    torch._dynamo.reset()
    start = time.monotonic()
    config = Config(precision=site.precision, cache_dir=str(cache))
    with torch.no_grad():
        inputs = site.inputs()
        if site.dynamic:
            for tensor, dim in zip(inputs, (2, 2, 2, -1), strict=False):
                torch._dynamo.maybe_mark_dynamic(tensor, dim % tensor.dim())
        (found,) = explain(site.model, *inputs, config=config).sites
    return {
        "understood": found.mask,
        "kernel": found.kernel if found.rewritten else "sdpa",
        "speedup_when_chosen": found.speedup,
        "reasons": list(found.reasons),
        "seconds": round(time.monotonic() - start, 2),
    }


def check(site: Site, name: str) -> Row:
    """SDPA and kernel `name` afterwards; nothing to time where the choice is SDPA itself."""
    if name == "sdpa":
        return {"slower_by": 0.0}
    inputs = site.inputs()
    sets = [inputs]
    bytes_per_set = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    sets += [site.inputs() for _ in range(sets_beyond_l2(bytes_per_set) - 1)]
    calls = {"sdpa_ms": site.baseline(), "kernel_ms": site.kernel(name)}
    times: dict[str, list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for _ in range(REPEATS):
            for key, call in calls.items():
                times[key].append(median_ms([lambda call=call, s=s: call(*s) for s in sets]))  # type: ignore[misc]
    sdpa_ms, kernel_ms = (statistics.median(times[key]) for key in ("sdpa_ms", "kernel_ms"))
    return {"sdpa_ms": sdpa_ms, "kernel_ms": kernel_ms, "slower_by": kernel_ms / sdpa_ms - 1}


def run(phase: str, out: Path, budget: float, sites: list[Site]) -> None:
    """One phase over all sites that lack it, until `budget` seconds are spent."""
    deadline, results = time.monotonic() + budget, Results(out, machine())
    for site in sites:
        row = results.of(site) or {}
        if ("slower_by" if phase == "check" else "kernel") in row or (phase == "check" and not row):
            continue
        if time.monotonic() > deadline:
            sys.stderr.write(f"{phase}: stopped before {site}: {budget} s are spent\n")
            return
        try:
            figures = (
                choose(site, out.with_suffix(".cache")) if phase == "choose" else check(site, row["kernel"])
            )
        except torch.OutOfMemoryError as error:
            sys.stderr.write(f"{phase} {site}: {str(error).splitlines()[0]}\n")
            continue
        results.update(site, figures)


def summary(rows: list[Row]) -> tuple[str, bool]:
    """What came out, as text, and whether every site that was checked is within the limit."""
    checked = [row for row in rows if "slower_by" in row]
    taken = [row for row in checked if row["kernel"] != "sdpa"]
    slower = [row for row in taken if row["slower_by"] > ALLOWED]
    lines = [f"{len(rows)} sites, {len(checked)} checked: {len(taken)} with a kernel, the rest SDPA"]
    if taken:
        gains = sorted(row["sdpa_ms"] / row["kernel_ms"] for row in taken)
        lines.append(f"speed of the kernels over SDPA: {gains[0]:.3f} to {gains[-1]:.3f}, "
                     f"median {statistics.median(gains):.3f}")  # fmt: skip
    lines += [f"SLOWER by {row['slower_by']:.1%}: {row}" for row in slower]
    return "\n".join(lines), not slower


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("never_slower.json"))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds, for both phases together")
    parser.add_argument(
        "--phase", choices=("choose", "check"), help="in this process; both, each in its own, when left out"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.phase is not None:
        run(options.phase, options.out, options.budget, list(grid()))
        return
    deadline = time.monotonic() + options.budget
    for phase, share in (("choose", 0.6), ("check", 1.0)):
        seconds = max(1.0, (deadline - time.monotonic()) * share)
        command = [sys.executable, __file__, "--out", str(options.out), "--budget", str(seconds)]
        subprocess.run([*command, "--phase", phase], check=True)
    text, within = summary(json.loads(options.out.read_text()))
    sys.stdout.write(text + "\n")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
