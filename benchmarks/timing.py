"""The facts about the machine that every benchmark writes beside its figures; the timer is the package's."""

from __future__ import annotations

import torch

from sage_inductor.measurement.timers import median_ms, sets_beyond_l2

__all__ = ["machine", "median_ms", "sets_beyond_l2"]


def machine() -> dict[str, str]:
    """GPU ("CPU" where there is none) and library versions, as they stand in every row of results."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton_version}
