"""What a score_mod of `flex_attention` adds to scores, where that is known by its form.

A finite number that is the same for all keys of a query changes no weight of its softmax. So a sum of what depends on the key and of what
depends on the query is, for attention, a row over keys, of any length: ALiBi, `score + slope[head] * (key - query)`, is
`slope[head] * key`. A sum that both are in together is as large as the scores. It is taken only where a tensor holds it already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import example_tensor, example_value, node_name
from sage_inductor.graph.facts import AND, CASTS, NOT, OR, XOR, fill, operation

# What works on every element by itself.
BY_ELEMENT = {
    *AND, *OR, *NOT, *XOR, *CASTS, "add", "sub", "rsub", "mul", "neg", "abs", "floordiv", "floor_divide", "mod", "remainder",
    "ge", "gt", "le", "lt", "eq", "ne", "where", "minimum", "maximum", "clamp", "getitem", "index",
}  # fmt: skip
_DIVISIONS = {"truediv", "div", "true_divide"}
_FUNCTIONS = {"exp", "exp2", "log", "log2", "pow", "sqrt", "rsqrt"}
_OF_FLOATS = _DIVISIONS | _FUNCTIONS
INDICES = ("batch", "head", "query", "key")


def plain_name(node: fx.Node) -> str:
    """The operation of `node`, one that is called as Python does it without underscores: `eq` of `a.__eq__(b)`."""
    name = operation(node)
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


class Depends(Enum):
    """On which of a score's two places a number depends, beside its batch and head."""

    NEITHER = "neither"
    QUERY = "the query"
    KEY = "the key"
    SUM = "a sum of what depends on the query and of what depends on the key"
    BOTH = "both"
    SCORE = "the score"


@dataclass(frozen=True)
class Held:
    """An element of an input at the indices themselves, `bias[h, q, k]`: `dims` are those of the scores, [1, 2, 3] here."""

    buffer: fx.Node
    dims: tuple[int, ...]


@dataclass(frozen=True)
class ModifiedScores:
    """`score + added` where all of `conditions` hold, else -inf. `scored`: the node of the sum, None where nothing is added.
    `tensor`: what is added, where that is no row over keys."""

    score: fx.Node
    indices: tuple[fx.Node, ...]
    buffers: tuple[fx.Node, ...]
    conditions: tuple[fx.Node, ...] = ()
    scored: fx.Node | None = None
    tensor: Held | None = None

    def row(self, indices: tuple[Tensor, ...], buffers: tuple[Any, ...]) -> Tensor:
        """What is added, float32 `[1 or batch, 1 or heads, 1, kv_len]`, less a number of each query. `indices` broadcast to the
        scores."""
        assert self.scored is not None
        batch, head, _, key = indices
        at_first = torch.zeros((1, 1), dtype=torch.int32, device=key.device)
        score = torch.zeros((1, 1, 1, 1), device=key.device)
        # 16 bits do not hold `slope * key` where they hold `slope * (key - query)`.
        wide = [
            item.float() if isinstance(item, Tensor) and item.is_floating_point() else item
            for item in buffers
        ]
        inputs = dict(zip(self.buffers, wide, strict=True))
        inputs |= {self.score: score, **dict(zip(self.indices, (batch, head, at_first, key), strict=True))}
        return _value(self.scored, inputs).float()

    def condition(self, indices: tuple[Tensor, ...], buffers: tuple[Any, ...]) -> Tensor | None:
        """Where scores are kept, a bool that broadcasts to the scores; None for everywhere."""
        inputs = dict(zip((*self.indices, *self.buffers), (*indices, *buffers), strict=True))
        kept: Tensor | None = None
        for condition in self.conditions:
            found = _value(condition, inputs)
            kept = found if kept is None else kept & found
        return kept

    def held(self, indices: tuple[Tensor, ...], buffers: tuple[Any, ...]) -> Tensor:
        """The tensor that is added, a view of it that broadcasts to the scores. `indices` as for `row`."""
        assert self.tensor is not None
        found: Tensor = buffers[self.buffers.index(self.tensor.buffer)]
        for dim, place in enumerate(self.tensor.dims):
            found = found.narrow(dim, 0, indices[place].numel())
        return found.unsqueeze(1) if self.tensor.dims == (0, 2, 3) else found


def read_scores(module: fx.GraphModule | None) -> ModifiedScores | str:
    """What a score_mod does, or the operations in it that make it something else."""
    if module is None:
        return "no graph"
    score, *others = module.graph.find_nodes(op="placeholder")
    (output,) = module.graph.find_nodes(op="output")
    found = ModifiedScores(score, tuple(others[:4]), tuple(others[4:]))
    result, conditions = output.args[0], list[fx.Node]()
    depends: dict[fx.Node, Depends] = {}
    for node in module.graph.nodes:
        is_call = node.op not in ("placeholder", "output")
        if is_call and not works_by_element(node, BY_ELEMENT | _OF_FLOATS):
            return _operations(module)
        depends[node] = _depends(node, found, depends)
    while isinstance(result, fx.Node) and operation(result) == "where" and _hides(result):
        conditions.append(result.args[0])  # type: ignore[arg-type]
        result = result.args[1]
    terms = _terms(result, depends)
    if terms is None or any(depends[node] is Depends.SCORE for node in conditions):
        return _operations(module)
    found = replace(found, conditions=tuple(conditions))
    if not terms:
        return found
    found = replace(found, scored=result)
    if all(depends[term] is not Depends.BOTH for term in terms):
        return found
    held = _held(terms[0], found) if len(terms) == 1 and plain_name(result) == "add" else None
    if held is not None:
        return replace(found, tensor=held)
    return _operations(module)


