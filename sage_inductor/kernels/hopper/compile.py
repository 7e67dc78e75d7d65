"""Compilation of attention.cu for one variant by NVRTC, which comes with torch's CUDA wheels. Results are kept on disk."""

# cuda-bindings has no type information.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from . import kept
from .wgmma import header

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cu")
_PRECISION = {"fast": "fp8", "balanced": "int8"}  # in "accurate" P and V are fp16 if the output is, else bf16
PV = {"fp8": 0, "int8": 1, "bf16": 2, "fp16": 3}
COMBINE_ROWS, COMBINE_THREADS = 16, 128  # rows and threads of a program of `combine`
TILE = 64  # queries of one warpgroup
OUT = {"bf16": 0, "fp16": 1, "fp32": 2}
SHARED_LIMIT = 227 * 1024  # of a block, on sm_90
_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=--verbose")


@dataclass(frozen=True)
class HopperVariant:
    """The parameters that a compiled kernel is specialised on. attention.cu says what each means."""

    head_dim: int  # padded
    v_head_dim: int  # of a piece
    pv: str  # a key of PV
    out: str  # a key of OUT
    stages: int
    consumers: int = 2  # warpgroups that compute
    has_low: bool = False
    has_high: bool = False
    key_mask: bool = False
    return_lse: bool = False
    split: bool = False
    pieces: int = 1
    out_passes: int = 1
    skip: bool = False
    block_list: bool = False
    mask_bits: bool = False
    segments: bool = False

    @cached_property
    def span_bytes(self) -> int:
        """The bytes of a row of Q or K that lie together in shared memory, which is also the swizzle: 128, or 64 where that
        pads head_dim less; 32 for head_dim 32."""
        return 32 if self.head_dim == 32 else min((128, 64), key=self._padded)

    def _padded(self, span: int) -> int:
        return -(-self.head_dim // span) * span

    @property
    def v_rows(self) -> int:
        """Rows of a V^T tile: the channels, and, except for INT8, eight more, one of which is the row of ones that sums P up."""
        return self.v_head_dim + (0 if self.pv == "int8" else 8)

    @property
    def v_element(self) -> int:
        return 2 if self.pv in ("bf16", "fp16") else 1

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return TILE * self.consumers

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block in bytes, for its tiles."""
        row_bytes = self._padded(self.span_bytes)
        tiles = 2 * self.block_m * row_bytes
        tiles += self.stages * 128 * (row_bytes + self.v_element * self.v_rows)
        if self.out != "fp32":
            tiles += self.block_m * (2 * self.v_head_dim // self.out_passes + 16)
        return tiles + 1024  # to align the first tile

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor has enough shared memory for a block, static variables included."""
        static = 8 * (4 + 4 * self.stages) + 16 * 2  # barriers, items
        if self.v_element == 1:
            static += 12 * self.consumers * self.v_head_dim  # channels, the first key
        if self.skip:
            static += 8  # votes
        return self.shared_bytes + -(-static // 1024) * 1024 <= SHARED_LIMIT

    def macros(self) -> dict[str, int]:
        values = {
            name.upper(): int(value) for name, value in asdict(self).items() if name not in ("pv", "out")
        }
        common = {
            "SPAN_BYTES": self.span_bytes,
            "COMBINE_ROWS": COMBINE_ROWS,
            "COMBINE_THREADS": COMBINE_THREADS,
        }
        return {**common, **values, "PV": PV[self.pv], "OUT": OUT[self.out]}

    def source(self) -> str:
        return header(self.v_rows, PV[self.pv]) + SOURCE.read_text()


@cache
def choose_variant(
    precision: str,
    out: str,
    d: int,
    dv: int,
    has_low: bool = False,
    has_high: bool = False,
    key_mask: bool = False,
    return_lse: bool = False,
    skip: bool = False,
    *,
    q_len: int,
    block_list: bool = False,
    mask_bits: bool = False,
    consumers: int | None = None,
    segments: bool = False,
) -> HopperVariant:
    """The variant for padded head dims d (query, key) and dv (value), not split over keys.

    Registers and shared memory limit the numbers of warpgroups, tiles in flight and channels. The choices up to head_dim 128
    were measured (benchmarks/notes.md); with `skip` (for a skip_threshold) there are always two warpgroups, and so there are with
    `mask_bits` where scores and product of three share registers: ptxas spills in the loop. `consumers` asks for a number of them.
    """
    pv = _PRECISION.get(precision) or ("fp16" if out == "fp16" else "bf16")
    # So many channels fit the registers: FP8 and INT8 products have sums of their own beside the output's.
    channels = 192 if pv in ("bf16", "fp16") else 128
    widest = max(d, dv)
    # Fewer pieces come first, then more tiles in flight. Two passes save shared memory, and let ptxas keep the softmax in its
    # best order. The latter holds at head_dim 96, too, except for the INT8 product (measured).
    if widest > 128:
        numbers_of_passes: tuple[int, ...] = 2, 4, 1
    else:
        numbers_of_passes = (2,) if d == dv == 96 and pv != "int8" else (1,)
    variants = (
        HopperVariant(
            d,
            dv // pieces,
            pv,
            out,
            stages,
            consumers
            or (
                2
                if skip or ((mask_bits or segments) and dv // pieces > 64)
                else _consumers(pv, d, dv // pieces, q_len)
            ),
            has_low,
            has_high,
            key_mask,
            return_lse,
            False,
            pieces,
            passes,
            skip,
            block_list,
            mask_bits,
            segments,
        )
        for pieces in (1, 2)
        if dv // pieces <= channels
        for stages in range(4 if widest <= 128 else 3, 1, -1)
        for passes in numbers_of_passes
        if dv // pieces // passes % 16 == 0
    )
    return next(variant for variant in variants if variant.fits)


def _consumers(pv: str, d: int, dv: int, q_len: int) -> int:
    """The number of warpgroups that compute: three where they gain more than their longer tiles waste at the end of q_len,
    else two.

    Between 64 and 128 channels ptxas finds no registers for three. For FP8 three are no faster (benchmarks/notes.md).
    """
    if pv == "int8" and max(d, dv) <= 64:
        gain = 1.25
    elif pv == "int8" and dv in (64, 128):
        gain = 1.05
    elif pv != "fp8" and max(d, dv) <= 64:
        gain = 1.1
    else:
        return 2
    rows_of_two, rows_of_three = (-(-q_len // (n * TILE)) * n * TILE for n in (2, 3))
    return 3 if rows_of_three < gain * rows_of_two else 2


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    log: str  # the messages of ptxas: registers, spills, serialised wgmma


class CompilationError(RuntimeError):
    """NVRTC refused attention.cu. The message is its log."""


def compile_variant(variant: HopperVariant) -> Compiled:
    """Compile `variant`; the cache is neither read nor written. Raises CompilationError with the compiler's log."""
    from cuda.bindings import nvrtc

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilationError(f"{result[0]}: {_program_log(nvrtc, program)}")
        return result[1] if len(result) > 1 else None

    program = None
    program = checked(nvrtc.nvrtcCreateProgram(variant.source().encode(), b"attention.cu", 0, [], []))
    options = [*_OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros().items())]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    text = _program_log(nvrtc, program)
    nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, text)


def _program_log(nvrtc: Any, program: Any) -> str:
    if program is None:
        return ""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    if size <= 1:  # empty; NVRTC writes into the bytes below, and Python shares those of one character
        return ""
    text = b" " * size
    nvrtc.nvrtcGetProgramLog(program, text)
    return str(text.decode(errors="replace").rstrip("\0 \n"))


def cubin(variant: HopperVariant, folder: Path | None) -> bytes:
    """The compiled variant, read from `folder`, or compiled and stored there. Several processes may do so at once. Where the
    folder is None or cannot be used, each process compiles for itself, and warns."""
    if folder is None:
        log.warning("compiled kernels are not kept: there is no home folder")
        return compile_variant(variant).cubin
    key = repr((variant.source(), sorted(variant.macros().items()), _OPTIONS, _compiler_version()))
    name = f"hopper-{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"
    stored = kept.load(folder, name, key)
    if stored is not None:
        return stored
    compiled = compile_variant(variant).cubin
    kept.store(folder, name, key, compiled)
    return compiled


@cache
def _compiler_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def spilled_bytes(log_text: str) -> int:
    """The bytes that threads spill to local memory, by ptxas's report."""
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log_text)))


def is_serialized(log_text: str) -> bool:
    """Whether ptxas could not keep wgmma instructions in flight side by side."""
    return "wgmma.mma_async instructions are serialized" in log_text
