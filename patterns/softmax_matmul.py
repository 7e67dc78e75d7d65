"""Attention written out: softmax(scale * Q K^T + mask) V, in the spellings of matmul, bmm, baddbmm and einsum.

Anchored on the second matrix product, walked backwards: weights (casts, dropout that is off) to the softmax over the
last dim, logits (scale, masks, casts) to the first product. Every value on the way must have one reader: weights or
logits that anyone else sees have to exist.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_inductor.call import AttentionCall, Expr, Pattern, Value, example_tensor, example_value

aten = torch.ops.aten
# A value that masked_fill or where writes into logits hides a key when nothing that was in the row can compete with
# it: float16's most negative number and all below.
HIDES = -6e4
# What such a value becomes: finite in bfloat16 and float32, and so is the sum of two, where eager overwrites one by the
# other (kernels take both for one number); just low enough that masks.py knows it for a key that is masked out.
HIDDEN = torch.finfo(torch.float32).min / 2

MATMUL = (
    ("matmul", "bmm", "__matmul__"),
    (torch.matmul, torch.bmm, operator.matmul, aten.matmul.default, aten.bmm.default),
)
BADDBMM = ("baddbmm",), (torch.baddbmm, aten.baddbmm.default)
EINSUM = (), (torch.einsum, torch.functional.einsum)
SOFTMAX = ("softmax",), (F.softmax, torch.softmax, aten.softmax.int, aten._softmax.default)
CAST = ("float", "half", "bfloat16", "to", "type", "type_as"), (aten.to.dtype, aten._to_copy.default)
SAME = ("contiguous", "clone"), (aten.clone.default, aten.contiguous.default)
RESHAPE = ("view", "reshape"), (torch.reshape, aten.view.default, aten.reshape.default)
ADD = ("add", "add_", "__add__"), (operator.add, operator.iadd, torch.add, aten.add.Tensor)
MUL = (
    ("mul", "mul_", "multiply", "__mul__"),
    (operator.mul, operator.imul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar),
)
DIV = (
    ("div", "div_", "true_divide"),
    (operator.truediv, operator.itruediv, torch.div, torch.true_divide, aten.div.Tensor, aten.div.Scalar),
)
MASKED_FILL = ("masked_fill", "masked_fill_"), (torch.masked_fill, aten.masked_fill.Scalar)
WHERE = (), (torch.where, aten.where.self, aten.where.ScalarOther)
TRANSPOSE = ("transpose",), (torch.transpose, aten.transpose.int)
EXPAND = ("expand", "expand_as"), (aten.expand.default,)
DROPOUT = (), (F.dropout, torch.dropout, aten.dropout.default)


def _is(node: Any, kind: tuple[tuple[str, ...], tuple[Any, ...]]) -> bool:
    if not isinstance(node, fx.Node):
        return False
    methods, functions = kind
    if node.op == "call_method":
        return node.target in methods
    return node.op == "call_function" and node.target in functions


@dataclass(frozen=True)
class _Product:
    """A matrix product as `[..., rows, inner] @ [..., inner, columns]`, and what it takes to get its value back."""

    left: Value
    right: Value
    scale: float = 1.0
    bias: Value | None = None
    restore: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    undo: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True)
class _Logits:
    """`scale * left @ right`, plus terms, with keys hidden. A term stands beside the number of dims that the logits
    have where it is added; `shape` is that of the logits where they have most dims."""

    product: _Product
    scale: float
    bias: tuple[tuple[Value, int], ...] = ()
    allowed: tuple[tuple[Value, int], ...] = ()
    shape: tuple[Any, ...] | None = None


class SoftmaxMatmul(Pattern):
    """softmax(Q K^T) V by hand."""

    name = "softmax_matmul"

    def match(self, node: fx.Node) -> AttentionCall | None:
        outer = _product(node)
        if outer is None or outer.bias is not None or outer.scale != 1.0 or example_tensor(node) is None:
            return None
        weights, weights_dropout = _weights(outer.left, node)
        if weights is None:
            return None
        logits = _logits(weights)
        if logits is None:
            return None
        return _call(node, outer, logits, weights_dropout)

    def examples(self) -> Iterable[tuple[Any, tuple[Tensor, ...]]]:
        q, k, v = (torch.randn(2, 4, 16, 32) for _ in range(3))
        yield lambda q, k, v: (q @ k.transpose(-2, -1) / math.sqrt(32)).softmax(-1) @ v, (q, k, v)
        yield lambda q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT) * 0.2, dim=-1), v), (q[0], k[0], v[0])

        def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2, -1)
            return torch.einsum("bhqk,bkhd->bqhd", weights, v)

        yield einsum, tuple(torch.randn(2, 16, 4, 32) for _ in range(3))


def _product(node: Any) -> _Product | None:
    if _is(node, MATMUL):
        left, right = node.args[:2] if len(node.args) > 1 else (node.args[0], node.kwargs.get("other"))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        return _Product(left, right)
    if _is(node, BADDBMM):
        return _baddbmm(node)
    if _is(node, EINSUM):
        return _einsum(node)
    return None


def _baddbmm(node: fx.Node) -> _Product | None:
    named = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | node.kwargs
    bias, left, right = (named.get(name) for name in ("input", "batch1", "batch2"))
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    if not all(isinstance(item, fx.Node) for item in (bias, left, right)):
        return None
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    assert isinstance(bias, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    term: Value | None = None if beta == 0 else bias if beta == 1 else Expr.of("mul", bias, beta)
    return _Product(left, right, float(alpha), term)


def _einsum(node: fx.Node) -> _Product | None:
    """An einsum of two operands that is a batched matrix product, its operands permuted into matmul's order."""
    equation, *rest = node.args
    listed = len(rest) == 1 and isinstance(rest[0], (tuple, list))
    operands: list[Any] = list(rest[0]) if listed else rest  # type: ignore[arg-type]
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if any(len(set(letters)) != len(letters) for letters in (first, second, output)):
        return None
    batch = [letter for letter in output if letter in first and letter in second]
    inner = [letter for letter in first if letter in second and letter not in output]
    rows = [letter for letter in output if letter in first and letter not in second]
    columns = [letter for letter in output if letter in second and letter not in first]
    if not len(inner) == len(rows) == len(columns) == 1:
        return None
    if not len(first) == len(second) == len(output) == len(batch) + 2:
        return None
    left = _permuted(operands[0], first, [*batch, *rows, *inner])
    right = _permuted(operands[1], second, [*batch, *inner, *columns])
    produced = [*batch, *rows, *columns]
    if list(output) == produced:
        return _Product(left, right)
    order = [produced.index(letter) for letter in output]
    inverse = [list(output).index(letter) for letter in produced]
    return _Product(left, right, restore=(("permute", tuple(order)),), undo=(("permute", tuple(inverse)),))


