"""Whole pipelines of diffusers at real sizes: eager, plain torch.compile, ours and FlashAttention-3, their calls in turns.

    python benchmarks/pipelines.py --out pipelines.json              # all parts in less than 10 minutes of a GPU
    python benchmarks/pipelines.py --parts wan --limit 150
    python benchmarks/pipelines.py --tiny --device cpu               # to try the script

Parts:

    wan         Wan 2.1 T2V 1.3B at 480p (832 x 480, 81 frames: 32,760 tokens), 30 layers, guidance 5: two calls of the
                transformer a step. Ends with the latents: decoding the video takes the longer the fewer the steps.
    flux        FLUX.1-dev at 1024 x 1024 (4,096 + 512 tokens), 19 double and 38 single blocks. The VAE decodes the image.
    calibrate   `calibrate_pipeline` of flux, and what it finds

Every layer is there, the configurations are those of the published weights, the weights are random: in bf16, normal with a
standard deviation of 1/sqrt(fan-in), so that each layer passes on what it gets. There are no text encoders: prompts are given as
embeddings, normal ones. Four steps (`--steps`).

Contenders, each in a process of its own, so that one that hangs or finds no memory takes no other with it:

    eager               the pipeline as it is
    torch.compile       `compile_repeated_blocks()`
    sage_inductor       `sage_inductor.integrations.diffusers.compile(pipeline, regional=True)`
    flash_attention_3   diffusers' backend "_flash_3" with the function of the wheel fa3-fwd, blocks compiled as by plain; it is
                        left out where the wheel is not installed

All processes build their pipeline at once; then each makes a first call of one step alone, which compiles; then calls are made in
turns, by one process at a time. An entry of the JSON has gpu, torch, triton, diffusers, pipeline, contender, and
first_call_s, call_s (whole calls, synchronised), step_ms (from step to step), denoiser_ms (one call of the transformer): medians,
and calls_s, each call's; weights_mib (allocated before the call), peak_mib (allocated while a call ran) and
peak_denoising_mib (the same without the VAE); graphs and graph_breaks (dynamo's counts); sites and kernels (ours alone);
relative_l2 of the final latents to those of plain torch.compile, and ratio, call_s over that of plain. A contender that failed
has `error`. Exits with 1 where one did, or where latents are not finite or are other ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from found_sites import sites_found
from timing import machine
from torch import Tensor, nn

from sage_inductor import Config
from sage_inductor.integrations import diffusers as sage
from sage_inductor.measurement.metrics import relative_l2

Built = tuple[Any, dict[str, Any]]
PLAIN, FLASH = "torch.compile", "flash_attention_3"
CONTENDERS = ("eager", PLAIN, "sage_inductor", FLASH)
PARTS = ("wan", "flux", "calibrate")
WRONG = 0.5  # latents that have nothing to do with the expected ones are at about 1


@dataclass(frozen=True)
class Machine:
    device: str
    tiny: bool
    steps: int
    folder: str
    """Of caches, and of the latents that contenders leave."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def options(self) -> dict[str, Any]:
        """Fields of Config. Without a GPU "auto" leaves everything as it is."""
        return {"kernel": "auto" if self.device == "cuda" else "reference", "cache_dir": self.folder}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def wan(on: Machine) -> Built:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    config: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    text, arguments = (512, 4096), {"height": 480, "width": 832, "num_frames": 81}
    if on.tiny:
        config = {
            "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 2, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 32,
        }  # fmt: skip
        text, arguments = (24, 32), {"height": 64, "width": 64, "num_frames": 5}
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
        transformer=made(lambda: WanTransformer3DModel(**config), on),
    )  # fmt: skip
    embeddings = {
        "prompt_embeds": on.normal(1, *text),
        "negative_prompt_embeds": on.normal(1, *text),
    }
    return pipeline, {**arguments, **embeddings, "guidance_scale": 5.0, "output_type": "latent"}


def flux(on: Machine) -> Built:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    config: dict[str, Any] = {"guidance_embeds": True}  # the others of FLUX.1-dev are the defaults
    channels, latent_channels, side, text, pooled = (128, 256, 512, 512), 16, 1024, (512, 4096), 768
    if on.tiny:
        config |= {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        }  # fmt: skip
        channels, latent_channels, side, text, pooled = (32, 32, 32, 32), 4, 128, (12, 32), 32
    blocks = len(channels)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=made(
            lambda: AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
                block_out_channels=channels, layers_per_block=2, latent_channels=latent_channels, sample_size=side,
                scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            ),
            on,
        ),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=made(lambda: FluxTransformer2DModel(**config), on),
    )  # fmt: skip
    embeddings = {"prompt_embeds": on.normal(1, *text), "pooled_prompt_embeds": on.normal(1, pooled)}
    return pipeline, {"height": side, "width": side, "guidance_scale": 3.5, "output_type": "np", **embeddings}


