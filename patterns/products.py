"""Matrix products in every spelling, as `[..., rows, inner] @ [..., inner, columns]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sage_inductor.call import Expr, Value, example_tensor
from sage_inductor.patterns.nodes import BADDBMM, EINSUM, MATMUL, PERMUTE, TRANSPOSE, argument, only_reader


@dataclass(frozen=True)
class Product:
    """`scale * left @ right + bias`, and what it takes to get the node's value back from matmul's order."""

    left: Value
    right: Value
    scale: float = 1.0
    bias: Value | None = None
    restore: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    undo: tuple[tuple[str, tuple[Any, ...]], ...] = ()


def product(node: Any) -> Product | None:
    """The product that `node` is; None when it is none."""
    if node in MATMUL:
        left, right = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        return Product(left, right)
    if node in BADDBMM:
        return _baddbmm(node)
    if node in EINSUM:
        return _einsum(node)
    return None


def _baddbmm(node: fx.Node) -> Product | None:
    named = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | node.kwargs
    bias, left, right = (named.get(name) for name in ("input", "batch1", "batch2"))
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    if not all(isinstance(item, fx.Node) for item in (bias, left, right)):
        return None
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    assert isinstance(bias, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    term: Value | None = None if beta == 0 else bias if beta == 1 else Expr.of("mul", bias, beta)
    return Product(left, right, float(alpha), term)


def _einsum(node: fx.Node) -> Product | None:
    """An einsum of two operands that is a batched matrix product, its operands permuted into matmul's order."""
    read = _letters(node)
    if read is None:
        return None
    operands, first, second, output = read
    batch, inner, rows, columns = _roles(first, second, output)
    if not len(inner) == len(rows) == len(columns) == 1:
        return None
    if not len(first) == len(second) == len(output) == len(batch) + 2:
        return None
    if output.index(rows[0]) > output.index(columns[0]):  # "bjd,bid->bij" is the second times the first
        operands, first, second, rows, columns = operands[::-1], second, first, columns, rows
    left = _permuted(operands[0], first, [*batch, *rows, *inner])
    right = _permuted(operands[1], second, [*batch, *inner, *columns])
    return _ordered(left, right, [*batch, *rows, *columns], output)


def of_one_head(node: Any, scores: bool) -> Product | None:
    """An einsum of an operand with heads and one without, as multi-query attention has it: "bhid,bjd->bhij" for the
    scores, "bhij,bjd->bhid" for what the weights read. The second gets a head of its own, which broadcasts."""
    read = _letters(node) if node in EINSUM else None
    if read is None:
        return None
    operands, first, second, output = read
    if len(first) < len(second):
        operands, first, second = operands[::-1], second, first
    batch, inner, rows, columns = _roles(first, second, output)
    if not (
        len(inner) == len(columns) == 1 and len(rows) == 2 and len(output) == len(first) == len(batch) + 3
    ):
        return None
    # Which of the two is the heads is in the order of the scores and weights: [..., heads, queries, keys].
    rows.sort(key=(output if scores else first).index)
    left = _permuted(operands[0], first, [*batch, *rows, *inner])
    right = Expr.of("unsqueeze", _permuted(operands[1], second, [*batch, *inner, *columns]), len(batch))
    return _ordered(left, right, [*batch, *rows, *columns], output)


def _letters(node: fx.Node) -> tuple[list[Any], str, str, str] | None:
    """(operands, letters of the first, of the second, of the output) of an einsum of two operands."""
    equation, *rest = node.args
    listed = len(rest) == 1 and isinstance(rest[0], (tuple, list))
    operands: list[Any] = list(rest[0]) if listed else rest  # type: ignore[arg-type]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    equation = equation.replace(" ", "")
    if "..." in equation:
        equation = _without_ellipsis(equation, operands) or ""
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    if not output or any(len(set(letters)) != len(letters) for letters in (first, second, output)):
        return None
    return operands, first, second, output


