"""Memory that all ranks of a host can write: torch's symmetric memory (torch.distributed._symmetric_memory, 2.11 to 2.13)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_available() -> bool:
    """Whether this torch has it, for CUDA. Imports nothing that is not imported."""
    return torch.distributed.is_available() and hasattr(torch._C._distributed_c10d, "_SymmetricMemory")


def shared_bytes(size: int, device: torch.device, group_name: str) -> tuple[Tensor, list[int]]:
    """`size` bytes of this rank that its group can write, as uint8 `[size]`, and the addresses at which this rank reaches those of
    each rank. All ranks of the group have to ask for as many at the same time.

    Raises:
        RuntimeError: the ranks are on several hosts, or their GPUs do not reach each other.
    """
    import torch.distributed._symmetric_memory as symmetric

    memory: Tensor = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(memory, group_name)  # type: ignore[arg-type, attr-defined, unused-ignore]
    return memory, list(handle.buffer_ptrs)


def group_named(name: str) -> torch.distributed.ProcessGroup:
    """The process group that has this name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined, unused-ignore]
