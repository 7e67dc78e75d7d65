"""One transformer block, compiled with 8-bit attention: what is replaced and why, how far off, how fast.

    python examples/quickstart.py

Runs on any machine. With an NVIDIA GPU it takes the fastest kernel that can run; elsewhere the reference
kernel, which defines the results and is much slower than plain attention.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Causal self-attention, cross-attention to padded text, and a summary of it all by one learned query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads)
        self.summary = Attention(dim, heads)
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, text: Tensor, is_token: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attention(normed, normed, is_causal=True)
        x = x + self.cross_attention(self.norm2(x), text, mask=is_token[:, None, None, :])
        x = x + self.mlp(self.norm3(x))
        return x + self.summary(self.query.expand(len(x), 1, -1), x)


def make_model(
    device: str | None = None, tokens: int | None = None, heads: int = 4
) -> tuple[Block, tuple[Tensor, Tensor, Tensor]]:
    """The model and its inputs; `python -m sage_inductor explain examples/quickstart.py:make_model` takes them too."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    dim, tokens = 64 * heads, tokens or (16384 if on_gpu else 512)
    model = Block(dim, heads).to(device, dtype).eval()
    x, text = (torch.randn(2, length, dim, device=device, dtype=dtype) for length in (tokens, 77))
    is_token = torch.arange(77, device=device) < torch.tensor([[77], [20]], device=device)
    return model, (x, text, is_token)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the figures it prints: sites rewritten and refused, milliseconds, errors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default=device, help="cpu or cuda (default here: %(default)s)")
    parser.add_argument(
        "--kernel", help="auto (default on a GPU), or " + ", ".join(sage_inductor.kernels.KERNELS)
    )
    parser.add_argument("--precision", default="fast", help="fast, balanced or accurate")
    parser.add_argument("--tokens", type=int, help="sequence length (default: 16384 on a GPU, 512 elsewhere)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of 64 channels")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    kernel = args.kernel or ("auto" if on_gpu else "reference")
    model, inputs = make_model(args.device, args.tokens, args.heads)

    for name, reasons in sage_inductor.kernels.available(args.device).items():
        print(f"kernel {name}: {'; '.join(reasons) or 'can run'}")
    config = sage_inductor.Config(kernel=kernel, precision=args.precision)
    options = {"sage.kernel": kernel, "sage.precision": args.precision}
    with torch.no_grad():
        report = sage_inductor.explain(model, *inputs, config=config)
        print(f"\n{report}\n")
        plain = torch.compile(model)
        compiled = torch.compile(model, backend="sage_inductor", options=options)
        expected, output = plain(*inputs), compiled(*inputs)
        plain_ms = milliseconds(lambda: plain(*inputs), args.repeat, on_gpu)
        ms = milliseconds(lambda: compiled(*inputs), args.repeat, on_gpu)

    difference = output.double() - expected.double()
    error = (difference.norm() / expected.double().norm()).item()
    max_error = (difference.abs().max() / expected.double().abs().max()).item()
    print("against plain torch.compile:")
    print(f"  relative L2 error {error:.5f}, max error {max_error:.5f} of max |output|")
    print(f"  {ms:.2f} ms a call, plain {plain_ms:.2f} ms")
    if kernel == "reference":
        print(
            "The reference kernel is the oracle that faster kernels are checked with: right on every device,"
        )
        print("and slow. On a GPU, kernel=auto takes a kernel only where it expects to beat SDPA.")
    return {
        "rewritten": len(report.rewritten),
        "refused": len(report.refused),
        "graphs": report.graphs,
        "relative_l2": error,
        "max_error": max_error,
        "plain_ms": plain_ms,
        "ms": ms,
    }


def milliseconds(call: Callable[[], Tensor], repeat: int, on_gpu: bool) -> float:
    """The median time of `call`, which has run before."""
    times = []
    for _ in range(repeat):
        if on_gpu:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


if __name__ == "__main__":
    main()
