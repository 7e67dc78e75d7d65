"""The memory layout of inputs in a report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sage_inductor.report.site import layout_of

HND = torch.empty(2, 4, 8, 16)
NHD = torch.empty(2, 8, 4, 16).transpose(1, 2)


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (HND, "HND"),
        (NHD, "NHD"),
        (HND[0], "HND"),
        (NHD[0], "NHD"),
        (HND.flatten(0, 1), "HND"),
        (HND[0, 0], "HND"),
        (NHD[0, 0], "HND"),
        (HND.mT, "strides (512, 128, 1, 16)"),
        (HND[0].mT, "strides (128, 1, 16)"),
        (HND[0, 0].mT, "strides (1, 16)"),
        (NHD[0].mT, "strides (16, 1, 64)"),
        (HND[..., ::2], "strides (512, 128, 16, 2)"),
        (HND[None], "strides (1024, 512, 128, 16, 1)"),
        (HND[0, 0, 0], "strides (1,)"),
    ],
)
def test_the_layout_is_that_of_the_memory(tensor: Tensor, layout: str) -> None:
    assert layout_of(tensor) == layout
