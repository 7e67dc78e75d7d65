"""Attention by hand whose floats are attributes of modules: symbols where the model is compiled for dynamic shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sage_inductor import Config
from sage_inductor.testing import RewritingBackend, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")


class Scaled(nn.Module):
    """Scales by numbers that are attributes, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.divisor, self.share, self.dropout = 0.3, 3.5, 0.5, nn.Dropout(0.1)
        self.temperature = nn.Parameter(torch.tensor([0.5, 1.0, 1.5])[:, None, None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        keys = k.transpose(-2, -1)
        scores = [
            q @ keys * self.scale,
            self.scale * (q @ keys) + bias,
            (q @ keys + bias) / self.divisor,
            (q @ keys + bias) * self.temperature * self.scale / self.divisor,
            torch.baddbmm(
                bias.expand(6, 40, 40), q.flatten(0, 1), keys.flatten(0, 1), beta=self.share, alpha=self.scale
            ).view(2, 3, 40, 40),
        ]
        return [self.dropout(item.softmax(-1)) @ v for item in scores]


def inputs() -> list[Tensor]:
    return [*(torch.randn(2, 3, 40, 32) for _ in range(3)), torch.randn(40, 40)]


def test_a_scale_is_found_and_another_needs_no_other_graph() -> None:
    model, backend = Scaled().eval(), RewritingBackend(CONFIG)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for scale in (0.3, 0.7):
            model.scale, values = scale, inputs()
            for found, expected in zip(compiled(*values), model(*values), strict=True):
                assert relative_l2(found, expected) < 0.025
    assert len(backend.graphs) == 1
    assert [site.rewritten for site in backend.sites] == [True] * 5


def test_active_dropout_is_refused() -> None:
    backend = RewritingBackend(CONFIG)
    with torch.no_grad():
        torch.compile(Scaled(), backend=backend, dynamic=True)(*inputs())
    assert [reason for site in backend.sites for reason in site.reasons] == [
        "dropout_p=0.1 (supported: 0.0)"
    ] * 5