PIPELINES: dict[str, Callable[[Machine], Built]] = {"wan": wan, "flux": flux}


def made(build: Callable[[], nn.Module], on: Machine) -> nn.Module:
    """The model, its weights drawn where they stay and in their dtype: 12 billion of float32 would take 48 GB first. What
    `from_pretrained` keeps in float32 is in float32 here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(on.dtype)
    try:
        with torch.device(on.device):
            model = build()
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if kept.intersection(name.split(".")):
                values.data = values.data.float()
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() > 1:  # what has one dimension scales a normalised value, by 1
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model.eval()


def use_flash_attention_3(model: Any) -> None:
    """diffusers' own backend of FlashAttention-3, which looks for another distribution's name."""
    import fa3_fwd_interface
    from diffusers.models import attention_dispatch

    attention_dispatch._CAN_USE_FLASH_ATTN_3 = True
    attention_dispatch.flash_attn_3_func = fa3_fwd_interface.flash_attn_func
    model.set_attention_backend("_flash_3")


class Contender:
    """One way to run one pipeline, in the process that it is made in."""

    def __init__(self, pipeline: str, name: str, on: Machine) -> None:
        self.name, self.on = name, on
        self.latents = Path(on.folder) / f"{pipeline}-{name}.pt"
        torch.manual_seed(0)
        self.pipeline, self.arguments = PIPELINES[pipeline](on)
        self.pipeline.set_progress_bar_config(disable=True)
        self.marks: list[Any] = []  # the ends of steps, and of calls of the transformer
        self.calls: list[tuple[Any, Any]] = []
        self.peak_denoising = 0
        if name == "sage_inductor":
            sage.compile(self.pipeline, regional=True, **on.options)
        elif name != "eager":
            if name == FLASH:
                use_flash_attention_3(self.pipeline.transformer)
            self.pipeline.transformer.compile_repeated_blocks()
        model = self.pipeline.transformer
        model.register_forward_pre_hook(lambda *_: self.calls.append((self.mark(), None)))
        model.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls[-1] = self.calls[-1][0], self.mark()

    def mark(self) -> Any:
        """A point in time: of the GPU, or of the host where there is none."""
        if self.on.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def first_call(self) -> dict[str, Any]:
        """One step, which compiles."""
        torch._dynamo.utils.counters.clear()
        start = time.monotonic()
        with sites_found() as sites:
            self._run(1)
        counters = torch._dynamo.utils.counters
        facts: dict[str, Any] = {"first_call_s": round(time.monotonic() - start, 1)}
        if self.on.device == "cuda":
            torch.cuda.empty_cache()  # the others are on the same GPU
        facts["graphs"] = counters["stats"]["unique_graphs"]
        facts["graph_breaks"] = sum(counters["graph_break"].values())
        if sites:
            facts["sites"] = f"{sum(site.rewritten for site in sites)} of {len(sites)}"
            facts["kernels"] = dict(Counter(site.kernel if site.rewritten else "stays" for site in sites))
        return facts

    def call(self) -> dict[str, Any]:
        """One call of the pipeline: its times and memory. Leaves the final latents in a file."""
        gpu = self.on.device == "cuda"
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        self.marks, self.calls = [], []
        start = time.perf_counter()
        self._run(self.on.steps)
        facts: dict[str, Any] = {"call_s": time.perf_counter() - start}
        facts["step_ms"] = [ms(*pair) for pair in zip(self.marks, self.marks[1:], strict=False)]
        facts["denoiser_ms"] = [ms(*pair) for pair in self.calls]
        if gpu:
            facts["weights_mib"] = round(before / 2**20, 1)
            facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            facts["peak_denoising_mib"] = round(self.peak_denoising / 2**20, 1)
        return facts

    def _run(self, steps: int) -> None:
        def ended(pipeline: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            self.marks.append(self.mark())
            if step == steps - 1:
                torch.save(kwargs["latents"].float().cpu(), self.latents)
                if self.on.device == "cuda":
                    self.peak_denoising = torch.cuda.max_memory_allocated()
            return {}

        generator = torch.Generator(self.on.device).manual_seed(1)
        self.pipeline(
            num_inference_steps=steps, generator=generator, callback_on_step_end=ended, **self.arguments
        )
        self.on.synchronize()


def ms(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else float(start.elapsed_time(end))


def calibration(on: Machine) -> dict[str, Any]:
    """`calibrate_pipeline` of Flux: how long it takes, and what it finds."""
    torch.manual_seed(0)
    pipeline, arguments = flux(on)
    pipeline.set_progress_bar_config(disable=True)
    on.synchronize()
    start = time.monotonic()
    found = sage.calibrate_pipeline(
        pipeline, config=Config(cache_dir=on.folder), num_inference_steps=on.steps, **arguments
    )
    on.synchronize()
    facts: dict[str, Any] = {"calibrate_s": round(time.monotonic() - start, 1)}
    facts["decisions"] = dict(Counter(site.decision for site in found.plan.sites))
    facts["psnr_db"], facts["output_relative_l2"] = round(found.loss.psnr_db, 2), round(found.loss.rel_l2, 5)
    if on.device == "cuda":
        facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return facts


def work(connection: Connection, part: str, name: str, on: Machine) -> None:
    """A contender's process: makes it, and does what the other end of `connection` says, answering each with facts. The first
    answer is that it was made."""
    # Times of compiling are those of a first run, for each.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(on.folder) / f"inductor-{part}-{name}")
    try:
        contender = None if part == "calibrate" else Contender(part, name, on)
        on.synchronize()
        connection.send({})
        while (said := connection.recv()) != "end":
            connection.send(calibration(on) if contender is None else getattr(contender, said)())
    except Exception as error:  # no memory, or an installation without what it takes
        connection.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


class Worker:
    """The other end: a contender's process, and what is known of it."""

    def __init__(self, part: str, name: str, on: Machine) -> None:
        self.facts: dict[str, Any] = {"pipeline": part, "contender": name}
        self.calls: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, part, name, on), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def well(self) -> bool:
        return "error" not in self.facts

    def ask(self, what: str, seconds: float) -> dict[str, Any]:
        """Its answer. A process that gives none in time is ended."""
        if self.well:
            self._connection.send(what)
        return self.answer(what, seconds)

    def answer(self, what: str, seconds: float) -> dict[str, Any]:
        """Of what was said before."""
        if not self.well:
            return {}
        seconds = max(0.0, seconds)
        try:
            facts = self._connection.recv() if self._connection.poll(seconds) else None
        except EOFError:
            facts = {"error": f"{what}: the process ended"}
        if facts is None:
            facts = {"error": f"{what}: {seconds:.0f} s are spent"}
        if "error" in facts:
            self.facts["error"] = facts["error"]
            self.end()
            return {}
        return dict(facts)

    def end(self) -> None:
        """Its process with what it holds. One that does not answer is killed."""
        if self.well:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._connection.send("end")
            self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def measure(
    part: str, names: Sequence[str], on: Machine, rounds: int, limit: float, one: float
) -> list[dict[str, Any]]:
    """The entries of one pipeline, within `limit` seconds, each first call within `one`."""
    deadline = time.monotonic() + limit
    workers = [Worker(part, name, on) for name in names]
    try:
        for worker in workers:
            worker.answer("build", min(one, deadline - time.monotonic()))
        for worker in workers:
            worker.facts |= worker.ask("first_call", min(one, deadline - time.monotonic()))
        longest = 0.0
        for _ in range(rounds):
            start = time.monotonic()
            if start + longest > deadline:
                break
            for worker in workers:
                if facts := worker.ask("call", deadline - time.monotonic()):
                    worker.calls.append(facts)
            longest = max(longest, time.monotonic() - start)
    finally:
        for worker in workers:
            worker.end()
    return entries(part, workers, on)


