"""Models that call `sage_attention`, or another operator of attention, already: measured around it, and told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import calibrate, explain, sage_attention
from sage_inductor.operators import inference as ops

pytestmark = pytest.mark.usefixtures("inference")


class Mixed(nn.Module):
    """SDPA, and `own` behind it."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own

    def forward(self, q: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(q, q, q)
        return self.own(x)


@torch.library.custom_op("flash_attn_stub::_flash_attn_forward", mutates_args=())
def flash(q: Tensor) -> Tensor:
    return q * 2


flash.register_fake(torch.empty_like)

OWN = {
    "sage_attention": (
        lambda x: sage_attention(x, x, x, kernel="reference"),
        "sage_inductor::attention",
    ),
    "the operator": (
        lambda x: torch.ops.sage_inductor.attention(x, x, x, kernel_name="reference"),
        "sage_inductor::attention",
    ),
    "with log-sum-exp": (
        lambda x: torch.ops.sage_inductor.attention_lse(x, x, x, kernel_name="reference")[0],
        "sage_inductor::attention_lse",
    ),
    "another's": (lambda x: flash(x), "flash_attn_stub::_flash_attn_forward"),
    "torch's": (
        lambda x: torch.ops.aten._scaled_dot_product_attention_math(x, x, x)[0],
        "aten::_scaled_dot_product_attention_math",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_calibrate_leaves_it_alone(name: str) -> None:
    q = torch.randn(1, 2, 16, 32)
    own, _ = OWN[name]
    model = Mixed(own)
    plan = calibrate(model, (q,))
    (site,) = plan.sites
    assert site.name == "<root>" and site.measured
    assert calibrate(own, (q,)).sites == ()


@pytest.mark.parametrize("name", OWN)
def test_explain_lists_it(name: str) -> None:
    q = torch.randn(1, 2, 16, 32)
    own, operator = OWN[name]
    report = explain(own, q)
    assert [found.operator for found in report.operators] == [operator]
    assert report.operators[0].source.startswith("test_own_operator.py:")
    assert report.operators[0].is_own == operator.startswith("sage_inductor")
    assert (
        "no attention found" not in str(report) and operator in str(report) and operator in report.to_html()
    )
    mixed = explain(Mixed(own), q)
    assert len(mixed.sites) == len(mixed.operators) == 1


def test_what_is_a_site_is_not_listed_besides() -> None:
    q = torch.randn(1, 2, 16, 32)
    mha = nn.MultiheadAttention(32, 2, batch_first=True)
    for function in (
        lambda q: F.scaled_dot_product_attention(q, q, q),
        lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q),
        lambda q: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0],
        lambda q: mha(q[0], q[0], q[0])[0],
    ):
        assert explain(function, q).operators == () != explain(function, q).sites
    assert str(explain(lambda q: q + 1, q)) == "no attention found in 1 graph(s)"


def test_the_operators_that_are_meant_exist() -> None:
    assert ops.attention is torch.ops.sage_inductor.attention.default
