"""Times of a whole model: plain torch.compile against the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sage_inductor.cli.explain import explained
from sage_inductor.cli.model import Subject, failing
from sage_inductor.cli.rows import Row, speedup
from sage_inductor.config import OPTION_PREFIX, Config
from sage_inductor.errors import NotEligibleError
from sage_inductor.measurement.memory import peak_bytes
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.measurement.timers import median_ms
from sage_inductor.torch_internals.dynamo import graph_breaks
from sage_inductor.torch_internals.traced import tensors_of


def model_rows(subject: Subject, configs: Sequence[Config]) -> list[Row]:
    """Plain torch.compile first, then the backend with each of `configs`."""
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
    if not row.memory_measured:  # sites run one after the other
        sizes = [size for site in report.rewritten if (size := site.copies_bytes()) is not None]
        found["memory"] = max(sizes, default=None)
    return Row(**{**asdict(row), **found, "rel_l2": _output_error(output, expected)})


def _compiled(
    name: str,
    precision: str,
    subject: Subject,
    device: torch.device,
    rows: Sequence[Row],
    compile_options: dict[str, Any],
) -> tuple[Row, list[Tensor]]:
    """Compile, run and time the model; the row, and the floating-point tensors of its output. Caches of compiled code are
    dropped before, because their entries count against Dynamo's limit of recompiles."""
    torch.compiler.reset()
    breaks = graph_breaks()
    with failing("the model raised"):
        compiled = torch.compile(subject.model, **compile_options)
        output = [tensor.clone() for tensor in tensors_of(subject(compiled)) if tensor.is_floating_point()]
        breaks = graph_breaks() - breaks
        ms = median_ms([partial(subject, compiled)], target_ms=400.0, device=device)
        memory = peak_bytes(partial(subject, compiled), device)
    row = Row(name, precision, ms, speedup(ms, rows), graph_breaks=breaks, memory=memory)
    return replace(row, memory_measured=memory is not None), output


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
