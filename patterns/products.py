"""Matrix products in every spelling, as attention reads them: scores of queries and keys, weights times values.

matmul, bmm, baddbmm and einsum are all read as an einsum of two operands with a letter for each dim: `q @ k.mT` is
`abxy,abzy->abxz`. The dims of scores and weights may stand in any order; an `Order` (axes.py) says which are which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.patterns.axes import Order, untransposed
from sage_inductor.patterns.nodes import BADDBMM, EINSUM, MATMUL, argument, shape_of
from sage_inductor.patterns.numbers import is_symbol, number

Methods: TypeAlias = tuple[tuple[str, tuple[Any, ...]], ...]
# Methods, "mul" or "div", by numbers that are not known while compiling.
Symbols: TypeAlias = tuple[tuple[str, fx.Node], ...]


@dataclass(frozen=True)
class Scores:
    """`scale * symbols * query @ key^T + bias`.

    query is `[*batch, queries, dim]`. key is `[*batch, keys, dim]`, with a dim of 1 where it lacks one, as for heads that
    share it. bias broadcasts to the node as it is.
    """

    query: Value
    key: Value
    scale: float
    bias: Value | None
    symbols: Symbols = ()


@dataclass(frozen=True)
class WeightedSum:
    """`weights @ value`.

    The dims of `weights`, taken in `order`, are `[*batch, queries, keys]`. `value` is `[*batch, keys, dim]`, with a dim of 1
    where it lacks one. `restore` turns `[*batch, queries, dim]` into the value of the node; `undo` turns it back.
    """

    weights: fx.Node
    order: Order
    value: Value
    restore: Methods
    undo: Methods


def scores(node: Any, order: Order) -> Scores | None:
    """`node` as scores, its dims taken in `order`. None where it is no product, or not one of queries and keys in that order."""
    read = _product(node)
    if read is None or len(order) != len(read.output):
        return None
    *batch, row, column = (read.output[dim] for dim in order)
    for query, key in (read.operands, read.operands[::-1]):
        inner = [letter for letter in query.letters if letter in key.letters and letter not in read.output]
        if len(inner) != 1 or column in query.letters or row in key.letters:
            continue
        if query.has({*batch, row, *inner}) and key.has({column, *inner}, batch):
            left, right = query.aligned([*batch, row, *inner]), key.aligned([*batch, column, *inner])
            return Scores(left, right, read.scale, read.bias, read.symbols)
    return None


def weighted_sums(node: Any) -> Iterator[WeightedSum]:
    """`node` as weights times values, with either of its operands as the weights."""
    read = _product(node)
    if read is None or read.bias is not None or read.scale != 1.0 or read.symbols:
        return
    for weights, value in (read.operands, read.operands[::-1]):
        shared = [letter for letter in read.output if letter in weights.letters and letter in value.letters]
        rows = [letter for letter in weights.letters if letter in read.output and letter not in shared]
        columns = [letter for letter in value.letters if letter in read.output and letter not in shared]
        keys = [letter for letter in weights.letters if letter in value.letters and letter not in shared]
        if not rows or len(columns) != 1 or len(keys) != 1:
            continue
        if not weights.has({*shared, *rows, *keys}) or not value.has({*shared, *keys, *columns}):
            continue
        row = _queries(weights, rows)
        batch = [
            *shared,
            *(letter for letter in rows if letter != row),
        ]  # grouped heads behind those of the keys
        produced = [*batch, row, *columns]
        restore, undo = _reordering(produced, read.output)
        order = tuple(weights.letters.index(letter) for letter in (*batch, row, *keys))
        yield WeightedSum(weights.node, order, value.aligned([*batch, *keys, *columns]), restore, undo)


def is_product(node: Any, broadcast: bool = False) -> bool:
    """Whether `node` is a batched matrix product; with `broadcast` also of operands that lack dims of each other, as
    the keys of grouped heads do."""
    read = _product(node)
    if read is None:
        return node in MATMUL
    return broadcast or len(read.operands[0].letters) == len(read.operands[1].letters) == len(read.output)


@dataclass(frozen=True)
class _Operand:
    """A tensor and a letter for each of its dims."""

    node: fx.Node
    letters: str

    def has(self, required: set[str], optional: Iterable[str] = ()) -> bool:
        return required <= set(self.letters) <= {*required, *optional}

    def aligned(self, wanted: list[str]) -> Value:
        """The tensor with its dims in the order `wanted`, and a dim of 1 for each letter that it lacks."""
        present = [letter for letter in wanted if letter in self.letters]
        dims = [self.letters.index(letter) for letter in present]
        rank = len(dims)
        result: Value = self.node
        if dims == [*range(rank - 2), rank - 1, rank - 2]:
            result = untransposed(self.node)
        elif dims != list(range(rank)):
            result = Expr.of("permute", self.node, *dims)
        for position, letter in enumerate(wanted):
            if letter not in present:
                result = Expr.of("unsqueeze", result, position)
        return result


@dataclass(frozen=True)
class _Product:
    """`scale * symbols * einsum(operands -> output) + bias`."""

    operands: tuple[_Operand, _Operand]
    output: str
    scale: float = 1.0
    bias: Value | None = None
    symbols: Symbols = ()


def _product(node: Any) -> _Product | None:
    if node in MATMUL:
        return _of_rows(argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2")))
    if node in BADDBMM:
        return _baddbmm(node)
    return _einsum(node) if node in EINSUM else None


def _of_rows(
    left: Any, right: Any, scale: float = 1.0, bias: Value | None = None, symbols: Symbols = ()
) -> _Product | None:
    """`scale * symbols * left @ right + bias`."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    rank = len(shape_of(left))
    if rank != len(shape_of(right)) or not 2 <= rank <= 22:
        return None
    batch = "abcdefghijklmnopqrst"[: rank - 2]
    return _Product(
        (_Operand(left, batch + "xy"), _Operand(right, batch + "yz")), batch + "xz", scale, bias, symbols
    )