def works_by_element(node: fx.Node, known: set[str] = BY_ELEMENT) -> bool:
    """Whether `node`, of a program on single elements, does the same on tensors of them."""
    value = example_value(node)
    is_single = isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and value.dim() == 0)
    return is_single and (plain_name(node) in known or operation(node) in known or fill(node) is not None)


def _operations(module: fx.GraphModule) -> str:
    calls = [node_name(node) for node in module.graph.nodes if node.op in ("call_function", "call_method")]
    return ", ".join(dict.fromkeys(calls)) or "another value"


def _hides(node: fx.Node) -> bool:
    """Whether `node`, a `where`, is -inf where its condition, a value of the graph, does not hold."""
    if len(node.args) != 3 or not isinstance(node.args[0], fx.Node):
        return False
    other = node.args[2]
    if isinstance(other, fx.Node):
        made = operation(other) in ("tensor", "scalar_tensor", "_as_tensor_fullprec", "full", "full_like")
        other = next((arg for arg in other.args if isinstance(arg, float)), None) if made else None
    return isinstance(other, float) and other == -math.inf


def _terms(node: Any, depends: Mapping[fx.Node, Depends]) -> list[fx.Node] | None:
    """What `node` adds to the score, or takes from it. None where it is no sum with it."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return [] if depends[node] is Depends.SCORE else None
    name, args = plain_name(node), node.args
    if name not in ("add", "sub") or len(args) != 2 or node.kwargs:
        return None
    scored = [isinstance(arg, fx.Node) and depends[arg] is Depends.SCORE for arg in args]
    if scored not in ([True, False], [False, True]) or (name == "sub" and scored[1]):
        return None
    inner, term = args if scored[0] else args[::-1]
    before = _terms(inner, depends)
    if before is None:
        return None
    return [*before, term] if isinstance(term, fx.Node) else before  # a number shifts all scores


def _depends(node: fx.Node, scores: ModifiedScores, depends: Mapping[fx.Node, Depends]) -> Depends:
    if node is scores.score:
        return Depends.SCORE
    if node in scores.indices:
        return (Depends.NEITHER, Depends.NEITHER, Depends.QUERY, Depends.KEY)[scores.indices.index(node)]
    if node.op in ("placeholder", "output"):
        return Depends.NEITHER
    found = [depends[item] for item in node.all_input_nodes]
    if Depends.SCORE in found:
        return Depends.SCORE
    kinds = {item for item in found if item is not Depends.NEITHER}
    if kinds == {Depends.QUERY} and _may_be_infinite(node, depends):
        return Depends.BOTH  # -inf hides a query, and is no shift
    if len(kinds) < 2 and Depends.SUM not in kinds:
        return kinds.pop() if kinds else Depends.NEITHER
    name, result = plain_name(node), example_tensor(node)
    if Depends.BOTH in kinds or (node.kwargs and name not in CASTS):
        return Depends.BOTH
    to_float = name in CASTS and result is not None and result.is_floating_point()
    is_sum = name in ("add", "sub", "rsub", "neg") or to_float
    # A product with, or a quotient by, what depends on neither.
    is_multiple = name == "mul" and Depends.NEITHER in found + [
        Depends.NEITHER for arg in node.args if not isinstance(arg, fx.Node)
    ]
    divisor = node.args[1] if name in _DIVISIONS and len(node.args) == 2 else None
    is_share = divisor is not None and not (
        isinstance(divisor, fx.Node) and depends[divisor] is not Depends.NEITHER
    )
    return Depends.SUM if is_sum or is_multiple or is_share else Depends.BOTH


def _may_be_infinite(node: fx.Node, depends: Mapping[fx.Node, Depends]) -> bool:
    """Whether that is so of `node`, which depends on the query, where what it is made of is finite."""
    name, result = plain_name(node), example_tensor(node)
    if result is None or not result.is_floating_point():
        return False
    if name in ("getitem", "index", *_FUNCTIONS):  # a row of floats may hold anything
        return True
    of_query = [isinstance(arg, fx.Node) and depends[arg] is Depends.QUERY for arg in node.args]
    if name in _DIVISIONS and of_query[1:] != [False]:
        return True
    if name == "where" and any(
        isinstance(arg, fx.Node) and not known for arg, known in zip(node.args[1:], of_query[1:], strict=True)
    ):
        return True
    return any(isinstance(arg, float) and not math.isfinite(arg) for arg in node.args)


def _held(term: fx.Node, scores: ModifiedScores) -> Held | None:
    if plain_name(term) not in ("getitem", "index") or not isinstance(term.args[1], (tuple, list)):
        return None
    buffer, index = term.args[0], list(term.args[1])
    if buffer not in scores.buffers or not all(item in scores.indices for item in index):
        return None
    dims = [scores.indices.index(item) for item in index if isinstance(item, fx.Node)]
    in_order = dims == sorted(set(dims)) and dims[-2:] == [2, 3]
    return Held(buffer, tuple(dims)) if in_order and isinstance(buffer, fx.Node) else None


def _value(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """What `node` computes of these `values`, of tensors of many elements."""
    known = dict(values)
    pending = [node]
    while pending:
        item = pending[-1]
        missing = [arg for arg in item.all_input_nodes if arg not in known]
        if item in known or missing:
            pending += missing
            pending = pending if missing else pending[:-1]
            continue
        args, kwargs = fx.node.map_arg((item.args, item.kwargs), lambda arg: known[arg])
        if item.op == "call_method":
            known[item] = getattr(args[0], str(item.target))(*args[1:], **kwargs)
        else:
            assert callable(item.target)
            known[item] = item.target(*args, **kwargs)
        pending.pop()
    found: Tensor = known[node]
    return found