def entries(part: str, workers: Sequence[Worker], on: Machine) -> list[dict[str, Any]]:
    """What is written down of each worker."""
    found = []
    folder = Path(on.folder)
    plain = next((worker for worker in workers if worker.facts["contender"] == PLAIN and worker.calls), None)
    expected = torch.load(folder / f"{part}-{PLAIN}.pt") if plain else None
    for worker in workers:
        entry = dict(worker.facts)
        if worker.calls:
            entry |= {"calls_s": [round(call["call_s"], 4) for call in worker.calls]}
            entry |= median("call_s", worker.calls) | median("step_ms", worker.calls)
            entry |= median("denoiser_ms", worker.calls)
            entry |= {name: value for name, value in worker.calls[-1].items() if name.endswith("_mib")}
            latents = torch.load(folder / f"{part}-{entry['contender']}.pt")
            entry["finite"] = bool(latents.isfinite().all())
            if plain and expected is not None:
                entry["relative_l2"] = round(relative_l2(latents, expected), 5)
                entry["ratio"] = round(entry["call_s"] / median("call_s", plain.calls)["call_s"], 4)
        found.append(entry)
    return found


def median(name: str, calls: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of one figure of all calls, or of all of each call's figures."""
    values: list[float] = []
    for call in calls:
        values += call[name] if isinstance(call[name], list) else [call[name]]
    return {name: round(statistics.median(values), 4)} if values else {}


def calibrated(on: Machine, limit: float) -> dict[str, Any]:
    """The entry of the part calibrate."""
    start = time.monotonic()
    worker = Worker("calibrate", "calibrate_pipeline", on)
    try:
        worker.answer("build", limit)
        worker.facts |= worker.ask("calibrate", limit - (time.monotonic() - start))
    finally:
        worker.end()
    return worker.facts


def failed(entry: dict[str, Any]) -> bool:
    """FlashAttention-3 may be missing; nothing else may."""
    if "error" in entry:
        return entry["contender"] != FLASH
    return not entry.get("finite", True) or not entry.get("relative_l2", 0) <= WRONG


def report(found: Sequence[dict[str, Any]]) -> str:
    """The entries as text."""
    lines = []
    for entry in found:
        parts = [entry["error"]] if "error" in entry else []
        if "call_s" in entry:
            parts.append(f"{entry['call_s']:.3f} s a call")
            parts.append(f"{entry.get('step_ms', float('nan')):.1f} ms a step")
            parts.append(f"{entry['denoiser_ms']:.1f} ms a call of the transformer")
        if "ratio" in entry:
            parts.append(f"{entry['ratio']:.3f} of plain, relative L2 {entry['relative_l2']:.4f}")
        if "peak_mib" in entry:
            parts.append(f"peak {entry['peak_mib']:.0f} MiB")
        if "weights_mib" in entry:
            above = entry["peak_denoising_mib"] - entry["weights_mib"]
            parts.append(f"while denoising {above:.0f} above the weights")
        if "first_call_s" in entry:
            parts.append(f"first call {entry['first_call_s']:.1f} s")
            parts.append(f"{entry['graphs']} graphs, {entry['graph_breaks']} breaks")
        if "sites" in entry:
            kernels = ", ".join(f"{name} {count}" for name, count in entry["kernels"].items())
            parts.append(f"{entry['sites']} rewritten ({kernels})")
        if "calibrate_s" in entry:
            decisions = ", ".join(f"{name} {count}" for name, count in entry["decisions"].items())
            parts.append(f"{entry['calibrate_s']:.1f} s: {decisions}; PSNR {entry['psnr_db']:.1f} dB")
        if not entry.get("finite", True):
            parts.append("NOT FINITE")
        lines.append(f"{entry['pipeline']}, {entry['contender']}: {', '.join(parts)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The status with which the script ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipelines.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=4, help="of a call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each, at most (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for a pipeline's contenders")
    parser.add_argument("--first-limit", type=float, default=60.0, help="seconds for a first call")
    parser.add_argument("--calibrate-limit", type=float, default=300.0, help="seconds to calibrate")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="small sizes, whose times say nothing")
    options = parser.parse_args(argv)
    from diffusers import __version__ as of_diffusers

    facts = {**machine(), "diffusers": of_diffusers, "steps": options.steps}
    written: list[dict[str, Any]] = []
    # Compilers of processes that were killed may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        on = Machine(options.device, options.tiny, options.steps, folder)
        for part in options.parts:
            if part == "calibrate":
                found = [calibrated(on, options.calibrate_limit)]
            else:
                found = measure(
                    part, options.contenders, on, options.rounds, options.limit, options.first_limit
                )
            written += [{**facts, **entry} for entry in found]
            options.out.write_text(json.dumps(written, indent=0) + "\n")
            sys.stdout.write(report(found) + "\n")
            sys.stdout.flush()
    return 1 if any(failed(entry) for entry in written) else 0


if __name__ == "__main__":
    sys.exit(main())