def _baddbmm(node: fx.Node) -> _Product | None:
    named = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | node.kwargs
    bias, left, right = (named.get(name) for name in ("input", "batch1", "batch2"))
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    if not isinstance(bias, fx.Node):
        return None
    symbols: Symbols = (("mul", alpha),) if is_symbol(alpha) else ()
    scale, kept = 1.0 if symbols else number(alpha), number(beta)
    if scale is None or (kept is None and not is_symbol(beta)):
        return None
    term: Value | None = None if kept == 0 else bias if kept == 1 else Expr.of("mul", bias, beta)
    if term is not None and kept is None:  # where it comes to 0, `bias`, which may hold NaN, is not even read
        factor = Expr.of(torch.full_like, bias, beta)
        term = Expr.of(torch.where, Expr.of("ne", factor, 0), term, 0.0)
    return _of_rows(left, right, scale, term, symbols)


def _einsum(node: fx.Node) -> _Product | None:
    equation, *rest = node.args
    listed = len(rest) == 1 and isinstance(rest[0], (tuple, list))
    operands: list[Any] = list(rest[0]) if listed else rest  # type: ignore[arg-type]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    equation = equation.replace(" ", "")
    if "..." in equation:
        equation = _without_ellipsis(equation, operands) or ""
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    if not output or any(len(set(letters)) != len(letters) for letters in (first, second, output)):
        return None
    return _Product((_Operand(operands[0], first), _Operand(operands[1], second)), output)


def _without_ellipsis(equation: str, operands: list[Any]) -> str | None:
    """`equation` with letters for `...`, where it stands for the same number of dims in every operand."""
    inputs = equation.partition("->")[0].split(",")
    tensors = [example_tensor(operand) for operand in operands]
    counts = {
        tensor.dim() - len(letters.replace("...", ""))
        for letters, tensor in zip(inputs, tensors, strict=False)
        if tensor is not None and "..." in letters
    }
    if equation.count("...") != 3 or len(counts) != 1 or None in tensors:
        return None
    unused = [letter for letter in "ABCDEFGH" if letter not in equation]
    return equation.replace("...", "".join(unused[: counts.pop()]))


def _queries(weights: _Operand, rows: list[str]) -> str:
    """The dim of the queries among `rows`, the dims of the weights that value lacks; the others are heads that share it.

    It is the last of them, unless heads stand behind the queries (`bqhk`). The longest one is taken then. Either choice
    gives the right result; this one makes better tiles.
    """
    sizes = dict(zip(weights.letters, shape_of(weights.node), strict=True))
    known = all(isinstance(sizes[letter], int) for letter in rows)
    if not known or sizes[rows[-1]] == 1:
        return rows[-1]
    return max(reversed(rows), key=lambda letter: sizes[letter])


def _reordering(produced: list[str], output: str) -> tuple[Methods, Methods]:
    """The steps that turn dims `produced` into dims `output`, and those that turn them back."""
    if list(output) == produced:
        return (), ()
    order = tuple(produced.index(letter) for letter in output)
    inverse = tuple(output.index(letter) for letter in produced)
    return (("permute", (order,)),), (("permute", (inverse,)),)