def _permuted(operand: fx.Node, letters: str, order: list[str]) -> Value:
    dims = [letters.index(letter) for letter in order]
    return operand if dims == list(range(len(dims))) else Expr.of("permute", operand, *dims)


def _only_reader(node: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` alone reads the values of `node`; others may ask for its shape or dtype."""
    return {user for user in node.users if not _reads_shape_only(user, node)} == {reader}


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    if user.op != "call_method":
        return user.target is getattr and user.args[1] in ("shape", "dtype", "device")
    if user.target in ("expand_as", "view_as", "reshape_as", "type_as"):
        return len(user.args) == 2 and user.args[1] is node and user.args[0] is not node
    return user.target in ("size", "dim")


def _weights(node: Value, product: fx.Node) -> tuple[fx.Node | None, float]:
    """The softmax that `node`, the left operand of the second `product`, comes from, and the dropout after it."""
    dropout = 0.0
    current: Any = node
    if isinstance(current, Expr):  # an einsum's permuted operand: weights are used as they are, or not at all
        return None, 0.0
    if not _only_reader(current, product):
        return None, 0.0
    while True:
        if _is(current, SOFTMAX):
            return (current, dropout) if _over_last_dim(current) else (None, 0.0)
        if _is(current, DROPOUT):
            p, training = _argument(current, 1, "p", 0.5), _argument(current, 2, "training", True)
            dropout = float(p) if training else dropout
        elif not (_casts_floats(current) or _is(current, SAME) or _is(current, RESHAPE)):
            return None, 0.0
        source = current.args[0] if current.args else None
        if not isinstance(source, fx.Node) or not _only_reader(source, current):
            return None, 0.0
        if _is(current, RESHAPE) and not _keeps_last_two_dims(source, current):
            return None, 0.0
        current = source


def _casts_floats(node: fx.Node) -> bool:
    """A cast to a floating dtype; one to integers changes what is computed."""
    tensor = example_tensor(node)
    return _is(node, CAST) and tensor is not None and tensor.is_floating_point()


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _over_last_dim(node: fx.Node) -> bool:
    tensor = example_tensor(node)
    dim = _argument(node, 1, "dim", None)
    return tensor is not None and isinstance(dim, int) and dim in (-1, tensor.dim() - 1)


def _keeps_last_two_dims(source: fx.Node, node: fx.Node) -> bool:
    before, after = example_tensor(source), example_tensor(node)
    return before is not None and after is not None and before.shape[-2:] == after.shape[-2:]


def _logits(softmax: fx.Node) -> _Logits | None:
    """Walk from the softmax back to the first product, gathering what lies between as factors and terms."""
    start = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    if not isinstance(start, fx.Node) or not _only_reader(start, softmax):
        return None
    return _walk(start, _Logits(_Product(start, start), 1.0))


def _walk(node: fx.Node, so_far: _Logits) -> _Logits | None:
    """`so_far` describes how softmax's input comes from the value of `node`."""
    product = _product(node)
    if product is not None:
        if product.restore:
            return None
        bias = so_far.bias
        if product.bias is not None:
            bias += ((_scaled(product.bias, so_far.scale), _dims(node)),)
        tensor = example_tensor(node)
        shape = so_far.shape or (tuple(tensor.shape) if tensor is not None else None)
        return replace(so_far, product=product, scale=so_far.scale * product.scale, bias=bias, shape=shape)
    step = _step(node)
    if step is None:
        return None
    source, update = step
    if not _only_reader(source, node):
        return None
    updated = update(so_far)
    return None if updated is None else _walk(source, updated)


_Update = Callable[[_Logits], "_Logits | None"]


def _step(node: fx.Node) -> tuple[fx.Node, _Update] | None:
    """(the logits that `node` works on, what `node` adds to the description); None for anything unknown."""
    source = node.args[0] if node.args else None
    if _casts_floats(node) or _is(node, SAME):
        return (source, lambda logits: logits) if isinstance(source, fx.Node) else None
    if _is(node, RESHAPE):
        if not isinstance(source, fx.Node) or not _keeps_last_two_dims(source, node):
            return None
        before, after = example_tensor(source), example_tensor(node)
        assert before is not None and after is not None
        shape = tuple(max((before, after), key=lambda tensor: tensor.dim()).shape)
        return source, lambda logits: replace(logits, shape=_larger(logits.shape, shape))
    if _is(node, MUL) or _is(node, DIV):
        return _scaling(node)
    if _is(node, ADD):
        return _addition(node)
    if _is(node, MASKED_FILL):
        mask, value = _argument(node, 1, "mask", None), _number(_argument(node, 2, "value", None))
        return _hiding(node, source, mask, value, hidden_where=True)
    if _is(node, WHERE) and len(node.args) == 3:
        condition, kept, other = node.args
        if _number(other) is not None:
            return _hiding(node, kept, condition, _number(other), hidden_where=False)
        return _hiding(node, other, condition, _number(kept), hidden_where=True)
    return None


def _larger(first: tuple[Any, ...] | None, second: tuple[Any, ...]) -> tuple[Any, ...]:
    return first if first is not None and len(first) >= len(second) else second


def _number(item: Any) -> float | None:
    """A constant: a number, or a traced one-element tensor made from a number."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    if isinstance(item, fx.Node):
        tensor = example_tensor(item)
        if tensor is None and isinstance(example_value(item), (int, float)):
            return float(example_value(item))
        if tensor is not None and tensor.dim() == 0:
            return _constant_scalar(item)
    return None


def _constant_scalar(node: fx.Node) -> float | None:
    """The value of `torch.tensor(8.0)`, `torch.full([], 8.0)`, their square roots and casts."""
    name = str(getattr(node.target, "__name__", node.target))
    if name == "full" and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if name in ("tensor", "scalar_tensor", "as_tensor", "_as_tensor_fullprec") and isinstance(
        node.args[0], (int, float)
    ):
        return float(node.args[0])
    if name == "sqrt" and isinstance(node.args[0], fx.Node):
        inner = _number(node.args[0])
        return None if inner is None else math.sqrt(inner)
    if _is(node, CAST) and isinstance(node.args[0], fx.Node):
        return _number(node.args[0])
    return None


def _scaling(node: fx.Node) -> tuple[fx.Node, _Update] | None:
    first, second = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    if node.kwargs.get("rounding_mode") is not None:
        return None
    number = _number(second)
    if number is None and _is(node, MUL):
        first, number = second, _number(first)
    if number is None or not isinstance(first, fx.Node) or (number == 0 and _is(node, DIV)):
        return None
    factor = 1 / number if _is(node, DIV) else number
    return first, lambda logits: replace(logits, scale=logits.scale * factor)


def _addition(node: fx.Node) -> tuple[fx.Node, _Update] | None:
    if len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if _holds_product(first) == _holds_product(second):
        return None
    logits_node, term = (first, second) if _holds_product(first) else (second, first)
    if example_tensor(term) is None:
        return None
    return logits_node, lambda logits: replace(
        logits, bias=(*logits.bias, (_scaled(term, logits.scale), _dims(node)))
    )


def _holds_product(node: fx.Node) -> bool:
    """Whether `node` is a product, or a chain of one-reader steps from one. Terms that are products themselves, like
    relative positions computed from the queries, make a sum ambiguous, and the call is left alone."""
    current: Any = node
    for _ in range(16):
        if _product(current) is not None:
            return True
        if not isinstance(current, fx.Node):
            return False
        if _is(current, ADD):
            return any(isinstance(arg, fx.Node) and _holds_product(arg) for arg in current.args)
        if _is(current, WHERE):
            return any(isinstance(arg, fx.Node) and _holds_product(arg) for arg in current.args[1:])
        looked_through = (CAST, SAME, RESHAPE, MUL, DIV, MASKED_FILL)
        is_view = current.op == "call_method" and current.target in (
            "transpose",
            "permute",
            "squeeze",
            "unsqueeze",
        )
        if not (is_view or any(_is(current, kind) for kind in looked_through)):
            return False
        current = next((arg for arg in current.args if isinstance(arg, fx.Node)), None)
    return False


def _hiding(
    node: fx.Node, source: Any, mask: Any, value: float | None, hidden_where: bool
) -> tuple[fx.Node, _Update] | None:
    """Logits overwritten by `value` where `mask` is `hidden_where`."""
    while _is(mask, EXPAND) and isinstance(mask.args[0], fx.Node):
        mask = mask.args[0]  # it broadcasts by itself, and a kernel reads less of it
    tensor = example_tensor(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(source, fx.Node) or tensor is None or value is None or value > HIDES:
        return None
    if tensor.dtype != torch.bool:
        return None
    hidden: Value = mask if hidden_where else Expr.of(torch.logical_not, mask)

    def update(logits: _Logits) -> _Logits | None:
        final = value * logits.scale  # what later factors make of it
        if final > HIDES:
            return None
        if final == -math.inf:
            allowed: Value = Expr.of(torch.logical_not, mask) if hidden_where else mask
            return replace(logits, allowed=(*logits.allowed, (allowed, _dims(node))))
        # A row whose keys are all hidden by a finite number attends to all of them alike: only an additive mask, of a
        # number beside which rounding loses the scores, keeps that.
        zeros = Expr.of(torch.zeros_like, hidden, dtype=torch.float32)
        term = Expr.of("masked_fill", zeros, hidden, HIDDEN)
        return replace(logits, bias=(*logits.bias, (term, _dims(node))))

    return source, update


def _dims(node: fx.Node) -> int:
    tensor = example_tensor(node)
    return 0 if tensor is None else tensor.dim()


def _scaled(term: Value, scale: float) -> Value:
    return term if scale == 1.0 else Expr.of("mul", term, scale)


def _call(node: fx.Node, outer: _Product, logits: _Logits, dropout: float) -> AttentionCall | None:
    query, transposed_key, value = logits.product.left, logits.product.right, outer.right
    q, k_t, v = (example_tensor(item) for item in (query, transposed_key, value))
    if q is None or k_t is None or v is None or not q.dim() == k_t.dim() == v.dim() or not 3 <= q.dim() <= 4:
        return None
    key: Value = _untransposed(transposed_key)
    restore, undo = outer.restore, outer.undo
    output = example_tensor(node)
    assert output is not None
    shape = logits.shape
    if q.dim() == 3 and shape is not None and len(shape) == 4:
        # Heads folded into the batch for bmm, masks written for [batch, heads, ...]: unfold what bmm reads.
        heads = shape[1]
        if restore or not isinstance(heads, int):
            return None
        query, key, value = (Expr.of("unflatten", item, 0, (-1, heads)) for item in (query, key, value))
        restore, undo = (("flatten", (0, 1)),), (("unflatten", (0, (-1, heads))),)
    elif shape is not None and len(shape) != q.dim():
        return None
    dtype = output.dtype
    query, key, value = (_cast(item, dtype) for item in (query, key, value))
    scores = (*example_shape(query)[:-1], example_shape(key)[-2])
    mask = _mask(logits, dtype, scores)
    if mask is not None and not _broadcasts(example_shape(mask), scores):
        return None
    return AttentionCall(
        node, SoftmaxMatmul.name, query, key, value, mask,
        dropout_p=dropout, scale=logits.scale, restore=restore, undo=undo,
    )  # fmt: skip


def _untransposed(item: Value) -> Value:
    """`[..., inner, columns]` as `[..., columns, inner]`: the node before a transpose where there is one."""
    tensor = example_tensor(item)
    if isinstance(item, fx.Node) and tensor is not None and _is(item, TRANSPOSE) and len(item.args) == 3:
        source, *dims = item.args
        last_two = {tensor.dim() - 1, tensor.dim() - 2}
        if (
            isinstance(source, fx.Node)
            and {dim % tensor.dim() for dim in dims if isinstance(dim, int)} == last_two
        ):
            return source
    return Expr.of("transpose", item, -2, -1)


def _cast(item: Value, dtype: torch.dtype) -> Value:
    """In `dtype`, without the detour of an upcast for the products."""
    if isinstance(item, fx.Node) and _is(item, CAST) and isinstance(item.args[0], fx.Node):
        before = example_tensor(item.args[0])
        if before is not None and before.dtype == dtype:
            return item.args[0]
    tensor = example_tensor(item)
    return item if tensor is not None and tensor.dtype == dtype else Expr.of("to", item, dtype)


def _mask(logits: _Logits, dtype: torch.dtype, scores: tuple[Any, ...]) -> Value | None:
    """One mask, for scores of shape `scores`, out of all terms and hidden keys."""
    allowed: Value | None = None
    for item, dims in logits.allowed:
        item = _lifted(item, dims, scores)
        allowed = item if allowed is None else Expr.of(torch.logical_and, allowed, item)
    bias: Value | None = None
    for item, dims in logits.bias:
        item = _lifted(item, dims, scores)
        bias = item if bias is None else Expr.of("add", bias, item)
    if bias is None:
        return allowed
    tensor = example_tensor(bias)
    if tensor is not None and tensor.dtype not in (torch.float32, dtype):
        bias = Expr.of("to", bias, dtype)
    return bias if allowed is None else Expr.of(torch.where, allowed, bias, -math.inf)


def _lifted(item: Value, dims: int, scores: tuple[Any, ...]) -> Value:
    """A term of 3-D logits `[batch * heads, ...]` for 4-D ones."""
    shape = example_shape(item)
    if dims != 3 or len(scores) != 4 or len(shape) != 3 or shape[0] == 1:
        return item
    return Expr.of("unflatten", item, 0, (-1, scores[1]))


def example_shape(item: Value) -> tuple[Any, ...]:
    tensor = example_tensor(item)
    return () if tensor is None else tuple(tensor.shape)


def _broadcasts(shape: tuple[Any, ...], scores: tuple[Any, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(scores), strict=False)
    return len(shape) <= len(scores) and all(size == 1 or size == expected for size, expected in pairs)
