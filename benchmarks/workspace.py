"""Would one workspace for all layers take less memory than one for each call, which goes back to torch's allocator?

    python benchmarks/workspace.py --out workspace.json
    TRITON_INTERPRET=1 python benchmarks/workspace.py --tiny --device cpu       # to try the script

Stacks of 1, 4 and 16 layers (attention with its projections, with and without an MLP behind it; 24 heads of 128, 16,384 tokens,
bf16), compiled plainly, by this package as it is and with the workspace of the kernels replaced by one that is kept (`kept`); as
they are, and, but for `kept`, replayed as CUDA graphs: torch refuses graphs that write memory of their pool which is nobody's
output. Per row: peak_mib, the most that torch's allocator holds beyond weights and input while the stack runs; workspace_mib, what one call asks for; addresses, at how many places the calls of all layers found theirs; and ms. Where
peak does not grow with the layers, the allocator gives each layer the same memory already.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine, median_ms
from torch import Tensor, nn

from sage_inductor.kernels.triton import launch
from sage_inductor.measurement.memory import peak_bytes

MIB = 2**20


class Layer(nn.Module):
    def __init__(self, heads: int, head_dim: int, mlp: bool) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            if mlp
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x if self.mlp is None else x + self.mlp(x)


class Kept:
    """torch for kernels/triton/launch.py, but for one buffer that all workspaces lie in."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is not torch.uint8:
            return torch.empty(*args, **kwargs)
        (size,) = args
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = torch.empty(size, **kwargs)
        return self.buffer[:size]


@contextlib.contextmanager
def workspaces(kept: bool) -> Iterator[dict[int, int]]:
    """Bytes of the workspaces that are asked for, by their addresses."""
    found: dict[int, int] = {}
    quantize = launch.TritonAttention.quantize

    def noting(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        workspace = quantize(self, *args, **kwargs)
        found[workspace.data_ptr()] = workspace.numel()
        return workspace

    launch.TritonAttention.quantize = noting
    launch.torch = Kept() if kept else torch
    try:
        yield found
    finally:
        launch.TritonAttention.quantize = quantize
        launch.torch = torch


def measure(
    layers: int, mlp: bool, contender: str, graphs: bool, options: argparse.Namespace
) -> dict[str, Any]:
    heads, head_dim, tokens = (1, 32, 128) if options.tiny else (24, 128, 16_384)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.device(options.device):
        model = nn.Sequential(*(Layer(heads, head_dim, mlp) for _ in range(layers))).to(dtype)
        x = torch.randn(1, tokens, heads * head_dim, dtype=dtype)
    inductor: dict[str, Any] = {"triton.cudagraphs": True} if graphs else {}
    if contender != "plain":
        inductor["sage.kernel"] = options.kernel
    backend = "inductor" if contender == "plain" else "sage_inductor"
    compiled = torch.compile(model, backend=backend, options=inductor or None)
    row: dict[str, Any] = {"layers": layers, "mlp": mlp, "contender": contender, "cuda_graphs": graphs}
    with workspaces(contender == "kept") as found:
        for _ in range(2 if graphs else 1):  # compiles, records
            compiled(x)
        if not graphs:
            found.clear()
        peak = peak_bytes(lambda: compiled(x), torch.device(options.device))
        if peak is None:  # a CPU
            compiled(x)
        row["peak_mib"] = None if peak is None else round(peak / MIB, 1)
        row["workspace_mib"] = round(max(found.values(), default=0) / MIB, 3)
        row["addresses"] = len(found)
        row["ms"] = round(
            median_ms([lambda: compiled(x)], least=1 if options.tiny else 5, device=options.device), 4
        )
    return row


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows that are written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("workspace.json"))
    parser.add_argument("--kernel", default="triton", help="hopper or triton (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the script")
    parser.add_argument("--tiny", action="store_true", help="small sizes, whose times say nothing")
    options = parser.parse_args(argv)
    rows = []
    for mlp in (False,) if options.tiny else (False, True):
        for graphs in (False, True) if options.device == "cuda" else (False,):
            for layers in options.layers:
                for contender in ("plain", "as it is") if graphs else ("plain", "as it is", "kept"):
                    row = {**machine(), "kernel": options.kernel}
                    row |= measure(layers, mlp, contender, graphs, options)
                    rows.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
                    options.out.write_text(json.dumps(rows, indent=0) + "\n")
    return rows


if __name__ == "__main__":
    main()
