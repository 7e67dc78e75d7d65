"""Whether the operators are given DTensors. Every call asks, so nothing here imports torch.distributed.tensor in vain."""

from __future__ import annotations

from sage_inductor.torch_internals.distributed import is_dtensor

__all__ = ["are_taught", "is_dtensor"]


def are_taught() -> bool:
    """Teaches DTensor our operators, once, and returns True. Called where there are DTensors. Raises RuntimeError where this
    torch's DTensor is not as known."""
    from sage_inductor.operators.distributed.handler import register

    register()
    return True


# Dynamo calls it while tracing, and takes what it returns for a constant.
are_taught._dynamo_marked_constant = True  # type: ignore[attr-defined]