def _roles(first: str, second: str, output: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """The letters of batch, inner, rows (of the first operand) and columns (of the second)."""
    return (
        [letter for letter in output if letter in first and letter in second],
        [letter for letter in first if letter in second and letter not in output],
        [letter for letter in output if letter in first and letter not in second],
        [letter for letter in output if letter in second and letter not in first],
    )


def _ordered(left: Value, right: Value, produced: list[str], output: str) -> Product:
    if list(output) == produced:
        return Product(left, right)
    order = [produced.index(letter) for letter in output]
    inverse = [list(output).index(letter) for letter in produced]
    return Product(left, right, restore=(("permute", tuple(order)),), undo=(("permute", tuple(inverse)),))


def _without_ellipsis(equation: str, operands: list[Any]) -> str | None:
    """`equation` with letters for `...`, where it stands for the same number of dims in every operand."""
    inputs = equation.partition("->")[0].split(",")
    tensors = [example_tensor(operand) if isinstance(operand, fx.Node) else None for operand in operands]
    counts = {
        tensor.dim() - len(letters.replace("...", ""))
        for letters, tensor in zip(inputs, tensors, strict=False)
        if tensor is not None and "..." in letters
    }
    if equation.count("...") != 3 or len(counts) != 1 or None in tensors:
        return None
    unused = [letter for letter in "ABCDEFGH" if letter not in equation]
    return equation.replace("...", "".join(unused[: counts.pop()]))


def _permuted(operand: fx.Node, letters: str, order: list[str]) -> Value:
    dims = [letters.index(letter) for letter in order]
    return operand if dims == list(range(len(dims))) else Expr.of("permute", operand, *dims)


def transposed(item: Any) -> fx.Node | None:
    """x where `item` is x with its last two dims swapped."""
    tensor = example_tensor(item) if isinstance(item, fx.Node) else None
    source = argument(item, 0, "input") if tensor is not None else None
    if tensor is None or tensor.dim() < 2 or not isinstance(source, fx.Node):
        return None
    dims, last_two = tensor.dim(), [tensor.dim() - 2, tensor.dim() - 1]
    if item in TRANSPOSE:
        swapped = [argument(item, 1, "dim0"), argument(item, 2, "dim1")]
        known = all(isinstance(dim, int) for dim in swapped)
        return source if known and sorted(dim % dims for dim in swapped) == last_two else None
    if item in PERMUTE:
        order = item.args[1] if isinstance(item.args[1], (tuple, list)) else item.args[1:]
        normal = [dim % dims for dim in order if isinstance(dim, int)]
        return source if normal == [*range(dims - 2), dims - 1, dims - 2] else None
    is_property = item.target is getattr and item.args[1] in ("mT", "T")
    return source if is_property and (item.args[1] == "mT" or dims == 2) else None


def untransposed(item: Value) -> Value:
    """`[..., inner, columns]` as `[..., columns, inner]`: the node before a transpose where there is one."""
    source = transposed(item)
    return Expr.of("transpose", item, -2, -1) if source is None else source


def mirrored(node: fx.Node, outer: Product) -> tuple[Product, fx.Node] | None:
    """`left @ right^T`, which `node` is, as `(right @ left^T)^T`: weights that stand transposed on the right. With the
    node by which the product reads them."""
    right = outer.right
    source = transposed(right) if isinstance(right, fx.Node) else _permuted_back(right)
    reader = right if isinstance(right, fx.Node) else node
    if source is None or (reader is not node and not only_reader(reader, node)):
        return None
    swap = (("transpose", (-2, -1)), ("contiguous", ()))  # matmul's output is contiguous either way
    restore, undo = swap + outer.restore, outer.undo + swap
    other = Product(source, untransposed(outer.left), outer.scale, outer.bias, restore=restore, undo=undo)
    return other, reader


def _permuted_back(item: Expr) -> fx.Node | None:
    """x where `item` is x with its last two dims swapped, as an einsum reads it: "bts,bcs->bct" is v @ weights.mT."""
    dims = len(item.args) - 1
    swapped = item.target == "permute" and item.args[1:] == (*range(dims - 2), dims - 1, dims - 2)
    return item.args[0] if swapped and isinstance(item.args[0], fx.Node) else None
