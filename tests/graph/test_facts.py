"""What the table of facts says of each operation, seen on real tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.graph import facts
from sage_inductor.graph.facts import COPIES, FACTS, IN_ORDER, PURE, RANDOM, VIEW, WRITES
from sage_inductor.torch_internals.operators import draws_random_numbers
from sage_inductor.torch_internals.traced import tensors_of

aten = torch.ops.aten
X = torch.arange(1.0, 17.0).reshape(4, 4)
Y = X.flip(0) + 0.5

# How an operation is called with a matrix and one of its shape; methods without further arguments need no entry.
CALLS: dict[str, Callable[..., Any]] = {
    "view": lambda x, y: x.view(2, 8),
    "view_as": lambda x, y: x.view_as(y),
    "reshape": lambda x, y: x.reshape(2, 8),
    "reshape_as": lambda x, y: x.reshape_as(y),
    "_unsafe_view": lambda x, y: aten._unsafe_view(x, [2, 8]),
    "unflatten": lambda x, y: x.unflatten(0, (2, 2)),
    "unsqueeze": lambda x, y: x.unsqueeze(1),
    "alias": lambda x, y: aten.alias(x),
    "expand": lambda x, y: x.expand(3, 4, 4),
    "expand_as": lambda x, y: x.expand_as(y[None]),
    "broadcast_to": lambda x, y: x.broadcast_to(3, 4, 4),
    "transpose": lambda x, y: x.transpose(0, 1),
    "swapaxes": lambda x, y: x.swapaxes(0, 1),
    "swapdims": lambda x, y: x.swapdims(0, 1),
    "permute": lambda x, y: x.permute(1, 0),
    "movedim": lambda x, y: x.movedim(0, 1),
    "moveaxis": lambda x, y: x.moveaxis(0, 1),
    "mT": lambda x, y: aten.mT(x),
    "mH": lambda x, y: aten.mH(x),
    "numpy_T": lambda x, y: aten.numpy_T(x),
    "matrix_H": lambda x, y: aten.matrix_H(x),
    "getitem": lambda x, y: operator.getitem(x, slice(1, 3)),
    "__getitem__": lambda x, y: x[1:3],
    "select": lambda x, y: x.select(0, 1),
    "narrow": lambda x, y: x.narrow(0, 1, 2),
    "slice": lambda x, y: aten.slice(x, 0, 1, 3),
    "unfold": lambda x, y: x.unfold(0, 2, 1),
    "chunk": lambda x, y: x.chunk(2),
    "split": lambda x, y: x.split(2),
    "split_with_sizes": lambda x, y: x.split_with_sizes([1, 3]),
    "tensor_split": lambda x, y: x.tensor_split(2),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, 0),
    "repeat": lambda x, y: x.repeat(2, 1),
    "to": lambda x, y: x.to(torch.float32),
    "type": lambda x, y: x.type(torch.float32),
    "type_as": lambda x, y: x.type_as(y),
    "_to_copy": lambda x, y: aten._to_copy(x),
    "getattr": lambda x, y: x.mT,
    "cuda": lambda x, y: x.cpu(),  # the same on another device
    "as_strided": lambda x, y: x.as_strided((2, 2), (4, 1)),
    "einsum": lambda x, y: torch.einsum("ij->ji", x),
    "dropout": lambda x, y: torch.dropout(x, 0.5, False),
    "where": lambda x, y: torch.where(x > 3, x, y),
    "clamp": lambda x, y: x.clamp(0.0, 5.0),
    "clamp_min": lambda x, y: x.clamp_min(2.0),
    "masked_fill": lambda x, y: x.masked_fill(y > 3, 0.0),
    "truediv": operator.truediv,
    "logsumexp": lambda x, y: x.logsumexp(-1),
    "special_logsumexp": lambda x, y: torch.special.logsumexp(x, -1),
    "softmax": lambda x, y: x.softmax(-1),
    "_softmax": lambda x, y: aten._softmax(x, -1, False),
    "_safe_softmax": lambda x, y: aten._safe_softmax(x, -1),
    "special_softmax": lambda x, y: torch.special.softmax(x, -1),
    "log_softmax": lambda x, y: x.log_softmax(-1),
    "_log_softmax": lambda x, y: aten._log_softmax(x, -1, False),
    "special_log_softmax": lambda x, y: torch.special.log_softmax(x, -1),
    "baddbmm": lambda x, y: torch.baddbmm(x[None], x[None], y[None]),
    "bmm": lambda x, y: torch.bmm(x[None], y[None]),
    "cat": lambda x, y: torch.cat([x]),
    "concat": lambda x, y: torch.concat([x]),
    "concatenate": lambda x, y: torch.concatenate([x]),
    "stack": lambda x, y: torch.stack([x]),
    "hstack": lambda x, y: torch.hstack([x]),
    "cumsum": lambda x, y: x.cumsum(0),
    "flip": lambda x, y: x.flip(0),
    "index": lambda x, y: aten.index(x, [torch.tensor([1, 0])]),
    "index_select": lambda x, y: x.index_select(0, torch.tensor([1, 0])),
    "arange": lambda x, y: torch.arange(4),
    "eye": lambda x, y: torch.eye(4),
    "tensor": lambda x, y: torch.tensor([1.0, 2.0]),
    "scalar_tensor": lambda x, y: torch.scalar_tensor(2.0),
    "pad": lambda x, y: F.pad(x, (0, 1)),
    "constant_pad_nd": lambda x, y: aten.constant_pad_nd(x, [0, 0]),
    "rsub": torch.rsub,
    "__rsub__": lambda x, y: x.__rsub__(2.0),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "clamp_max": lambda x, y: x.clamp_max(2.0),
    "full": lambda x, y: torch.full((2, 2), 3.0),
    "full_like": lambda x, y: torch.full_like(x, 3.0),
    "new_full": lambda x, y: x.new_full((2, 2), 3.0),
    "zeros": lambda x, y: torch.zeros(2, 2),
    "ones": lambda x, y: torch.ones(2, 2),
    "zeros_like": lambda x, y: torch.zeros_like(x),
    "ones_like": lambda x, y: torch.ones_like(x),
    "new_zeros": lambda x, y: x.new_zeros(2, 2),
    "new_ones": lambda x, y: x.new_ones(2, 2),
}
BINARY = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "maximum", "matmul", "mm", "gt", "ge",
    "lt", "le", "eq", "ne", "__ge__", "__gt__", "__le__", "__lt__", "__eq__", "__ne__", "__floordiv__", "__mod__", "floor_divide",
    "remainder", "minimum", "__add__", "__sub__", "__mul__", "__truediv__", "__matmul__",
)  # fmt: skip
LOGICAL = (*facts.AND, *facts.OR, *facts.XOR, *facts.NOT)


def call(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """(the arguments, the tensors of what comes out) of the operation."""
    x, y = X.clone(), Y.clone()
    if name in LOGICAL:
        x, y = x > 3, y > 5
        both = (x,) if name in facts.NOT else (x, y)
        function = getattr(operator, name, None) or getattr(torch, name, None)
        return [x, y], tensors_of(function(*both))
    if name in CALLS:
        return [x, y], tensors_of(CALLS[name](x, y))
    return [x, y], tensors_of(getattr(x, name)(*((y,) if name in BINARY else ())))


def having(*present: facts.Fact, lacking: facts.Fact = facts.NOTHING) -> list[str]:
    return [name for name, of in FACTS.items() if all(fact in of for fact in present) and not lacking & of]


def share_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", having(PURE))
def test_what_is_pure_changes_nothing_and_draws_no_numbers(name: str) -> None:
    before = torch.get_rng_state()
    (x, y), first = call(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, X if name not in LOGICAL else X > 3) and torch.equal(
        y, Y if name not in LOGICAL else Y > 5
    )
    _, second = call(name)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)) and first


@pytest.mark.parametrize("name", having(PURE, lacking=VIEW))
def test_what_is_pure_and_no_view_has_memory_of_its_own(name: str) -> None:
    (x, y), out = call(name)
    assert not any(share_memory(tensor, argument) for tensor in out for argument in (x, y))


@pytest.mark.parametrize(
    "name", sorted(set(having(VIEW)) - {"half", "bfloat16", "double", "bool", "int", "long"})
)
def test_a_view_can_lie_in_the_memory_of_the_first_argument(name: str) -> None:
    """The table is as sharp as it can be: for each there is a call of which it is true."""
    (x, _), out = call(name)
    assert all(share_memory(x, tensor) for tensor in out)


@pytest.mark.parametrize(
    "dtype", [torch.half, torch.bfloat16, torch.double, torch.bool, torch.int, torch.long]
)
def test_a_cast_to_the_dtype_that_a_tensor_has_gives_the_tensor(dtype: torch.dtype) -> None:
    name = {torch.float16: "half", torch.float64: "double", torch.int32: "int", torch.int64: "long"}.get(
        dtype
    )
    x = X.to(dtype)
    assert getattr(x, name or str(dtype).removeprefix("torch."))().data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", having(COPIES))
def test_what_copies_holds_no_other_numbers(name: str) -> None:
    (x, _), out = call(name)
    assert all(torch.isin(tensor, x).all() and tensor.dtype == x.dtype for tensor in out)


@pytest.mark.parametrize("name", having(IN_ORDER))
def test_what_is_in_order_holds_every_element_where_it_was(name: str) -> None:
    """Also of a tensor whose memory is in another order."""
    (x, _), (out,) = call(name)
    assert torch.equal(out.flatten(), x.to(out.dtype).flatten())
    if name not in ("view", "_unsafe_view"):  # they refuse
        x = X.mT
        (out,) = tensors_of(CALLS[name](x, Y) if name in CALLS else getattr(x, name)())
        assert torch.equal(out.flatten(), x.to(out.dtype).flatten())


@pytest.mark.parametrize("name", facts.BROADCASTS)
def test_what_broadcasts_repeats_the_whole(name: str) -> None:
    (x, _), (out,) = call(name)
    assert torch.equal(out, torch.stack([x] * len(out)))


@pytest.mark.parametrize("name", facts.CASTS)
def test_a_cast_rounds(name: str) -> None:
    (x, _), (out,) = call(name)
    assert out.shape == x.shape and torch.equal(out, x.to(out.dtype))


# Statements, a name that only an operator has, and what no tensor has.
NOT_CALLED = ("setitem", "delitem", "truediv_", "imatmul")


@pytest.mark.parametrize("name", sorted(set(having(WRITES)) - set(NOT_CALLED)))
def test_what_writes_overwrites_its_first_argument(name: str) -> None:
    x, y = X.clone() * 2, torch.full_like(X, 3.0)
    if name in ("iand", "ior", "ixor", "ilshift", "irshift"):
        x, y = x.int(), y.int()
    before, address = x.clone(), x.data_ptr()
    if hasattr(operator, name):
        out = getattr(operator, name)(x, y)
    else:
        arguments: dict[str, tuple[Any, ...]] = {
            "exp_": (),
            "clamp_": (5.0, 6.0),
            "clamp_min_": (5.0,),
            "masked_fill_": (x > 3, 0.0),
        }
        out = getattr(x, name)(*arguments.get(name, (y,)))
    assert out is x and x.data_ptr() == address and not torch.equal(x, before)


@pytest.mark.parametrize("name", facts.ARITHMETIC)
def test_arithmetic_in_place_gives_the_same_numbers(name: str) -> None:
    if name == "truediv":
        assert torch.equal(operator.itruediv(X.clone(), Y), operator.truediv(X, Y))
        return
    arguments = {"exp": (), "clamp": (5.0, 6.0), "clamp_min": (5.0,), "masked_fill": (X > 3, 0.0)}.get(
        name, (Y,)
    )
    x = X.clone()
    assert torch.equal(getattr(x, f"{name}_")(*arguments), getattr(X, name)(*arguments))
    if hasattr(operator, f"i{name}"):
        assert torch.equal(getattr(operator, f"i{name}")(X.clone(), *arguments), getattr(X, name)(*arguments))


RANDOM_CALLS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(9),
    "randn": lambda: torch.randn(9),
    "randint": lambda: torch.randint(99, (9,)),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 99),
    "randperm": lambda: torch.randperm(20),
    "bernoulli": lambda: torch.bernoulli(torch.full((64,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(99), 9),
    "normal": lambda: torch.normal(X, 1.0),
    "poisson": lambda: torch.poisson(X),
    "binomial": lambda: torch.binomial(X, torch.full_like(X, 0.5)),
    "native_dropout": lambda: torch.native_dropout(torch.ones(64), 0.5, True)[0],
    "alpha_dropout": lambda: F.alpha_dropout(torch.ones(64), 0.5, True),
    "feature_dropout": lambda: torch.feature_dropout(torch.ones(64, 2), 0.5, True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(torch.ones(64, 2), 0.5, True),
    "dropout1d": lambda: F.dropout1d(torch.ones(64, 2), 0.5, True),
    "dropout2d": lambda: F.dropout2d(torch.ones(2, 64, 2, 2), 0.5, True),
    "dropout3d": lambda: F.dropout3d(torch.ones(2, 64, 2, 2, 2), 0.5, True),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
}


@pytest.mark.parametrize("name", RANDOM_CALLS)
def test_what_is_random_depends_on_more_than_its_arguments(name: str) -> None:
    assert RANDOM in FACTS[name]
    assert not torch.equal(RANDOM_CALLS[name](), RANDOM_CALLS[name]())


def test_operators_that_torch_says_draw_random_numbers_are_known_without_the_table() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("bernoulli", (x,))
    assert facts.is_random(node) and not facts.is_function(node) and not facts.is_pure(node)
    assert draws_random_numbers(aten.rrelu_with_noise.default, "") and not draws_random_numbers(
        aten.add.Tensor, ""
    )
    known = {name for name, of in FACTS.items() if PURE in of and name != "dropout"}
    assert [name for name in known if draws_random_numbers(None, name)] == []


@pytest.mark.parametrize(
    ("function", "arguments", "random"),
    [
        (F.dropout, (0.5, True), True),
        (F.dropout, (0.5,), True),
        (F.dropout, (0.5, False), False),
        (F.dropout, (0.0, True), False),
        (torch.dropout, (0.5, False), False),
        (aten.dropout.default, (0.5, True), True),
        (aten.dropout.default, (0.5, False), False),
    ],
)
def test_dropout_is_random_where_it_is_on(function: Any, arguments: tuple[Any, ...], random: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(function, (graph.placeholder("x"), *arguments))
    assert facts.is_random(node) is random and facts.is_pure(node) is not random


def test_a_product_of_one_operand_may_be_a_view_and_of_two_is_none() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert not facts.is_fresh(graph.call_function(torch.einsum, ("ij->ji", x)))
    assert facts.is_fresh(graph.call_function(torch.einsum, ("ij,jk->ik", x, graph.placeholder("y"))))
    assert not share_memory(X, torch.einsum("ij,jk->ik", X, Y)) and share_memory(X, torch.einsum("ij->ji", X))


@pytest.mark.parametrize("name", [*facts.FILLS, *facts.FILLS_WITH_ARGUMENT])
def test_what_fills_has_one_number(name: str) -> None:
    module = fx.symbolic_trace(lambda x: CALLS[name](x, x))
    made = [node for node in module.graph.nodes if node.op in ("call_function", "call_method")]
    out = CALLS[name](X, Y)
    number = {"zeros": 0.0, "ones": 1.0}.get(name.removeprefix("new_").removesuffix("_like"), 3.0)
    assert bool((out == number).all())
    assert all(facts.fill(node) == number for node in made)  # torch.zeros is called while tracing


def test_functions_of_others_are_not_known_by_their_names() -> None:
    """`log`, say, may be there for what it does."""

    def view(x: Tensor) -> Tensor:
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(view, (x,))
    assert facts.operation(node) == "" and not facts.is_pure(node) and not facts.is_function(node)
    assert facts.is_view(node), "whether it writes to x is not to be overlooked"
    assert facts.operation(graph.call_function(aten.view.default, (x, [4]))) == "view"
    assert facts.operation(graph.call_function(torch.ops.prims.transpose.default, (x, [1, 0]))) == "transpose"
