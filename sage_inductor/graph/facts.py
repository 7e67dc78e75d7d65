"""Facts about the operations of a graph, by their names, in one table: a new spelling is added in one place.

A name stands for the method, the function of torch or `operator`, and the aten operator of that name. Facts:

    PURE      gives its value and does nothing else: arguments stay as they are, no random numbers are drawn
    VIEW      the value may lie in the memory of the first argument: `x.view(...)`, and `x.float()` of a float32 x
    COPIES    the value holds numbers of the first argument and no others, wherever: `x.transpose(0, 1)`, `x[0]`
    IN_ORDER  the value holds all elements of the first argument, each once and in their order: `x.reshape(...)`
    RANDOM    the value depends on more than the arguments: on random numbers, or on what memory held before
    WRITES    the first argument is overwritten

The value of an operation that is PURE and no VIEW lies in memory of its own.
"""

from __future__ import annotations

from enum import Flag, auto
from functools import lru_cache
from typing import Any

from torch import fx

from sage_inductor.graph.call import Expr, Value, example_value, node_name
from sage_inductor.torch_internals.operators import draws_random_numbers, is_overload, operator_name
from sage_inductor.torch_internals.sizes import number_of


class Fact(Flag):
    PURE = auto()
    VIEW = auto()
    COPIES = auto()
    IN_ORDER = auto()
    RANDOM = auto()
    WRITES = auto()


PURE, VIEW, COPIES, IN_ORDER, RANDOM, WRITES = Fact
NOTHING = Fact(0)

# Another shape, or the same.
RESHAPES = (
    "view", "view_as", "reshape", "reshape_as", "_unsafe_view", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze",
)  # fmt: skip
BROADCASTS = ("expand", "expand_as", "broadcast_to")
# To another dtype. Where the argument has that dtype already, the value is the argument itself, or with `_to_copy` a copy.
_CASTS_WHERE_NEEDED = ("to", "float", "half", "bfloat16", "double", "bool", "int", "long", "type", "type_as")
CASTS = (*_CASTS_WHERE_NEEDED, "_to_copy")
# Element by element, into new memory. `add_`, the method with an underscore, and `iadd`, the operator with an i in front, write
# the same numbers over the first argument.
ARITHMETIC = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "truediv", "exp", "masked_fill", "clamp",
    "clamp_min",
)  # fmt: skip
ARITHMETIC_IN_PLACE = (*(f"{name}_" for name in ARITHMETIC), "iadd", "isub", "imul", "itruediv")
# Filled with a number: the one here, or the argument at this position or of the name `fill_value`.
FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
FILLS_WITH_ARGUMENT = {"full": 1, "full_like": 1, "new_full": 2}
# Of bools.
AND = ("and_", "__and__", "logical_and", "bitwise_and")
OR = ("or_", "__or__", "logical_or", "bitwise_or")
NOT = ("invert", "inv", "__invert__", "logical_not", "bitwise_not")

XOR = ("xor", "__xor__", "logical_xor", "bitwise_xor")
# Comparisons and arithmetic as Python calls them.
_BY_METHOD = (
    "__ge__",
    "__gt__",
    "__le__",
    "__lt__",
    "__eq__",
    "__ne__",
    "__floordiv__",
    "__mod__",
    "__rsub__",
    "__neg__",
)

