"""Names that hold control sequences or newlines: logs and warnings show them, and obey none."""

from __future__ import annotations

import io
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_inductor
from sage_inductor import Config, NotEligibleError
from sage_inductor.plan.plan import Plan
from sage_inductor.rewriting.driver import rewrite_graph
from sage_inductor.testing import RewritingBackend

pytestmark = pytest.mark.usefixtures("inference")
NAME = "a\x1b]0;title\x07b\nWARNING: forged"
SHOWN = r"a\x1b]0;title\x07b\nWARNING: forged"


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).tanh().softmax(-1) @ x


def model(inner: nn.Module) -> nn.Module:
    outer = nn.Sequential()
    outer.add_module(NAME, inner)
    return outer.eval()


X = torch.randn(1, 2, 16, 16)


def written(config: Config) -> str:
    """What a handler of the package's loggers, and warnings, write while a model is compiled."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    log = logging.getLogger("sage_inductor")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile(model(Attention()), backend=RewritingBackend(config))(X)
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    return out.getvalue() + "".join(f"{item.message}\n" for item in caught)


@pytest.mark.parametrize(
    "config",
    [
        Config(kernel="reference"),
        Config(fallback="warn"),
        Config(kernel="reference", exclude=("\x1b[31m*.x",)),
        Config(kernel="reference", plan=Plan("rel_l2", 0.05, (), ())),
    ],
    ids=["rewritten", "left", "unmatched", "no plan"],
)
def test_a_log_holds_no_control_characters(config: Config) -> None:
    text = written(config)
    assert SHOWN in text
    assert "\x1b" not in text and "\x07" not in text and "\nWARNING: forged" not in text


def test_an_error_holds_none() -> None:
    graph = torch.fx.symbolic_trace(model(Attention())).graph
    with pytest.raises(NotEligibleError) as error:
        rewrite_graph(graph, Config(fallback="error"))
    assert SHOWN in str(error.value) and "\x1b" not in str(error.value)


def test_nor_do_records_of_what_is_no_site() -> None:
    report = sage_inductor.explain(model(ByHand()), X)
    assert [str(item).partition(" at ")[0] for item in report.unread] == [SHOWN]
