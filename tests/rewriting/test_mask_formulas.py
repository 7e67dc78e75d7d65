"""Formulas of masks: what is simplified away, and dtypes that do not hold the positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor import Config
from sage_inductor.rewriting.masks.algebra import at_least, both, either, negated, subtract
from sage_inductor.rewriting.masks.formula import FALSE, KEY, QUERY, TRUE, Linear, variable
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.testing import RewritingBackend, max_error, relative_l2

CONFIG = Config(kernel="reference", precision="accurate")
RANGES = Ranges({QUERY: 13, KEY: 30})
Q, K = variable(QUERY), variable(KEY)
CAUSAL = at_least(Q, K)


def number(value: int) -> Linear:
    return Linear(constant=value)


def test_what_never_holds_leaves_nothing_of_a_conjunction() -> None:
    never = at_least(Q, number(13))
    assert RANGES.simplified(both(CAUSAL, never)) == FALSE
    assert RANGES.simplified(either(CAUSAL, never)) == CAUSAL
    assert RANGES.simplified(either(CAUSAL, negated(never))) == TRUE


def test_one_of_two_bounds_counts() -> None:
    further = at_least(subtract(Q, K), number(-3))
    assert both(CAUSAL, further) == CAUSAL and either(CAUSAL, further) == further
    first = at_least(number(5), K)  # k <= 5 implies k <= q + 5, whatever the query
    within = at_least(subtract(Q, K), number(-5))
    assert RANGES.simplified(either(first, within)) == within


def test_what_excludes_one_another() -> None:
    assert both(CAUSAL, negated(CAUSAL)) == FALSE and either(CAUSAL, negated(CAUSAL)) == TRUE
    assert both(at_least(Q, K), at_least(K, subtract(Q, number(-1)))) == FALSE
    seen = at_least(number(9), K)
    assert both(CAUSAL, either(negated(CAUSAL), seen)) == both(CAUSAL, seen)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda n: torch.arange(n, dtype=torch.float32), "causal"),
        (lambda n: torch.arange(n, dtype=torch.float16), "causal"),
        (lambda n: torch.arange(n).to(torch.bfloat16), "bool"),  # 257 is 256
        (lambda n: torch.arange(n) // 2, "bool"),
        (lambda n: torch.arange(n).to(torch.int16) * 100, "causal"),
        (lambda n: torch.arange(n).to(torch.int16) * 200, "bool"),  # beyond 32,767
        (lambda n: (torch.arange(n) - 3).to(torch.uint8), "bool"),  # -1 is 255
    ],
)
def test_dtypes_that_do_not_hold_the_positions(make: Callable[[int], Tensor], kind: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = make(300)
        return F.scaled_dot_product_attention(q, k, v, at[None] <= at[:, None])

    torch.compiler.reset()
    given = [torch.randn(1, 1, 300, 16) for _ in range(3)]
    backend = RewritingBackend(CONFIG)
    out = torch.compile(attend, backend=backend)(*given)
    exact = attend(*(tensor.double() for tensor in given))
    assert [site.mask for site in backend.sites] == [kind]
    assert relative_l2(out, exact) < 0.02 and max_error(out, exact) < 0.06
