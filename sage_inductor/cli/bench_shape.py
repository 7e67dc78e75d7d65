"""One shape of attention: SDPA's backends and the kernels, end to end, with their errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import kernels
from sage_inductor.cli.rows import Row, speedup
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
from sage_inductor.kernels.copies import copies_bytes
from sage_inductor.measurement.ground_truth import sampled_error
from sage_inductor.measurement.memory import peak_bytes
from sage_inductor.measurement.timers import median_ms, sets_beyond_l2
from sage_inductor.torch_internals.sdpa import builtin_sdpa

WITH_COPIES = ("hopper", "triton")  # kernels whose copies `copies_bytes` describes

SDPA: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
}


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
        """The floating-point operations of both products. A causal mask leaves half of them."""
        total = 4.0 * self.batch * self.heads * self.seq**2 * self.head_dim
        return total / 2 if self.is_causal else total

    def inputs(self) -> list[tuple[Tensor, ...]]:
        """Sets of query, key and value, as many as must take turns so that none is found in the L2 cache."""
        shape = self.batch, self.seq, self.heads, self.head_dim
        size = 3 * self.dtype.itemsize * self.batch * self.heads * self.seq * self.head_dim
        return [
            tuple(torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(3))
            for _ in range(sets_beyond_l2(size, self.device))
        ]


def shape_rows(
    problem: Problem, names: Sequence[str] | None = None, precisions: Sequence[str] | None = None
) -> list[Row]:
    """SDPA's default first, then its backends, then the kernels: by default all, but on a GPU not the reference."""
    on_gpu = problem.device.type == "cuda"
    names = names or [name for name in kernels.KERNELS if name != "reference" or not on_gpu]
    rows: list[Row] = []
    with torch.no_grad():
        sets = problem.inputs()
        for name, backend in SDPA.items():
            if backend is None or on_gpu:
                attend = partial(_sdpa, problem, backend)
                rows.append(
                    _timed(name, str(problem.dtype).removeprefix("torch."), problem, sets, attend, rows)
                )
        for name in names:
            for precision in precisions or kernels.get(name).precisions:
                rows.append(_kernel_row(name, precision, problem, sets, rows))
    return rows


def _kernel_row(
    name: str, precision: str, problem: Problem, sets: list[tuple[Tensor, ...]], rows: list[Row]
) -> Row:
    kernel = kernels.get(name)
    params = AttentionParams(is_causal=problem.is_causal, precision=precision)
    query, key, value = sets[0]
    asked = AttentionProblem(TensorSpec.of(query), TensorSpec.of(key), TensorSpec.of(value), None, params)
    reasons = kernel.unavailable_reasons(problem.device) or kernel.not_supported_reasons(asked)
    if reasons:
        return _with_copies(Row(name, precision, problems=tuple(reasons)), asked)

    prepared = kernel.prepare(query, key, value, None, params, torch.empty_like(query), None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        prepared(query, key, value, None, out, None)
        return out

    return _with_copies(_timed(name, precision, problem, sets, attend, rows), asked)


def _with_copies(row: Row, asked: AttentionProblem) -> Row:
    """`row` with the memory of the copies in 8 bits, where none was measured and the kernel takes the problem."""
    if row.memory is not None or row.name not in WITH_COPIES:
        return row
    # What a GPU would take is said on a CPU, too.
    reasons = kernels.get(row.name).not_supported_reasons(asked)
    if any(not reason.startswith("device=") for reason in reasons):
        return row
    query, key, value = (spec.shape for spec in (asked.query, asked.key, asked.value))
    return replace(
        row, memory=copies_bytes(query, key, value[-1], row.precision, smoothing=asked.params.smoothing)
    )


def _sdpa(problem: Problem, backend: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if backend is None:
        return builtin_sdpa(query, key, value, is_causal=problem.is_causal)
    with sdpa_kernel(backend):
        return builtin_sdpa(query, key, value, is_causal=problem.is_causal)


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
    row = Row(
        name, precision, ms, speedup(ms, rows), rel_l2=error, tflops=tflops, problems=_first_lines(*caught)
    )
    peak = peak_bytes(partial(attend, query, key, value), problem.device)
    return row if peak is None else replace(row, memory=peak - query.nbytes, memory_measured=True)


def _first_lines(*messages: Exception | warnings.WarningMessage) -> tuple[str, ...]:
    texts = (str(item.message if isinstance(item, warnings.WarningMessage) else item) for item in messages)
    return tuple(dict.fromkeys(text.splitlines()[0].partition(" (Triggered")[0] for text in texts if text))
