"""`fallback="error"` and "warn" are about sites that were meant to be rewritten, not those left out on purpose."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, NotEligibleError, explain, rewrite_exported
from sage_inductor.testing import RewritingBackend

pytestmark = pytest.mark.usefixtures("inference")


class Attention(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return F.scaled_dot_product_attention(x, x, x).float()


class Model(nn.Module):
    """attn1 can be rewritten, attn2 (float64) cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(torch.float32), Attention(torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn2(self.attn1(x))  # type: ignore[no-any-return]


X = torch.randn(1, 2, 32, 16)
LEFT_OUT = [{"exclude": ("attn2",)}, {"exclude": ("*2",)}, {"include": ("attn1",)}, {"exclude": ("attn*",)}]


@pytest.mark.parametrize("selection", LEFT_OUT)
def test_what_is_left_out_on_purpose_is_no_error(selection: dict[str, tuple[str, ...]]) -> None:
    config = Config(kernel="reference", fallback="error", **selection)  # type: ignore[arg-type]
    model, rewritten = Model(), selection != {"exclude": ("attn*",)}
    backend = RewritingBackend(config)
    torch.compile(model, backend=backend)(X)
    assert [site.rewritten for site in backend.sites] == [rewritten, False]
    assert [site.rewritten for site in explain(model, X, config=config).sites] == [rewritten, False]
    program = rewrite_exported(torch.export.export(model, (X,)), config)
    assert ("sage_inductor.attention" in str(program.graph)) == rewritten


@pytest.mark.parametrize(
    "selection", [{}, {"exclude": ("attn1",)}, {"include": ("attn*",)}, {"include": ("attn2",)}]
)
def test_what_cannot_be_rewritten_is_one(selection: dict[str, tuple[str, ...]]) -> None:
    config = Config(kernel="reference", fallback="error", **selection)  # type: ignore[arg-type]
    with pytest.raises(NotEligibleError, match="dtype=float64") as raised:
        explain(Model(), X, config=config)
    assert "attn1" not in str(raised.value)


def test_warnings_likewise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        backend = RewritingBackend(Config(kernel="reference", fallback="warn", exclude=("attn2",)))
        torch.compile(Model(), backend=backend)(X)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="attn2"):
        torch.compile(Model(), backend=RewritingBackend(Config(kernel="reference", fallback="warn")))(X)
