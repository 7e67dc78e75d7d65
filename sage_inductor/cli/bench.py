"""Times attention on this machine, with its error: one shape, or a whole model.

bench --shape B,H,S,D [--causal]    SDPA and each kernel, end to end: all from 16-bit inputs to 16-bit output
bench FILE.py:FUNCTION              plain torch.compile against backend="sage_inductor"
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import kernels
from sage_inductor.accuracy import relative_l2, sampled_error
from sage_inductor.cli.errors import NOT_AS_ASKED, CommandError
from sage_inductor.cli.explain import explained
from sage_inductor.cli.model import Subject, add_model, failing, load, tensors_of
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
from sage_inductor.config import OPTION_PREFIX, Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.inductor import graph_breaks
from sage_inductor.kernels import PRECISIONS, AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.timing import median_ms, sets_beyond_l2

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One way to compute it. Without a time it was not run, for `problems`."""

    name: str
    precision: str
    ms: float | None = None
    speedup: float | None = None
    """Time of the first row over this one's."""
    rel_l2: float | None = None
    tflops: float | None = None
    graph_breaks: int | None = None
    rewritten: int | None = None
    sites: int | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Attention of one shape, in the memory order of models: `[batch, seq, heads, head_dim]`."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    is_causal: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def operations(self) -> float:
        """Of both products; a causal mask leaves half of them."""
        total = 4.0 * self.batch * self.heads * self.seq**2 * self.head_dim
        return total / 2 if self.is_causal else total

    def inputs(self) -> list[tuple[Tensor, ...]]:
        """As many sets of query, key and value as must take turns so that none is found in L2."""
        shape = self.batch, self.seq, self.heads, self.head_dim
        size = 3 * self.dtype.itemsize * self.batch * self.heads * self.seq * self.head_dim
        return [
            tuple(torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(3))
            for _ in range(sets_beyond_l2(size, self.device))
        ]


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
    rows = _bench_model(options) if options.shape is None else _bench_shape(options)
    if options.json:
        show_json([asdict(row) for row in rows])
    else:
        _show(options.model or f"{options.shape}{', causal' if options.causal else ''}", rows)
    return 0 if any(row.ms is not None for row in rows[1:] if row.name not in SDPA) else NOT_AS_ASKED


# One shape.

SDPA: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
}


def _bench_shape(options: argparse.Namespace) -> list[Row]:
    config_options = [name for name in vars(options) if name.startswith(CONFIG_PREFIX)]
    if config_options or "auto" in (options.kernel or ()):
        named = ", ".join(name.removeprefix(CONFIG_PREFIX) for name in config_options) or "kernel auto"
        raise CommandError(f"{named}: of use for a model only, not with --shape")
    problem = _problem(options)
    on_gpu = problem.device.type == "cuda"
    names = options.kernel or [name for name in kernels.KERNELS if name != "reference" or not on_gpu]
    rows: list[Row] = []
    with torch.no_grad():
        sets = problem.inputs()
        for name, backend in SDPA.items():
            if backend is None or on_gpu:
                rows.append(
                    _timed(name, options.dtype, problem, sets, partial(_sdpa, problem, backend), rows)
                )
        for name in names:
            for precision in options.precision or kernels.get(name).precisions:
                rows.append(_kernel_row(name, precision, problem, sets, rows))
    return rows


def _problem(options: argparse.Namespace) -> Problem:
    try:
        batch, heads, seq, head_dim = (int(size) for size in options.shape.split(","))
    except ValueError:
        raise CommandError(
            f"--shape {options.shape} (valid: four sizes, B,H,S,D, as in 1,16,4096,128)"
        ) from None
    if min(batch, heads, seq, head_dim) < 1:
        raise CommandError(f"--shape {options.shape} (valid: sizes of at least 1)")
    return Problem(batch, heads, seq, head_dim, options.causal, DTYPES[options.dtype], chosen_device(options))


def _kernel_row(
    name: str, precision: str, problem: Problem, sets: list[tuple[Tensor, ...]], rows: list[Row]
) -> Row:
    kernel = kernels.get(name)
    params = AttentionParams(is_causal=problem.is_causal, precision=precision)
    query, key, value = map(TensorSpec.of, sets[0])
    reasons = kernel.unavailable_reasons(problem.device)
    reasons = reasons or kernel.not_supported_reasons(AttentionProblem(query, key, value, None, params))
    if reasons:
        return Row(name, precision, problems=tuple(reasons))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        kernel.run(query, key, value, None, params, out, None)
        return out

    return _timed(name, precision, problem, sets, attend, rows)


def _sdpa(problem: Problem, backend: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=problem.is_causal)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=problem.is_causal)


