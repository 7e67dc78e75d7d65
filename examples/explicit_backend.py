"""8-bit attention called explicitly, layer by layer, the way FastVideo's attention layer calls its backends.

    python examples/explicit_backend.py                      # any machine: the eager reference kernel
    python examples/explicit_backend.py --kernel auto --device cuda --seq-len 16384

Prints which backend would be selected here, which kernels can run, and the error of each kind of call against
float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import NotEligibleError, kernels
from sage_inductor.backends import AttentionMetadata, SageAttentionBackend, SDPABackend, get_attn_backend


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Returns `{call: {backend: relative L2 error}}`, what it prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--seq-len", type=int, default=500, help="tokens per sequence")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads, a divisor of --heads")
    parser.add_argument("--head-size", type=int, default=64, help="size of a head")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--kernel", default="reference", help="auto, or a kernel: " + ", ".join(kernels.KERNELS)
    )
    parser.add_argument("--precision", default="fast", help=", ".join(kernels.PRECISIONS))
    args = parser.parse_args(arguments)

    selected = get_attn_backend(args.head_size, torch.bfloat16)
    print(f"selected automatically for head_size={args.head_size}, bfloat16: {selected.get_name()}")
    for name, reasons in kernels.available(args.device).items():
        print(f"  kernel {name}: {'; '.join(reasons) or 'can run'}")
    try:
        get_attn_backend(args.head_size, torch.bfloat16, requested="SAGE_ATTN")
    except NotEligibleError as error:
        print(f"SAGE_ATTN by name is refused here ({len(error.reasons)} reasons)")

    errors: dict[str, dict[str, float]] = {}
    print(f"\n{'call':24}{'SAGE_ATTN':>12}{'TORCH_SDPA':>12}   relative L2 error against float64")
    with torch.no_grad():
        for call, causal, masked in (
            ("full", False, False),
            ("causal", True, False),
            ("key padding", False, True),
            ("causal, key padding", True, True),
        ):
            errors[call] = _errors(args, causal, masked)
            print(f"{call:24}" + "".join(f"{error:12.4f}" for error in errors[call].values()))
    return errors


def _errors(args: argparse.Namespace, causal: bool, masked: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def make(heads: int) -> Tensor:
        shape = (args.batch, args.seq_len, heads, args.head_size)
        return torch.randn(shape, generator=generator).to(args.device, torch.bfloat16)

    query, key, value = make(args.heads), make(args.kv_heads), make(args.kv_heads)
    padding = None  # as tokenizers make it: 1 for tokens; the sequences are shorter and shorter
    if masked:
        lengths = torch.linspace(args.seq_len, args.seq_len // 2, args.batch).long()
        padding = (torch.arange(args.seq_len) < lengths[:, None]).long().to(args.device)
    metadata = AttentionMetadata(current_timestep=0, attn_mask=padding)

    exact = _exact(query, key, value, padding, causal)
    errors = {}
    for backend, extra in (
        (SageAttentionBackend, {"kernel": args.kernel, "precision": args.precision}),
        (SDPABackend, {}),
    ):
        attention = backend.get_impl_cls()(
            num_heads=args.heads,
            head_size=args.head_size,
            causal=causal,
            softmax_scale=args.head_size**-0.5,
            num_kv_heads=args.kv_heads,
            prefix="example",
            **extra,
        )
        output = torch.empty_like(query)  # accept_output_buffer: the caller may own the output
        attention.forward(query, key, value, metadata, output=output)
        errors[backend.get_name()] = ((output.double() - exact).norm() / exact.norm()).item()
    return errors


def _exact(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool) -> Tensor:
    visible = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    mask = (visible.tril() if causal else visible)[None, None]
    if padding is not None:
        mask = mask & (padding != 0)[:, None, None]
    doubles = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*doubles, attn_mask=mask, enable_gqa=True).transpose(1, 2)


if __name__ == "__main__":
    main()
