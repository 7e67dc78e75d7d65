"""What masks that are understood are worth: models, packed documents, FlexAttention and padding, in one run.

    python benchmarks/masks_table.py --out masks_table.json                 # all rows in 10 minutes of a GPU
    python benchmarks/masks_table.py --rows packed bert --limit 60
    python benchmarks/masks_table.py --tiny --device cpu                    # to try the script

Each row of the table is a process with a limit of its own, so that one that hangs or finds no memory takes no other with it; what
it measured until then is kept. Rows:

    hunyuan     HunyuanVideo 720p, two layers, text padded: at most .47 of plain torch.compile
    qwen_image  QwenImage 1328, two layers, text padded: at most .82 of plain
    qwen3       Qwen3-8B's layers, two, 32k tokens, static and dynamic: at most 1.02 of the same model with is_causal=True by
                hand, its peak memory lower than plain's
    packed      64 documents of 32 to 2,048 tokens, 32k in all, causal, D=128 and 64: at most .8 of torch's varlen_attn
    flex        FlexAttention, a sliding window of 1,024 at 16k and documents at 32k: at most .77 of compiled flex_attention
    bert        64 x 512, D=64, padded by half: at most 1.03 of SDPA

An entry of the JSON has gpu, torch, triton, row, case, contender, ms (median, all contenders of a case in turns), peak_mib
(allocated above what was there before), masks and kernels (of the sites that its first call compiled), relative_l2 (to the first
contender of the case), and `of` and `at_most`: its time is to be at most that share of the contender's so called. Everything from
bf16 to bf16, quantisation included. No model runs eagerly: FlexAttention would build all scores. Exits with 1 where a share is more.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import masks_models
import torch
import torch.nn.functional as F
from found_sites import sites_found
from timing import machine
from torch import Tensor

import sage_inductor
from sage_inductor import Site, sage_attention
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.measurement.timers import gpu_ms, host_ms

Call = Callable[[], Tensor]
WRONG = 0.2  # of 8-bit attention in two layers of random weights no more than a tenth is to be expected


@dataclass(frozen=True)
class Machine:
    device: str
    tiny: bool
    rounds: int
    cache: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def kernel(self) -> str:
        """What is asked for: without a GPU "auto" leaves everything as it is."""
        return "auto" if self.device == "cuda" else "reference"

    def options(self, kernel: str | None = None) -> dict[str, Any]:
        return {"sage.kernel": kernel or self.kernel, "sage.cache_dir": self.cache}

    def normal(self, batch: int, heads: int, tokens: int, head_dim: int) -> Tensor:
        shape = batch, tokens, heads, head_dim
        return torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2)


@dataclass
class Contender:
    name: str
    call: Call
    of: str | None = None
    at_most: float | None = None

    def facts(self, sites: Sequence[Site]) -> dict[str, Any]:
        """What is written down of it and of the sites that its first call compiled, without what is empty."""
        kernels = (site.kernel if site.rewritten and site.kernel else "stays" for site in sites)
        found = {
            "contender": self.name,
            "of": self.of,
            "at_most": self.at_most,
            "masks": list(dict.fromkeys(site.mask for site in sites)),
            "kernels": list(dict.fromkeys(kernels)),
        }
        return {name: value for name, value in found.items() if value}


Case = tuple[str, list[Contender]]


def ours(
    name: str, model: Any, inputs: Any, on: Machine, kernel: str | None = None, **bound: Any
) -> Contender:
    """`model` compiled by this package; `inputs` by position or by name."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    compiled = torch.compile(model, backend="sage_inductor", options=on.options(kernel))
    return Contender(name, lambda: first(compiled(*args, **kwargs)), **bound)


def plain(name: str, model: Any, inputs: Any) -> Contender:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    compiled = torch.compile(model)
    return Contender(name, lambda: first(compiled(*args, **kwargs)))


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def hunyuan(on: Machine) -> Iterator[Case]:
    yield _diffusion("720p", masks_models.hunyuan_video(on.device, on.tiny), on, 465 / 1001)


def qwen_image(on: Machine) -> Iterator[Case]:
    yield _diffusion("1328", masks_models.qwen_image(on.device, on.tiny), on, 7.75 / 9.49)


def _diffusion(case: str, built: masks_models.Built, on: Machine, at_most: float) -> Case:
    model, inputs = built
    found = [ours(on.kernel, model, inputs, on, of="plain", at_most=at_most)]
    if on.device == "cuda":
        found += [ours(name, model, inputs, on, name) for name in by_name("hopper")]
    return case, [plain("plain", model, inputs), *found]


def by_name(*names: str) -> list[str]:
    available = sage_inductor.kernels.available("cuda")
    return [name for name in names if not available[name]]