def _timed(
    name: str,
    precision: str,
    problem: Problem,
    sets: list[tuple[Tensor, ...]],
    attend: Callable[..., Tensor],
    rows: Sequence[Row],
) -> Row:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ms = median_ms([partial(attend, *inputs) for inputs in sets], device=problem.device)
            query, key, value = sets[0]
            params = AttentionParams(is_causal=problem.is_causal)
            error = sampled_error(query, key, value, attend(query, key, value), params)
        except RuntimeError as failure:  # a backend of SDPA that does not take the shape, or no memory
            # SDPA warns of what each backend lacks before it says that there is none.
            return Row(name, precision, problems=_first_lines(failure, *caught))
    tflops = problem.operations / ms / 1e9
    return Row(
        name, precision, ms, _speedup(ms, rows), rel_l2=error, tflops=tflops, problems=_first_lines(*caught)
    )


def _first_lines(*messages: Exception | warnings.WarningMessage) -> tuple[str, ...]:
    texts = (str(item.message if isinstance(item, warnings.WarningMessage) else item) for item in messages)
    return tuple(dict.fromkeys(text.splitlines()[0].partition(" (Triggered")[0] for text in texts if text))


def _speedup(ms: float, rows: Sequence[Row]) -> float | None:
    baseline = rows[0].ms if rows else ms
    return None if baseline is None else baseline / ms


# A whole model.


def _bench_model(options: argparse.Namespace) -> list[Row]:
    base = chosen_config(options)
    subject = load(options.model)
    configs = [
        Config(**{**vars(base), "kernel": kernel, "precision": precision})
        for kernel in options.kernel or ("auto",)
        for precision in options.precision or ("fast",)
    ]
    device = _device_of(subject)
    with torch.no_grad():
        plain, expected = _compiled("torch.compile", "", subject, device, [], {})
        rows = [plain]
        for config in configs:
            rows.append(_against_plain(subject, config, device, rows, expected))
    return rows


def _against_plain(
    subject: Subject, config: Config, device: torch.device, rows: list[Row], expected: list[Tensor]
) -> Row:
    try:
        report = explained(subject, config)
    except NotEligibleError as error:
        return Row(config.kernel, config.precision, problems=error.reasons)
    options = {f"{OPTION_PREFIX}{name}": value for name, value in vars(config).items()}
    compile_options = {"backend": "sage_inductor", "options": options}
    row, output = _compiled(config.kernel, config.precision, subject, device, rows, compile_options)
    reasons = dict.fromkeys(reason for site in report.refused for reason in site.reasons)
    found = {"rewritten": len(report.rewritten), "sites": len(report.sites), "problems": tuple(reasons)}
    return Row(**{**asdict(row), **found, "rel_l2": _output_error(output, expected)})


def _compiled(
    name: str,
    precision: str,
    subject: Subject,
    device: torch.device,
    rows: Sequence[Row],
    compile_options: dict[str, Any],
) -> tuple[Row, list[Tensor]]:
    """Compile afresh, run, time; the output's tensors too. Caches of compiled code are dropped before: entries
    count against Dynamo's limit of recompiles."""
    torch.compiler.reset()
    breaks = graph_breaks()
    with failing("the model raised"):
        compiled = torch.compile(subject.model, **compile_options)
        output = [tensor.clone() for tensor in tensors_of(subject(compiled)) if tensor.is_floating_point()]
        breaks = graph_breaks() - breaks
        ms = median_ms([partial(subject, compiled)], target_ms=400.0, device=device)
    return Row(name, precision, ms, _speedup(ms, rows), graph_breaks=breaks), output


def _output_error(output: list[Tensor], expected: list[Tensor]) -> float | None:
    """Relative L2 error of all outputs together; None where there is no floating-point output to compare."""
    if not expected:
        return None
    flat, flat_expected = (
        torch.cat([t.double().flatten() for t in tensors]) for tensors in (output, expected)
    )
    return relative_l2(flat, flat_expected)


def _device_of(subject: Subject) -> torch.device:
    parameters = getattr(subject.model, "parameters", tuple)
    tensors: Iterator[Tensor] = iter([*subject.tensors(), *parameters()])
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def _show(title: str, rows: Sequence[Row]) -> None:
    with_sites = any(row.sites is not None for row in rows)
    last = ("breaks", "rewritten") if with_sites else ("TFLOP/s",)
    header = ("kernel", "precision", "ms", "speed", "rel. L2", *last, "remarks")
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
    return [row.name, row.precision, text(row.ms, ".4g"), speed, text(row.rel_l2, ".5f"), *last, remarks]