_ROWS: tuple[tuple[Fact, tuple[str, ...]], ...] = (
    (PURE | VIEW | COPIES | IN_ORDER, (*RESHAPES, "contiguous", "detach", "alias", "positive")),
    (PURE | COPIES | IN_ORDER, ("clone",)),
    (PURE | VIEW | COPIES, (
        *BROADCASTS, "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "mT", "mH", "numpy_T",
        "matrix_H", "adjoint", "getitem", "__getitem__", "select", "narrow", "slice", "diagonal", "unfold", "chunk",
        "split", "split_with_sizes", "tensor_split", "unbind",
    )),
    (PURE | COPIES, ("flip", "index", "index_select")),
    (PURE | COPIES, ("repeat_interleave", "repeat")),
    (PURE | VIEW | IN_ORDER, _CASTS_WHERE_NEEDED),
    (PURE | IN_ORDER, ("_to_copy",)),
    # getattr: `x.mT` as older versions of torch trace it, and sizes. as_strided: any elements of the memory. einsum: of one
    # operand it may be a view. dropout: the argument itself where it is off; `is_pure` knows where it is on.
    (PURE | VIEW, ("getattr", "cpu", "cuda", "as_strided", "einsum", "dropout")),
    (PURE, (
        *ARITHMETIC, *FILLS, *FILLS_WITH_ARGUMENT, *AND, *OR, *NOT, "__add__", "__sub__", "__mul__", "__truediv__",
        "__matmul__", "neg", "abs", "log", "sqrt", "reciprocal", "where", "maximum", "max", "min", "amax", "sum", "mean",
        "std", "var", "norm", "logsumexp", "special_logsumexp", "softmax", "_softmax", "_safe_softmax", "special_softmax",
        "log_softmax", "_log_softmax", "special_log_softmax", "matmul", "bmm", "mm", "baddbmm", "cat", "concat",
        "concatenate", "hstack", "stack", "cumsum", "diff", "gt", "ge", "lt", "le", "eq", "ne", "arange", "eye", "tril", "triu", "tensor",
        "scalar_tensor", "pad", "constant_pad_nd", "rsub", "floor_divide", "floordiv", "remainder", "mod", "absolute", "minimum",
        "clamp_max", *XOR, *_BY_METHOD,
    )),
    (RANDOM, (
        "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "bernoulli", "multinomial",
        "normal", "poisson", "binomial", "native_dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
        "dropout1d", "dropout2d", "dropout3d", "rrelu", "gumbel_softmax", "multi_head_attention_forward",
        "scaled_dot_product_attention", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
        "empty_permuted",
    )),
    (WRITES, (
        *ARITHMETIC_IN_PLACE, "setitem", "delitem", "imatmul", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
        "ilshift", "irshift",
    )),
)  # fmt: skip
FACTS: dict[str, Fact] = {name: facts for facts, names in _ROWS for name in names}


def operation(item: Value) -> str:
    """The name of the method, or of the function of torch or `operator`, that `item` calls. Empty for all else: a function
    that the user allowed in the graph may have any name, and any effect."""
    if isinstance(item, Expr) or item.op == "call_function":
        return item.target if isinstance(item.target, str) else _torch_name(item.target)
    return str(item.target) if item.op == "call_method" else ""


@lru_cache(maxsize=1024)
def _torch_name(target: Any) -> str:
    operator = operator_name(target)
    if operator is not None:  # of aten, not of who registers one under the same name
        namespace, _, name = operator.partition("::")
        return name if namespace in ("aten", "prims") else ""
    module = getattr(target, "__module__", None) or "torch"
    own = module.partition(".")[0] in ("torch", "_operator", "builtins", "math")
    return str(getattr(target, "__name__", "")) if own else ""


def facts_of(item: Value) -> Fact:
    return FACTS.get(operation(item), NOTHING)


def is_pure(node: fx.Node) -> bool:
    """Whether `node` does nothing but give its value. False for an operation that is not known."""
    if is_overload(node.target) and not node.is_impure():
        return True
    if node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None:
        return False
    return PURE in facts_of(node) and not is_random(node)


def is_random(node: fx.Node) -> bool:
    """Whether the value of `node` is not determined by its arguments."""
    name = operation(node)
    if name == "dropout":
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        p = number_of(example_value(p)) if isinstance(p, fx.Node) else p
        p = p if isinstance(p, (int, float)) else 1.0
        training = node.kwargs.get("training", node.kwargs.get("train", True))
        return bool(p) and bool(node.args[2] if len(node.args) > 2 else training)
    return RANDOM in facts_of(node) or draws_random_numbers(node.target, name)


def is_function(node: fx.Node) -> bool:
    """Whether the value of `node` is a function of the values of its arguments, which may be called at any time.

    True for an operator, and for a function or method of torch, that draws no random numbers. False for parts of functorch
    transforms, whose calls make sense together only. Effects, such as writing to an argument, are not looked at.
    """
    if node.op == "call_function":
        module = getattr(node.target, "__module__", None) or ""
        if not (operation(node) or is_overload(node.target)) or "functorch" in module:
            return False
    return (
        node.op in ("call_function", "call_method")
        and not is_random(node)
        and "batch_dim" not in node_name(node)
    )


def is_fresh(node: fx.Node) -> bool:
    """Whether the value of `node` lies in memory that no other value has."""
    if operation(node) == "einsum":
        return len(node.all_input_nodes) > 1
    return PURE in facts_of(node) and VIEW not in facts_of(node) and node.kwargs.get("out") is None


def is_view(node: fx.Node) -> bool:
    """Whether the value of `node` may lie in the memory of its first argument, by its name, whichever module that is from."""
    return VIEW in FACTS.get(node_name(node), NOTHING)


def fill(item: Value) -> Any:
    """The number, or the node of it, that `item` is filled with. None where `item` is not made by filling a tensor."""
    name = operation(item)
    if name in FILLS:
        return FILLS[name]
    position = FILLS_WITH_ARGUMENT.get(name)
    if position is None:
        return None
    return item.args[position] if len(item.args) > position else item.kwargs.get("fill_value")