def qwen3(on: Machine) -> Iterator[Case]:
    for case in ("static", "dynamic"):
        model, inputs = masks_models.qwen3(on.device, on.tiny)
        hand, same = masks_models.qwen3(on.device, on.tiny, by_hand=True)
        if case == "dynamic":
            for given in (inputs, same):
                torch._dynamo.mark_dynamic(given["input_ids"], 1)
        yield (
            case,
            [
                plain("plain", model, inputs),
                ours(f"{on.kernel}, by hand", hand, same, on),
                ours(on.kernel, model, inputs, on, of=f"{on.kernel}, by hand", at_most=1.02),
            ],
        )


def document_lengths(on: Machine) -> list[int]:
    """64 lengths from 32 to 2,048 whose sum is 32,768; 4 of 64 in all where the script is tried."""
    count, least, most, total = (4, 3, 40, 64) if on.tiny else (64, 32, 2048, 32_768)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(count, generator=generator) ** 2
    lengths = (least + weights / weights.sum() * (total - count * least)).long().clamp(max=most)
    lengths[lengths.argmin()] += total - int(lengths.sum())
    return [int(length) for length in lengths]


def packed(on: Machine) -> Iterator[Case]:
    lengths = document_lengths(on)
    total, heads = sum(lengths), 2 if on.tiny else 32
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(on.device)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().to(on.device)[None]
    at = torch.arange(total, device=on.device)
    for head_dim in (32,) if on.tiny else (128, 64):
        q, k, v = (on.normal(1, heads, total, head_dim) for _ in range(3))
        mask = ((ids[:, :, None] == ids[:, None, :]) & (at <= at[:, None]))[:, None]
        found = [Contender("SDPA with the mask", partial(F.scaled_dot_product_attention, q, k, v, mask))]
        if on.device == "cuda":
            found += _varlen(q, k, v, ends, max(lengths))
        bound = {"of": "varlen_attn", "at_most": 0.8} if on.device == "cuda" else {}
        segments = {"query_segments": ids, "key_segments": ids}
        for name in by_name("hopper", "triton") if on.device == "cuda" else ("reference",):
            call = partial(sage_attention, q, k, v, is_causal=True, kernel=name, **segments)  # type: ignore[arg-type]
            found.append(Contender(f"segments, {name}", call, **bound))  # type: ignore[arg-type]

        def model(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
            at = torch.arange(ids.shape[1], device=ids.device)
            mask = (ids[:, :, None] == ids[:, None, :]) & (at <= at[:, None])
            return F.scaled_dot_product_attention(q, k, v, mask[:, None])

        found.append(
            ours(f"compiled, {on.kernel}", model, (q, k, v, ids), on, of="SDPA with the mask", at_most=0.5)
        )
        yield f"causal, D={head_dim}", found


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> list[Contender]:
    from torch.nn.attention.varlen import varlen_attn

    from sage_inductor.kernels.triton import attention_varlen

    rows = [item[0].transpose(0, 1) for item in (q, k, v)]
    takes_window = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if takes_window else {"is_causal": True}

    def torchs() -> Tensor:
        out = varlen_attn(*rows, ends, ends, longest, longest, **causal)
        return first(out).transpose(0, 1)[None]

    def own() -> Tensor:
        out = attention_varlen(*rows, ends, ends, longest, longest, is_causal=True)
        return first(out).transpose(0, 1)[None]

    return [Contender("varlen_attn", torchs), Contender("attention_varlen", own)]


def flex(on: Machine) -> Iterator[Case]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def model(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks)

    lengths = document_lengths(on)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(on.device)
    window = 16 if on.tiny else 1024

    def sliding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k <= window)

    def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (ids[q] == ids[k])

    cases = (("sliding window", sliding, 96 if on.tiny else 16_384), ("documents", documents, sum(lengths)))
    for case, mask_mod, tokens in cases:
        q, k, v = (on.normal(1, 2 if on.tiny else 32, tokens, 32 if on.tiny else 128) for _ in range(3))
        size = 32 if on.tiny else 128
        blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device=on.device, BLOCK_SIZE=size)
        inputs = q, k, v, blocks
        found = [ours(on.kernel, model, inputs, on, of="flex_attention", at_most=1 / 1.3)]
        if on.device == "cuda":
            found += [ours(name, model, inputs, on, name) for name in by_name("hopper", "triton")]
        yield case, [plain("flex_attention", model, inputs), *found]


