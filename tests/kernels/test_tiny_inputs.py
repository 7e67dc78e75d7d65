"""Numbers at the bottom of float32's range: a factor of theirs must not become 0, which would make 0 / 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sage_inductor import sage_attention
from sage_inductor.kernels import PRECISIONS
from sage_inductor.measurement.metrics import relative_l2

# (query, key and value are about this large, scale): everything but value is so small that weights are equal.
TINY = {
    "key": (1.0, 1e-44, 1.0, None),
    "key, the smallest number": (1.0, 1.4e-45, 1.0, None),
    "query": (1e-44, 1.0, 1.0, None),
    "scale": (1.0, 1.0, 1.0, 1e-45),
    "negative scale": (1.0, 1.0, 1.0, -1e-45),
    "query and key": (1e-44, 1e-44, 1.0, None),
}


# The interpreter is slow: one case shows that the triton kernel has a floor, too.
@pytest.mark.parametrize(
    ("kernel", "case"), [*(("reference", case) for case in TINY), ("triton", "key"), ("triton", "scale")]
)
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_finite_and_right(kernel: str, precision: str, case: str, inference: None) -> None:
    q_size, k_size, v_size, scale = TINY[case]
    device = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
    query, key, value = (
        torch.randn(1, 2, 130, 32, device=device) * size for size in (q_size, k_size, v_size)
    )
    out, lse = sage_attention(
        query, key, value, scale=scale, kernel=kernel, precision=precision, return_lse=True
    )
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
    # Equal weights over 130 keys; the error of PV alone is within the precision's documented one.
    assert relative_l2(out, exact) < {"fast": 0.04, "balanced": 0.021, "accurate": 0.013}[precision]
    assert torch.allclose(lse, torch.full_like(lse, 130.0).log(), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-20])
def test_scale_meets_its_counterpart_in_the_other_operand(scale: float, inference: None) -> None:
    """scale * query is out of the range that is quantised well; scale * query @ key is about 1."""
    query, key, value = (
        torch.randn(1, 1, 64, 32),
        torch.randn(1, 1, 64, 32) / scale,
        torch.randn(1, 1, 64, 32),
    )
    out = sage_attention(query, key, value, scale=scale, kernel="reference", precision="accurate")
    assert isinstance(out, torch.Tensor)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
    assert relative_l2(out, exact) < 0.05  # scores of about sqrt(32), by which INT8's error in them counts
