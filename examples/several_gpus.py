"""Wan video transformer (diffusers) on several GPUs: Ulysses, a ring, or Ulysses within a ring, with 8-bit attention.

    torchrun --nproc-per-node 2 examples/several_gpus.py                            # tiny, any machine
    torchrun --nproc-per-node 4 examples/several_gpus.py --size 14B --ulysses 2 --ring 2

Ranks share each attention of one video. Ulysses gives each rank some of the heads, by all-to-alls; in a ring each rank keeps its
queries and sees the keys and values of all. Needs `pip install diffusers`; downloads nothing. benchmarks/distributed.py measures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import wan_video
from comparison import add_arguments, describe_device, in_turns
from torch import nn

import sage_inductor
from sage_inductor.integrations import diffusers as sage


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the figures that rank 0 prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(wan_video.SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--ulysses", type=int, help="ranks that share heads (default: all)")
    parser.add_argument("--ring", type=int, default=1, help="ranks that keep their queries (default: 1)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    rank, ranks, device = join(on_gpu)
    ulysses = args.ulysses or ranks // args.ring
    if ulysses * args.ring != ranks:
        parser.error(
            f"--ulysses {ulysses} --ring {args.ring} (valid: a product of {ranks}, the number of ranks)"
        )
    kernel = args.kernel[0] if args.kernel else "auto" if on_gpu else "reference"
    config = sage_inductor.Config(kernel=kernel, precision=args.precision)
    sage.register(config)

    size = wan_video.SIZES[args.size]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, inputs = wan_video.build(size, wan_video.LATENTS[size.resolution], 2, device, dtype)
    with torch.no_grad():
        model.set_attention_backend("native")
        exact = model(**inputs)[0]
        if ranks > 1:
            # A ring merges parts by their log-sum-exp, which diffusers' native backend does not give.
            model.set_attention_backend("sage_inductor" if args.ring > 1 else "native")
            spread(model, ulysses, args.ring)
        options = {"sage.kernel": kernel, "sage.precision": args.precision}
        ours = torch.compile(model, backend="sage_inductor", options=options)
        output = ours(**inputs)[0]
        milliseconds = in_turns([ours], inputs, output.device, args.repeat)[0]
    error = ((output.double() - exact.double()).norm() / exact.double().norm()).item()
    if rank == 0:
        print(f"{ranks} x {describe_device(args.device)}: Ulysses {ulysses}, ring {args.ring}")
        print(f"{milliseconds:.1f} ms; relative L2 error of the output against one exact GPU: {error:.5f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"ms": milliseconds, "relative_l2": error}


def join(on_gpu: bool) -> tuple[int, int, str]:
    """(rank, number of ranks, device) as torchrun says; one rank without it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    if ranks == 1:
        return 0, 1, "cuda" if on_gpu else "cpu"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        torch.accelerator.device_count = lambda: ranks  # a CPU counts as none, and diffusers divides by it
    return dist.get_rank(), ranks, f"cuda:{local}" if on_gpu else "cpu"


def spread(model: nn.Module, ulysses: int, ring: int, plan: dict[str, Any] | None = None) -> None:
    """Divide the attention of a diffusers model among ranks. `plan` is for models that bring none."""
    from diffusers import ContextParallelConfig

    divided: Any = model
    divided.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring), cp_plan=plan
    )


if __name__ == "__main__":
    main()
