"""A model exported, rewritten to 8-bit attention, saved, loaded, and compiled ahead of time with AOTInductor.

    python examples/export_aoti.py

The exported program and the AOTInductor package call the operator that sage_inductor registers: whoever loads
them needs `import sage_inductor` in the same Python process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor


class Block(nn.Module):
    """Pre-norm causal self-attention; x is `[batch, seq, dim]`."""

    def __init__(self, dim: int = 128, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the relative L2 error against the eager model of each form it runs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default=device, help="cpu or cuda (default here: %(default)s)")
    parser.add_argument("--kernel", help="a kernel, or auto (default on a GPU; elsewhere reference)")
    parser.add_argument("--precision", default="fast", help="fast, balanced or accurate")
    parser.add_argument(
        "--tokens", type=int, default=256, help="length to export with; other lengths run too"
    )
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = sage_inductor.Config(
        kernel=args.kernel or ("auto" if on_gpu else "reference"), precision=args.precision
    )
    torch.manual_seed(0)
    model = Block().to(args.device, dtype).eval()
    example = torch.randn(2, args.tokens, 128, device=args.device, dtype=dtype)
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        return run(model, example, config, args.folder or Path(temporary))


def run(model: nn.Module, example: Tensor, config: sage_inductor.Config, folder: Path) -> dict[str, float]:
    length = torch.export.Dim("length", min=2, max=65536)
    exported = torch.export.export(model, (example,), dynamic_shapes={"x": {1: length}})
    rewritten = sage_inductor.rewrite_exported(exported, config)
    ours = torch.ops.sage_inductor.attention.default
    print(f"attention operators: {count(exported, ours)} exported, {count(rewritten, ours)} rewritten")
    if not count(rewritten, ours):
        print(f"nothing to show here: kernel={config.kernel} takes none; --kernel reference runs everywhere")

    path = folder / "model.pt2"
    torch.export.save(rewritten, path)
    loaded = torch.export.load(path)
    print(f"saved and loaded: {path.stat().st_size:,} bytes")

    package = torch._inductor.aoti_compile_and_package(rewritten, package_path=str(folder / "aoti.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    print(f"compiled ahead of time: {Path(package).stat().st_size:,} bytes")

    errors = {}
    for tokens in (example.shape[1], 100):  # one graph, any length
        x = torch.randn_like(example[:, :1].expand(-1, tokens, -1))
        expected = model(x).double()
        for name, call in (
            ("exported, rewritten", rewritten.module()),
            ("saved and loaded", loaded.module()),
            ("AOTInductor", compiled),
        ):
            error = ((call(x).double() - expected).norm() / expected.norm()).item()
            errors[f"{name}, {tokens} tokens"] = error
            print(f"{name + ',':22}{tokens:6} tokens: relative L2 error against eager {error:.5f}")
    return errors


def count(program: torch.export.ExportedProgram, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


if __name__ == "__main__":
    main()
