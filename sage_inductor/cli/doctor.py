"""Says what is installed, which kernels can run here and why not, and tests each one.

Every kernel that can run computes small problems in each of its precisions: ragged lengths, causal and padding
masks, grouped heads, strides, and on a GPU under CUDA graph capture and on a side stream; other masks, segments and
log-sum-exp in the first of them. Each output is held against the oracle and against float64.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sage_inductor import kernels
from sage_inductor.cli.errors import FAILED, NOT_AS_ASKED
from sage_inductor.cli.options import add_device, add_kernels, chosen_device
from sage_inductor.cli.output import Cell, bad, good, show_json, show_lines, show_table, weak
from sage_inductor.kernels.installed import driver_version, package_version
from sage_inductor.measurement import selftest
from sage_inductor.measurement.progress import ProgressCallback, shown

ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class Diagnosis:
    """One kernel on one device. `reasons`: why it cannot run; `broken`: those of them that are faults."""

    kernel: str
    reasons: tuple[str, ...]
    broken: tuple[str, ...]
    findings: tuple[selftest.Finding, ...] = ()

    def of(self, status: str) -> list[selftest.Finding]:
        return [finding for finding in self.findings if finding.status == status]

    @property
    def is_sound(self) -> bool:
        return not self.broken and not self.of("failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_kernels(parser, "test only these (default: all)")
    parser.add_argument("--verbose", action="store_true", help="show every case, not only those that failed")


def run(options: argparse.Namespace) -> int:
    device = chosen_device(options)
    facts = machine_facts()
    with shown(None, "testing kernels") as progress:
        diagnoses = [diagnose(name, device, progress) for name in options.kernel or kernels.KERNELS]
    code = exit_code(diagnoses, asked=options.kernel or ())
    if options.json:
        data = [{**asdict(diagnosis), "is_sound": diagnosis.is_sound} for diagnosis in diagnoses]
        show_json({"device": str(device), "facts": facts, "kernels": data, "exit_code": code})
    else:
        _show(device, facts, diagnoses, code, options.verbose)
    return code


def diagnose(name: str, device: torch.device, progress: ProgressCallback | None = None) -> Diagnosis:
    """The diagnosis of one kernel. Exceptions that it raises when it is imported, asked or run become part of the result."""
    try:
        kernel = kernels.get(name)
        reasons, broken = kernel.unavailable_reasons(device), kernel.broken_reasons(device)
        findings = [] if reasons else selftest.check(kernel, device, progress=progress)
    except Exception as error:  # a build for another torch fails in many ways
        reason = f"raises {type(error).__name__}: {error}"
        return Diagnosis(name, (reason,), (reason,))
    return Diagnosis(name, tuple(reasons), tuple(broken), tuple(findings))


def exit_code(diagnoses: Iterable[Diagnosis], asked: Iterable[str]) -> int:
    """FAILED where a kernel is broken or fails, NOT_AS_ASKED where none can run, else 0. The oracle runs everywhere and speeds
    up nothing, so it counts only where it is asked for."""
    diagnoses = list(diagnoses)
    if not all(diagnosis.is_sound for diagnosis in diagnoses):
        return FAILED
    counted = [d for d in diagnoses if d.kernel != "reference" or "reference" in asked]
    return 0 if any(not diagnosis.reasons for diagnosis in counted) else NOT_AS_ASKED


def machine_facts() -> dict[str, Any]:
    """The facts that one would ask for first in a bug report."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "sage_inductor": package_version("sage_inductor") or "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none: a build without CUDA",
        "cudnn": str(cudnn) if cudnn else "none",
        "driver": driver_version() or "none found",
        "gpus": _gpus(),
        "triton": package_version("triton") or "not installed",
        "sageattention": package_version("sageattention") or "not installed",
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in properties
    ]


def _show(
    device: torch.device, facts: dict[str, Any], diagnoses: list[Diagnosis], code: int, verbose: bool
) -> None:
    about: list[tuple[Cell, Cell]] = []
    for name, fact in facts.items():
        if name == "gpus":
            about += [(f"gpu {index}", text) for index, text in enumerate(fact)] or [("gpu", weak("none"))]
        elif name == "environment":
            about += fact.items()
        else:
            about.append((name, fact))
    show_table("Machine", ("what", "is"), about)
    rows = [row for diagnosis in diagnoses for row in _rows(diagnosis)]
    show_table(f"Kernels on {device}", ("kernel", "precision", "self-test", "error", "remarks"), rows)
    cases = [finding for d in diagnoses for finding in (d.findings if verbose else d.of("failed"))]
    if cases:
        header = ("kernel", "precision", "case", "result", "error", "from oracle", "problems")
        title = "Cases" if verbose else "Cases that failed"
        show_table(title, header, [_case_row(finding) for finding in cases])
    show_lines(_verdict(diagnoses, code))


def _rows(diagnosis: Diagnosis) -> Iterable[tuple[Cell, ...]]:
    """A line for each precision that was tested, or one that says why none was."""
    if diagnosis.reasons:
        result = bad("broken") if diagnosis.broken else weak("cannot run")
        yield diagnosis.kernel, "", result, "", "; ".join(diagnosis.reasons)
        return
    for precision in dict.fromkeys(finding.precision for finding in diagnosis.findings):
        by_status = {
            status: [finding for finding in diagnosis.of(status) if finding.precision == precision]
            for status in ("passed", "failed", "skipped")
        }
        text = ", ".join(f"{len(found)} {status}" for status, found in by_status.items() if found)
        style = bad if by_status["failed"] else good if by_status["passed"] else weak
        errors = [f.rel_l2 for f in by_status["passed"] + by_status["failed"] if f.rel_l2 is not None]
        error = f"{max(errors, key=_size):.4f}" if errors else ""
        limits = dict.fromkeys(problem for finding in by_status["skipped"] for problem in finding.problems)
        yield diagnosis.kernel, precision, style(text), error, "; ".join(limits)


def _size(error: float) -> float:
    """The key that errors are ordered by, NaN as the largest."""
    return math.inf if math.isnan(error) else error


def _case_row(finding: selftest.Finding) -> tuple[Cell, ...]:
    style = {"passed": good, "failed": bad, "skipped": weak}[finding.status]
    figures = ("" if figure is None else f"{figure:.4f}" for figure in (finding.rel_l2, finding.oracle_l2))
    problems = "; ".join(finding.problems)
    return finding.kernel, finding.precision, finding.case, style(finding.status), *figures, problems


def _verdict(diagnoses: list[Diagnosis], code: int) -> str:
    unsound = [diagnosis.kernel for diagnosis in diagnoses if not diagnosis.is_sound]
    if code == FAILED:
        return f"Something is wrong with: {', '.join(unsound)}."
    if code == NOT_AS_ASKED:
        return "No kernel can run here: attention stays SDPA."
    return f"All is well. Can run: {', '.join(d.kernel for d in diagnoses if not d.reasons)}."
