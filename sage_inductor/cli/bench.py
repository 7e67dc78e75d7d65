"""Times attention on this machine, with its error: one shape, or a whole model.

bench --shape B,H,S,D [--causal]    SDPA and each kernel, end to end: all from 16-bit inputs to 16-bit output
bench FILE.py:FUNCTION              plain torch.compile against backend="sage_inductor"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import cast

import torch

from sage_inductor.cli.bench_model import model_rows
from sage_inductor.cli.bench_shape import SDPA, Problem, shape_rows
from sage_inductor.cli.errors import FAILED, NOT_AS_ASKED, CommandError
from sage_inductor.cli.model import add_model, load
from sage_inductor.cli.options import (
    CONFIG_PREFIX,
    add_config,
    add_device,
    add_kernels,
    chosen_config,
    chosen_device,
    config_fields,
)
from sage_inductor.cli.output import Cell, good, show_json, show_table, weak
from sage_inductor.cli.rows import Row
from sage_inductor.config import Config, KernelName, Precision
from sage_inductor.kernels import PRECISIONS
from sage_inductor.measurement.memory import mebibytes

_MOST_ELEMENTS = 2**48  # strides of torch's are in 64 bits, and nobody has the memory
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, nargs="?")
    parser.add_argument("--shape", metavar="B,H,S,D", help="batch, heads, tokens, head_dim")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    add_device(parser)
    add_kernels(
        parser, "time these (default: for a shape all but the reference on a GPU, for a model auto)", "auto"
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=tuple(PRECISIONS),
        help="may be repeated (default: all for a shape, fast for a model)",
    )
    add_config(parser, config_fields("kernel", "precision"))


def run(options: argparse.Namespace) -> int:
    if (options.model is None) == (options.shape is None):
        raise CommandError("bench takes either FILE.py:FUNCTION or --shape B,H,S,D")
    if options.shape is not None:
        try:
            rows = shape_rows(_problem(options), options.kernel, options.precision)
        except (RuntimeError, MemoryError, OverflowError) as error:
            if not _is_for_want_of_memory(error):
                raise
            raise CommandError(
                f"--shape {options.shape}: {(str(error).splitlines() or ['no memory'])[0]}", FAILED
            ) from None
    else:
        configs = _configs(options)
        rows = model_rows(load(options.model), configs)
    if options.json:
        show_json([asdict(row) for row in rows])
    else:
        _show(options.model or f"{options.shape}{', causal' if options.causal else ''}", rows)
    return 0 if any(row.ms is not None for row in rows[1:] if row.name not in SDPA) else NOT_AS_ASKED


def _is_for_want_of_memory(error: Exception) -> bool:
    """Whether memory ran out. torch has an exception of its own for that on GPUs only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OverflowError)):
        return True
    return any(
        word in str(error) for word in ("memory", "Storage size calculation overflowed", "out of range")
    )


def _problem(options: argparse.Namespace) -> Problem:
    config_options = [name for name in vars(options) if name.startswith(CONFIG_PREFIX)]
    if config_options or "auto" in (options.kernel or ()):
        named = ", ".join(name.removeprefix(CONFIG_PREFIX) for name in config_options) or "kernel auto"
        raise CommandError(f"{named}: of use for a model only, not with --shape")
    try:
        batch, heads, seq, head_dim = (int(size) for size in options.shape.split(","))
    except ValueError:
        valid = "four sizes, B,H,S,D, as in 1,16,4096,128"
        raise CommandError(f"--shape {options.shape} (valid: {valid})") from None
    if min(batch, heads, seq, head_dim) < 1:
        raise CommandError(f"--shape {options.shape} (valid: sizes of at least 1)")
    if batch * heads * seq * head_dim > _MOST_ELEMENTS:
        raise CommandError(f"--shape {options.shape} (valid: at most {_MOST_ELEMENTS} elements)")
    return Problem(batch, heads, seq, head_dim, options.causal, DTYPES[options.dtype], chosen_device(options))


def _configs(options: argparse.Namespace) -> list[Config]:
    base = chosen_config(options)
    # Each is one of the valid names, as the parser sees to.
    return [
        replace(base, kernel=cast(KernelName, kernel), precision=cast(Precision, precision))
        for kernel in options.kernel or ("auto",)
        for precision in options.precision or ("auto",)
    ]


def _show(title: str, rows: Sequence[Row]) -> None:
    with_sites = any(row.sites is not None for row in rows)
    last = ("breaks", "rewritten") if with_sites else ("TFLOP/s",)
    header = ("kernel", "precision", "ms", "speed", "rel. L2", *last, "MiB", "remarks")
    show_table(title, header, [_cells(row, with_sites) for row in rows])


def _cells(row: Row, with_sites: bool) -> list[Cell]:
    def text(value: float | int | None, form: str) -> str:
        return "" if value is None else format(value, form)

    speed: Cell = text(row.speedup, ".2f") + ("x" if row.speedup is not None else "")
    if row.speedup is not None and row.speedup != 1.0:
        speed = good(str(speed)) if row.speedup > 1 else weak(str(speed))
    sites = "" if row.sites is None else f"{row.rewritten} of {row.sites}"
    last = [text(row.graph_breaks, "d"), sites] if with_sites else [text(row.tflops, ".1f")]
    remarks = "; ".join(row.problems)
    memory = mebibytes(row.memory, row.memory_measured)
    return [
        row.name,
        row.precision,
        text(row.ms, ".4g"),
        speed,
        text(row.rel_l2, ".5f"),
        *last,
        memory,
        remarks,
    ]
