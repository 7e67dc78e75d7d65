"""hopper/attention.cu on a CPU: its source as C++ (translation.py), with the CUDA and the multiprocessor of device.h, behind the launch
code of the package.

    with emulated(processors=4, seed=1):
        kernels.get("hopper").run(q, k, v, mask, params, out, lse)

The Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1). It needs g++ and cuda-bindings, but no CUDA.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from sage_inductor.kernels.hopper import compile as compilation
from sage_inductor.kernels.hopper.compile import HopperVariant

from .translation import DEVICE, UnknownInstruction, translate

__all__ = ["EmulationError", "UnknownInstruction", "build_source", "emulated", "missing", "run_kernel"]

# Punning through pointers is what CUDA code does. Of its arrays g++ sees that some would be overrun in branches that no variant takes.
FLAGS = (
    "-std=c++17", "-O1", "-march=native", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-w",
    "-U_FORTIFY_SOURCE", "-fno-stack-protector",
)  # fmt: skip


class EmulationError(Exception):
    """The kernel did what it must not do, or nothing can go on. Names lines of attention.cu."""


def missing() -> list[str]:
    """What there is not of what the emulator needs."""
    found = {"g++": shutil.which("g++"), "cuda-bindings": find_spec("cuda") and find_spec("cuda.bindings")}
    return [f"no {name}" for name, there in found.items() if not there]


class _Map(ctypes.Structure):
    """`Map` of device.h: what a tensor map says."""

    _fields_ = [  # noqa: RUF012
        ("address", ctypes.c_void_p),
        ("rows", ctypes.c_longlong),
        ("columns", ctypes.c_longlong),
        ("element", ctypes.c_int),
        ("box_rows", ctypes.c_int),
        ("box_columns", ctypes.c_int),
        ("swizzle", ctypes.c_int),
    ]


class TensorMap:
    """In the place of the driver's: 128 bytes at a multiple of 64."""

    def __init__(self, *fields: int) -> None:
        address, element, rows, columns, box_rows, box_columns, swizzle = fields
        # What the driver asks for.
        assert address % 16 == 0 and columns * element % 16 == 0
        assert box_columns * element <= swizzle and max(box_rows, box_columns) <= 256
        assert box_columns * element == swizzle  # other boxes would not be dense
        self._memory = ctypes.create_string_buffer(128 + 64)
        self._place = -(-ctypes.addressof(self._memory) // 64) * 64
        values = address, rows, columns, element, box_rows, box_columns, swizzle
        ctypes.memmove(self._place, ctypes.byref(_Map(*values)), ctypes.sizeof(_Map))

    def getPtr(self) -> int:
        return self._place


def build(variant: HopperVariant, folder: Path) -> Path:
    """The library of `variant`, compiled unless `folder` has it."""
    text = compilation.SOURCE.read_text()
    macros = "".join(f"#define {name} {value}\n" for name, value in variant.macros().items())
    source = variant.source().replace(text, f'#line 1 "{compilation.SOURCE.name}"\n{text}')
    return build_source(f'{macros}#line 1 "wgmma"\n{source}', _kernels(variant), folder)


def _kernels(variant: HopperVariant) -> list[str]:
    return ["attention", "combine"] if variant.split else ["attention"]


def build_source(source: str, kernels: Sequence[str], folder: Path) -> Path:
    """The library of these kernels of a CUDA source."""
    program = translate(source, kernels)
    headers = [header.read_text() for header in _headers()]
    key = _key(program, *headers)
    library = folder / f"{key}.so"
    if not library.exists():
        device = _precompiled(folder / f"device-{_key(*headers)}")
        with tempfile.TemporaryDirectory(dir=folder) as own:
            (Path(own) / "attention.cc").write_text(program)
            _compile(own, "-shared", "-include", str(device), "attention.cc", "-o", "library.so", "-ldl")
            os.replace(Path(own) / "library.so", library)  # several processes may do so at once
    return library


def _precompiled(headers: Path) -> Path:
    """device.h in a folder of its own, with what g++ makes of it, unless it is there: each variant would read it again for a quarter of
    a second."""
    if not headers.exists():
        headers.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=headers.parent) as own:
            made = Path(own) / "headers"
            made.mkdir()
            for header in _headers():
                shutil.copy(header, made)
            _compile(made, "-x", "c++-header", DEVICE.name, "-o", f"{DEVICE.name}.gch")
            with suppress(OSError):  # another process was faster
                made.rename(headers)
    return headers / DEVICE.name


def _headers() -> list[Path]:
    return sorted(DEVICE.parent.glob("*.h"))


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join((*texts, *FLAGS)).encode()).hexdigest()[:32]


def _compile(folder: Path | str, *arguments: str) -> None:
    done = subprocess.run(["g++", *FLAGS, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++: {done.stderr[:4000]}")


def run_kernel(
    library: Path,
    name: str,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: int,
    seed: int,
) -> None:
    """`arguments` is the address of an array of pointers to the kernel's arguments. Raises EmulationError."""
    kernel: Any = getattr(_loaded(library), f"run_{name}")
    kernel.restype = ctypes.c_char_p
    numbers = (*map(ctypes.c_uint, grid), ctypes.c_int(threads), ctypes.c_uint(shared_bytes))
    message = kernel(ctypes.c_void_p(arguments), *numbers, ctypes.c_ulonglong(seed))
    if message:
        raise EmulationError(_with_lines(message.decode(), library))


@cache
def _folder() -> Path:
    """Of the test session, which its workers share; else of this process."""
    shared = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(shared or tempfile.mkdtemp(prefix="hopper_emulator-")) / "hopper_emulator"


@cache
def _loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _with_lines(message: str, library: Path) -> str:
    """`@0x12ab` becomes functions and lines, the innermost first."""

    def lines(place: re.Match[str]) -> str:
        if shutil.which("addr2line") is None:
            return place[0]
        command = ["addr2line", "-i", "-s", "-e", str(library), place[1]]
        return " < ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())

    return re.sub(r"@(0x[0-9a-f]+)", lines, message)


@contextmanager
def emulated(processors: int = 4, seed: int = 0, folder: Path | None = None) -> Iterator[None]:
    """The Hopper kernel runs here, as on a GPU of so many multiprocessors. `seed` is of the order in which things happen."""
    if found := missing():
        raise RuntimeError(", ".join(found))
    from sage_inductor.kernels.hopper import driver, launch

    def loaded(index: int | None, variant: HopperVariant) -> tuple[tuple[Path, str], ...]:
        library = build(variant, folder or _folder())
        return tuple((library, name) for name in _kernels(variant))

    def run(
        function: tuple[Path, str], grid: tuple[int, int], threads: int, shared_bytes: int, stream: int, arguments: int,
        overlap: bool = False,
    ) -> None:  # fmt: skip
        run_kernel(*function, grid, threads, shared_bytes, arguments, seed)

    with ExitStack() as stack:
        for module, name, stand_in in (
            (launch, "loaded", loaded),
            (launch, "multiprocessors", lambda index: processors),
            (driver, "launch", run),
            (driver, "tensor_map", TensorMap),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        launch._placed.cache_clear()  # maps of the other driver
        stack.callback(launch._placed.cache_clear)
        yield
