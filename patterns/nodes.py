"""What nodes of a graph are, whatever spelling was used: matrix products, softmax, scalings, masks, views."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sage_inductor.graph.call import Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, CASTS, RESHAPES, is_pure, operation
from sage_inductor.graph.sizes import Size, sizes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """Nodes that compute the same: methods by name, functions by identity, and both by the name of the operation. What
    writes to an `out` is none of them: that tensor is not the node's alone."""

    methods: tuple[str, ...] = ()
    functions: tuple[Any, ...] = ()
    operations: tuple[str, ...] = ()

    def __contains__(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.kwargs.get("out") is not None:
            return False
        if self.operations and operation(node) in self.operations:
            return True
        if node.op == "call_method":
            return node.target in self.methods
        return node.op == "call_function" and node.target in self.functions


def _in_place_too(*names: str) -> tuple[str, ...]:
    """Methods by these names, and those that write the same numbers over the first argument."""
    return (*names, *(f"{name}_" for name in names))


MATMUL = Kind(
    ("matmul", "bmm", "mm", "__matmul__"),
    (
        torch.matmul, torch.bmm, torch.mm, torch.linalg.matmul, operator.matmul, aten.matmul.default, aten.bmm.default,
        aten.mm.default, aten.linalg_matmul.default,
    ),
)  # fmt: skip
BADDBMM = Kind(("baddbmm",), (torch.baddbmm, aten.baddbmm.default))
EINSUM = Kind((), (torch.einsum, torch.functional.einsum, aten.einsum.default))
SOFTMAX = Kind(
    ("softmax",),
    (
        F.softmax,
        torch.softmax,
        torch.special.softmax,
        aten.softmax.int,
        aten._softmax.default,
        aten._safe_softmax.default,
        aten.special_softmax.default,
    ),
)
LOG_SOFTMAX = Kind(
    ("log_softmax",),
    (
        F.log_softmax,
        torch.log_softmax,
        torch.special.log_softmax,
        aten.log_softmax.int,
        aten._log_softmax.default,
        aten.special_log_softmax.default,
    ),
)
LOGSUMEXP = Kind(
    ("logsumexp",),
    (torch.logsumexp, torch.special.logsumexp, aten.logsumexp.default, aten.special_logsumexp.default),
)
EXP = Kind(_in_place_too("exp"), (torch.exp, aten.exp.default, aten.exp_.default))
SUM = Kind(("sum",), (torch.sum, aten.sum.dim_IntList))
CAST = Kind(operations=CASTS)
SAME = Kind(operations=("contiguous", "clone"))
# All of them leave the order of the elements as it is.
RESHAPE = Kind(operations=RESHAPES)

ADD = Kind(
    (*_in_place_too("add"), "__add__"),
    (operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor),
)
SUB = Kind(
    (*_in_place_too("sub", "subtract"), "__sub__"),
    (operator.sub, operator.isub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub_.Tensor),
)
MUL = Kind(
    (*_in_place_too("mul", "multiply"), "__mul__"),
    (
        operator.mul,
        operator.imul,
        torch.mul,
        torch.multiply,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.mul_.Tensor,
    ),
)
DIV = Kind(
    (*_in_place_too("div", "divide", "true_divide"), "__truediv__"),
    (
        operator.truediv,
        operator.itruediv,
        torch.div,
        torch.divide,
        torch.true_divide,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.div_.Tensor,
    ),
)
MAXIMUM = Kind(("maximum", "max"), (torch.maximum, torch.max, aten.maximum.default))
AMAX = Kind(("amax",), (torch.amax, aten.amax.default, aten.max.dim))
DETACH = Kind(("detach",), (torch.detach, aten.detach.default))
CLAMP = Kind(
    _in_place_too("clamp", "clamp_min"),
    (torch.clamp, aten.clamp.default, aten.clamp_.default, aten.clamp_min.default),
)
MASKED_FILL = Kind(
    _in_place_too("masked_fill"), (torch.masked_fill, aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
)
NAN_TO_NUM = Kind(
    _in_place_too("nan_to_num"), (torch.nan_to_num, aten.nan_to_num.default, aten.nan_to_num_.default)
)
ANY = Kind(("any",), (torch.any, aten.any.dim))
EQ = Kind(("eq", "__eq__"), (operator.eq, torch.eq, aten.eq.Scalar))
ISNAN = Kind(("isnan",), (torch.isnan, aten.isnan.default))
WHERE = Kind((), (torch.where, aten.where.self, aten.where.ScalarOther))
UNSQUEEZE = Kind(operations=("unsqueeze",))
TRANSPOSE = Kind(
    ("transpose", "swapaxes", "swapdims"),
    (
        torch.transpose, torch.swapaxes, torch.swapdims, aten.transpose.int, aten.swapaxes.default,
        aten.swapdims.default,
    ),
)  # fmt: skip
# The last two dims swapped: of any tensor, and of a matrix only; of real numbers the adjoint is the same. torch 2.14 traces
# x.mT, x.mH, x.T and x.H as operators without an overload, older versions as getattr.
MATRIX_TRANSPOSE = Kind(
    ("adjoint",), (torch.adjoint, aten.mT, aten.mT.default, aten.mH, aten.mH.default, aten.adjoint.default)
)
T = Kind(
    ("t",),
    (torch.t, aten.t.default, aten.numpy_T, aten.numpy_T.default, aten.matrix_H, aten.matrix_H.default),
)
PERMUTE = Kind(("permute",), (torch.permute, aten.permute.default))
EXPAND = Kind(operations=BROADCASTS)
# What they read of the second operand is its shape or dtype.
TAKES_AFTER = Kind(
    ("expand_as", "view_as", "reshape_as", "type_as"),
    (aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default),
)
# New tensors of the shape and dtype of the first operand, or of its dtype alone.
LIKE = Kind(
    ("new_zeros", "new_ones", "new_full", "new_empty"),
    (
        torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    ),
)  # fmt: skip
CAT = Kind((), (torch.cat, torch.concat, torch.concatenate, aten.cat.default))
GETITEM = Kind(("__getitem__",), (operator.getitem,))
SLICE = Kind((), (aten.slice.Tensor,))
NARROW = Kind(("narrow",), (torch.narrow, aten.narrow.default))
DROPOUT = Kind((), (F.dropout, torch.dropout, aten.dropout.default))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    return argument(node, 0, "input"), argument(node, 1, "other")


def shape_of(item: Value | None) -> tuple[Size, ...]:
    """Sizes to compare, and no arguments for other nodes: symbolic ones are expressions."""
    tensor = example_tensor(item)
    return () if tensor is None else sizes_of(tensor)


def unexpanded(item: Any) -> Any:
    """`item` before it was expanded: it broadcasts by itself, and a kernel reads less of it."""
    while item in EXPAND and isinstance(item.args[0], fx.Node):
        item = item.args[0]
    return item


def is_the_same(node: fx.Node) -> bool:
    """Whether `node` has the values of its first argument in the same shape: a copy, or an `expand` to the sizes that are
    there already, which decompositions of torch.export leave."""
    source = argument(node, 0, "input")
    whole = node in EXPAND and isinstance(source, fx.Node) and shape_of(source) == shape_of(node)
    return node in SAME or whole


def casts_floats(node: fx.Node) -> bool:
    """A cast to a floating dtype, on the same device; one to integers changes what is computed."""
    tensor, source = example_tensor(node), argument(node, 0, "input") if node in CAST else None
    if tensor is None or not isinstance(source, fx.Node) or not tensor.is_floating_point():
        return False
    before = example_tensor(source)
    return before is None or before.device == tensor.device


def only_reader(node: fx.Node, *readers: fx.Node) -> bool:
    """Whether `readers` alone read the values of `node`; others may ask for its shape or dtype."""
    if not all(reader in node.users for reader in readers):
        return False
    return all(user in readers or _reads_shape_only(user, node) for user in node.users)


def uncast(node: Any) -> Any:
    """`node` before casts between floating dtypes, as far back as nobody else reads what is cast."""
    while isinstance(node, fx.Node) and casts_floats(node):
        source = argument(node, 0, "input")
        if not isinstance(source, fx.Node) or not only_reader(source, node):
            break
        node = source
    return node


@dataclass(frozen=True)
class Reduction:
    """One number for each row of `source` along `dim` (0 and above), kept as a dim of 1; `chain` are the nodes from the
    one that reads `source` to the one that reads the numbers."""

    source: fx.Node
    dim: int
    chain: tuple[fx.Node, ...]


def reduction(node: Any, *kinds: Kind) -> Reduction | None:
    """What `node` is where it is a reduction of one of `kinds`; None when it is something else."""
    chain: list[fx.Node] = []
    unsqueezed: int | None = None
    while isinstance(node, fx.Node) and not any(node in kind for kind in kinds):
        chain.append(node)
        if node in DETACH or _is_values(node):
            node = node.args[0]
        elif (inserted := _inserted_dim(node)) is not None and unsqueezed is None:
            node, unsqueezed = node.args[0], inserted
        else:
            return None
    if not isinstance(node, fx.Node):
        return None
    source, dim = argument(node, 0, "input"), argument(node, 1, "dim", node.kwargs.get("axis"))
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rank = len(shape_of(source)) if isinstance(source, fx.Node) else 0
    if not isinstance(dim, int) or isinstance(dim, bool) or not -rank <= dim < rank:
        return None
    if (unsqueezed is None) is not (argument(node, 2, "keepdim", False) is True):
        return None
    if unsqueezed not in (None, dim % rank):
        return None
    return Reduction(source, dim % rank, (node, *reversed(chain)))


def _is_values(node: fx.Node) -> bool:
    """Whether `node` is the values, out of what a maximum with positions returns."""
    of_tuple = node.target in (operator.getitem, getattr) and example_tensor(node.args[0]) is None  # type: ignore[arg-type]
    return of_tuple and node.args[1] in (0, "values")


def _inserted_dim(node: fx.Node) -> int | None:
    """The dim of 1 that `x.unsqueeze(dim)` or `x[..., None]` inserts."""
    rank = len(shape_of(node))
    if node in UNSQUEEZE:
        dim = argument(node, 1, "dim")
        return dim % rank if isinstance(dim, int) and rank else None
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or index[-1] is not None:
        return None
    whole = all(item is Ellipsis or item == slice(None) for item in index[:-1])
    return rank - 1 if whole and (Ellipsis in index or len(index) == rank) else None


_FEW = 8  # nodes behind one: as many as the copies and casts that are kept for somebody who does not ask


def reads_nothing(node: fx.Node) -> bool:
    """Whether `node` can go with what it reads: what torch.export puts beside each cast, a check of the dtype that went
    into it, or what nobody reads, nor what is made of it: the positions beside `x.max(-1)[0]`, a copy of the scores."""
    return _leads_nowhere(node, shapes_count=True)


def _leads_nowhere(node: fx.Node, *, shapes_count: bool) -> bool:
    """Whether nothing comes of `node` but values that nobody reads. Who asks for a shape or dtype alone counts as a reader,
    or does not."""
    behind: list[fx.Node] = [node]
    for current in behind:
        checks = current.target is aten._assert_tensor_metadata.default
        if not (checks or is_pure(current)) or len(behind) > _FEW:
            return False
        readers = (user for user in current.users if shapes_count or not _asks_for_shape(user, current))
        behind.extend(user for user in readers if user not in behind)
    return True


def _reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    return _asks_for_shape(user, node) or _leads_nowhere(user, shapes_count=False)


def _asks_for_shape(user: fx.Node, node: fx.Node) -> bool:
    if user in LIKE:
        return user.all_input_nodes == [node]
    if user in TAKES_AFTER:
        return len(user.args) == 2 and user.args[1] is node and user.args[0] is not node
    if user.op != "call_method":
        return user.target is getattr and user.args[1] in ("shape", "dtype", "device")
    return user.target in ("size", "dim")
