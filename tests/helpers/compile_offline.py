"""Compiles the Triton kernels for a GPU that is not there: registers, stack, what the attention kernel's loop moves to and
from that on Hopper, and waits for the kernel in front (programmatic dependent launch), one JSON object a kernel.

    python tests/helpers/compile_offline.py 90 fast 128 none
    python tests/helpers/compile_offline.py 90 fast 128 none both float16
    python tests/helpers/compile_offline.py 90 fast+skip=0.01 128 none
    python tests/helpers/compile_offline.py 90 fast 128 segments both bfloat16 hopper

Arguments: compute capability, precision (with a skip_threshold, as forms have it), head dim, the mask: none, keys (bool, over keys), bias (float32, over
keys), queries (bool, a row for each query), segments, or segments+ and one of the others. Behind them may stand the smoothing,
the dtype and the kernel ("mean", "bfloat16" and "triton" unless they are given; of hopper, what runs before attention.cu). Several such lists are compiled one after the other, with "--"
between them, and an empty line is printed between. A process of its own, because Triton's interpreter, which the tests run under,
is chosen when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget

from sage_inductor.kernels.base import AttentionParams, Segments
from sage_inductor.kernels.forms import parts_of
from sage_inductor.kernels.hopper import launch as hopper
from sage_inductor.kernels.triton import launch, launcher

KERNELS = (
    "segments_kernel",
    "segment_spans_kernel",
    "mask_blocks_kernel",
    "statistics_kernel",
    "evened_kernel",
    "quantize_kernel",
    "sampled_list_kernel",
    "attention_kernel",
)


class Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A device for each capability: Triton remembers what it compiles for a device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a kernel: what it is launched with is compiled, and nothing is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> SimpleNamespace:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            asm = compiled.asm
            waits = asm["ptx"].count("griddepcontrol.wait")
            found = {"kernel": self.kernel.__name__, "waits": waits, **usage(asm["cubin"])}
            found["shared"] = compiled.metadata.shared  # bytes
            if found["kernel"] == "attention_kernel" and ".target sm_90a" in asm["ptx"]:
                with tempfile.TemporaryDirectory() as folder:
                    loop = sass.disassemble(asm["cubin"], Path(folder), found["kernel"]).main_loop()
                found["spills_in_loop"] = [line for line in loop if re.search(r"\b(LDL|STL)\b", line)]
            print(json.dumps(found))
            return SimpleNamespace()

        return launch


def usage(cubin: bytes) -> dict[str, int]:
    """By the tool that triton brings. A kernel without local arrays has a stack only if it spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(
    capability: int,
    precision: str,
    head_dim: int,
    mask_kind: str,
    smoothing: str = "mean",
    dtype: str = "bfloat16",
    family: str = "triton",
) -> None:
    """`family` hopper: what its Triton kernels do before attention.cu."""
    triton.runtime.driver.set_active(Driver(capability))
    launch.capability = lambda index: divmod(capability, 10)
    launch.multiprocessors = lambda index: 132
    launcher._binaries.clear()  # what lists share is compiled for each
    q, k, v = (torch.empty(2, 4, 256, head_dim, dtype=getattr(torch, dtype)) for _ in range(3))
    first, _, second = mask_kind.partition("+")
    segments = Segments(*torch.zeros(2, 2, 256, dtype=torch.int32)) if first == "segments" else None
    mask, mask_kind = None, second if first == "segments" else first
    if mask_kind not in ("", "none"):
        queries = 256 if mask_kind == "queries" else 1
        mask = torch.empty(2, 1, queries, 256, dtype=torch.float32 if mask_kind == "bias" else torch.bool)
    form = parts_of(precision)
    out = torch.empty_like(q)
    params = AttentionParams(**{**form.options(), "smoothing": smoothing})
    if family == "hopper":
        hopper.multiprocessors = lambda index: 132
        hopper.HopperAttention(q, k, v, mask, params, out, None, segments=segments).quantize(
            q, k, v, mask, segments=segments
        )
        return
    call = launch.TritonAttention(q, k, v, mask, params, out, None, segments=segments)
    call(q, k, v, mask, out, None, segments=segments)


if __name__ == "__main__":
    torch.cuda.current_device = lambda: None
    for name in KERNELS:
        setattr(launch, name, Compiled(getattr(launch, name)))
    for name in ("block_list_kernel", "segment_list_kernel"):
        setattr(hopper, name, Compiled(getattr(hopper, name)))
    lists = [list(items) for is_separator, items in groupby(sys.argv[1:], "--".__eq__) if not is_separator]
    for number, (capability, precision, head_dim, mask, *options) in enumerate(lists):
        if number:
            print()
        main(int(capability), precision, int(head_dim), mask, *options)