def bert(on: Machine) -> Iterator[Case]:
    batch, tokens, heads, head_dim = (2, 24, 2, 32) if on.tiny else (64, 512, 12, 64)
    half = torch.full((batch, 1), tokens // 2)
    ragged = torch.linspace(1, tokens, batch).long()[:, None]
    for case, lengths in (("padded by half", half), ("ragged, half of it padding", ragged)):
        q, k, v = (on.normal(batch, heads, tokens, head_dim) for _ in range(3))
        mask = (torch.arange(tokens) < lengths)[:, None, None, :].to(on.device)
        found = [plain("SDPA", F.scaled_dot_product_attention, (q, k, v, mask))]
        found.append(
            ours(on.kernel, F.scaled_dot_product_attention, (q, k, v, mask), on, of="SDPA", at_most=1.03)
        )
        for name in by_name("hopper", "triton") if on.device == "cuda" else ("reference",):
            found.append(Contender(f"{name} alone", partial(sage_attention, q, k, v, mask, kernel=name)))  # type: ignore[arg-type]
        yield case, found


ROWS: dict[str, Callable[[Machine], Iterator[Case]]] = {
    "packed": packed, "bert": bert, "qwen3": qwen3, "qwen_image": qwen_image, "flex": flex, "hunyuan": hunyuan,
}  # fmt: skip


def measure(contenders: Sequence[Contender], on: Machine) -> Iterator[dict[str, Any]]:
    """Figures of each contender. The first call of each compiles it, and shows its sites and values. One that raises has an
    `error`, and no ms."""
    timer = gpu_ms if on.device == "cuda" else host_ms
    expected: Tensor | None = None
    figures: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for contender in contenders:
        start, out, failed = time.monotonic(), None, None
        with sites_found() as sites:
            try:
                out = contender.call()
            except Exception as error:  # no memory, or an installation without what it takes
                failed = f"{type(error).__name__}: {error}".splitlines()[0]
        entry = figures[contender.name] = contender.facts(sites)
        if out is None:
            entry["error"] = failed
            continue
        entry["first_call_s"] = round(time.monotonic() - start, 1)
        expected = out if expected is None else expected
        entry["relative_l2"] = round(relative_l2(out, expected), 5)
        if not entry["relative_l2"] <= WRONG:
            entry["wrong"] = True
        del out
        entry["peak_mib"] = peak_mib(contender.call, on)
        times[contender.name] = []
    for _ in range(on.rounds):
        for contender in contenders:
            if contender.name in times:
                times[contender.name].append(timer(contender.call))
    for name, entry in figures.items():
        yield ({"ms": round(statistics.median(times[name]), 4)} if name in times else {}) | entry


def peak_mib(call: Call, on: Machine) -> float | None:
    if on.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


@torch.no_grad()
def run(row: str, on: Machine, out: Path) -> None:
    """The cases of one row, written after each."""
    torch.manual_seed(0)
    entries: list[dict[str, Any]] = []
    for case, contenders in ROWS[row](on):
        with torch._dynamo.config.patch(recompile_limit=64):
            for entry in measure(contenders, on):
                entries.append({**machine(), "row": row, "case": case, **entry})
        out.write_text(json.dumps(entries, indent=0) + "\n")
        del contenders
        torch.compiler.reset()
        if on.device == "cuda":
            torch.cuda.empty_cache()


def shares(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Entries that are to take at most a share of another's time, and the share they took."""
    ms = {(entry["row"], entry["case"], entry["contender"]): entry.get("ms") for entry in entries}
    for entry in entries:
        other = ms.get((entry["row"], entry["case"], entry.get("of")))
        if other and "ms" in entry:
            yield entry, entry["ms"] / other


def report(entries: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """The table as text, and whether every share is within its bound and no output is wrong."""
    found = {id(entry): share for entry, share in shares(entries)}
    lines = []
    for entry in entries:
        parts = [f"{entry['ms']:.3f} ms" if "ms" in entry else entry["error"]]
        if entry.get("peak_mib") is not None:
            parts.append(f"peak {entry['peak_mib']:.0f} MiB")
        parts += ["; ".join(entry[name]) for name in ("masks", "kernels") if name in entry]
        if id(entry) in found:
            parts.append(f"{found[id(entry)]:.3f} of {entry['of']} (at most {entry['at_most']:.3f})")
        parts += ["WRONG"] if "wrong" in entry else []
        lines.append(f"{entry['row']} {entry['case']}, {entry['contender']}: {', '.join(parts)}")
    within = all(share <= entry["at_most"] for entry, share in shares(entries))
    return "\n".join(lines), within and not any("wrong" in entry for entry in entries)


def main(argv: Sequence[str] | None = None) -> int:
    """The status with which the script ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("masks_table.json"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for a row")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of them")
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders of a case in turns")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="small sizes, whose times say nothing")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(argv)
    if options.row is not None:
        with tempfile.TemporaryDirectory() as cache:
            run(options.row, Machine(options.device, options.tiny, options.rounds, cache), options.out)
        return 0
    deadline, entries = time.monotonic() + options.budget, list[dict[str, Any]]()
    for row in options.rows:
        seconds = min(options.limit, deadline - time.monotonic())
        if seconds <= 0:
            sys.stderr.write(f"{row}: not begun, {options.budget} s are spent\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [sys.executable, __file__, "--row", row, "--out", str(part), "--device", options.device]
            command += ["--rounds", str(options.rounds), *(["--tiny"] if options.tiny else [])]
            try:
                done = subprocess.run(command, timeout=seconds).returncode
            except subprocess.TimeoutExpired:
                done = f"{seconds:.0f} s are spent"
            if done != 0:
                sys.stderr.write(f"{row}: ended early ({done})\n")
            if part.exists():
                entries += json.loads(part.read_text())
        options.out.write_text(json.dumps(entries, indent=0) + "\n")
    text, within = report(entries)
    sys.stdout.write(text + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
