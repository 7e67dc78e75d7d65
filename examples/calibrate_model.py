"""Find out which attentions of a model stand 8 bits: calibrate, save the plan, compile with it.

    python examples/calibrate_model.py                       # any machine
    python examples/calibrate_model.py --steps               # decisions per range of diffusion steps
    python examples/calibrate_model.py --metric output_rel_l2 --tolerance 0.002

The model is a small transformer; the queries and keys of one of its layers are 20 times as large as those of the others, so that
its scores lie far apart and their rounding decides which keys draw the weight. The plan finds that layer and keeps only it exact.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sharpen(layer: Any, factor: float = 20.0) -> None:
    with torch.no_grad():
        for parameter in (*layer.to_k.parameters(), *layer.to_q.parameters()):
            parameter *= factor


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the decisions and the errors of the model's output."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default=device, help="cpu or cuda (default here: %(default)s)")
    parser.add_argument(
        "--kernel", help="auto (default on a GPU), or " + ", ".join(sage_inductor.kernels.KERNELS)
    )
    parser.add_argument("--metric", default="rel_l2", help="what has to hold (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, help="at most, or at least (default: the metric's)")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, help="sequence length (default: 8192 on a GPU, 128 elsewhere)")
    parser.add_argument("--steps", action="store_true", help="calibrate two ranges of steps, 0-9 and 10-")
    parser.add_argument("--plan", type=Path, help="where to save the plan (default: a temporary file)")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    kernel = args.kernel or ("auto" if on_gpu else "reference")
    tokens = args.tokens or (8192 if on_gpu else 128)

    torch.manual_seed(0)
    model = Model(args.layers, dim=128, heads=2).to(args.device, torch.bfloat16 if on_gpu else torch.float32)
    model.eval()
    sharpen(model.layers[args.layers // 2])
    dtype = next(model.parameters()).dtype
    samples = [(torch.randn(1, tokens, 128, device=args.device, dtype=dtype),) for _ in range(2)]
    (x,) = samples[0]

    plan = sage_inductor.calibrate(
        model,
        {0: samples, 10: samples} if args.steps else samples,
        metric=args.metric,
        tolerance=args.tolerance,
        config=sage_inductor.Config(kernel=kernel),
        progress=lambda done, total, what: print(f"  {done}/{total} {what}", file=sys.stderr),
    )
    print(plan)
    with tempfile.TemporaryDirectory() as folder:
        path = args.plan or Path(folder) / "plan.json"
        plan.save(path)
        print(f"saved: {path}, {path.stat().st_size} bytes")
        options = {"sage.kernel": kernel, "sage.plan": str(path)}
        with torch.no_grad():
            exact = torch.compile(model)(x)
            if args.steps:
                loaded = sage_inductor.Plan.load(path)
                planned: Any = sage_inductor.compile_steps(model, loaded, options={"sage.kernel": kernel})
                planned.step = 10
            else:
                planned = torch.compile(model, backend="sage_inductor", options=options)
            fast = torch.compile(model, backend="sage_inductor", options={"sage.kernel": kernel})
            errors = {"plan": relative_l2(planned(x), exact), "fast everywhere": relative_l2(fast(x), exact)}
    for name, error in errors.items():
        print(f"{name}: relative L2 error of the model's output {error:.5f}")
    return {"decisions": plan.decisions(), "ranges": plan.ranges(), "errors": errors}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    main()
