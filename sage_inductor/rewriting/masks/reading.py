"""Masks read from the graph: the formula of an element, found by going back from it to what it was made of.

The element of `torch.ones(n, n).tril()` at (i, j) is that of `torch.ones(n, n)` there where `j - i <= 0`, else 0; and that is 1
anywhere. Nothing is computed, so that it costs the same for all lengths, and lengths may be symbolic. What is not understood
is data, which is read when the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from sage_inductor.graph.call import Expr, Value, example_tensor, example_value
from sage_inductor.graph.facts import CASTS, fill, operation
from sage_inductor.graph.sizes import known, sizes_of
from sage_inductor.graph.writes import Writes, writes_in_place
from sage_inductor.rewriting.masks import formula
from sage_inductor.rewriting.masks.algebra import as_condition, choice
from sage_inductor.rewriting.masks.formula import (
    ONE,
    ZERO,
    Condition,
    Conditional,
    Data,
    Extreme,
    Holds,
    Linear,
    NotUnderstood,
    Real,
    Scalar,
    constant_of,
    data,
    data_of,
)
from sage_inductor.rewriting.masks.makers import MAKERS, whole_index, within
from sage_inductor.rewriting.masks.pointwise import BITWISE, BY_NAME, IN_PLACE
from sage_inductor.rewriting.masks.ranges import Ranges
from sage_inductor.rewriting.masks.standpoint import Standpoint
from sage_inductor.rewriting.masks.views import Index, broadcast, source_of
from sage_inductor.torch_internals.dispatch import outside_fake_tensors
from sage_inductor.torch_internals.sizes import shape_env_of
from sage_inductor.torch_internals.traced import storage_id

# A mask takes dozens of steps. What takes more is no mask.
_MOST_STEPS, _DEEPEST = 3000, 60
_INDICES = frozenset(map(formula.variable, (formula.BATCH, formula.HEAD, formula.QUERY, formula.KEY)))
# Arguments by name that are operands, and that do not change what is computed.
_OPERAND_NAMES = {"min": "low", "max": "high"}
_OPERANDS = {"other", "mask", "value", *_OPERAND_NAMES}
_OPTIONS = {"alpha", "rounding_mode"}


@dataclass(eq=False)
class Reader:
    """Reads values of one graph. `bound`: what the inputs of a subgraph are, a formula or a value of `graph`."""

    graph: fx.Graph
    writes: Writes
    ranges: Ranges
    transformed: set[fx.Node] = field(default_factory=set)
    """Nodes inside functorch's transforms, whose values mean nothing elsewhere."""
    bound: dict[fx.Node, Scalar | Value] = field(default_factory=dict)
    origins: dict[Scalar, tuple[fx.Node, Index]] = field(default_factory=dict)
    """Conditions that are elements of tensors of the graph, and where in them."""
    _memo: dict[Any, Scalar] = field(default_factory=dict)
    _steps: int = 0
    _depth: int = 0
    _positions: dict[fx.Node, int] | None = None

    def element(self, item: Any, index: Index, reader: fx.Node | None = None) -> Scalar:
        """The element of the tensor `item` at `index`, as `reader`, a node of the graph, reads it. Raises NotUnderstood."""
        time = len(self._order()) if reader is None else self._order().get(reader, len(self._order()))
        return self.read(item, index, Standpoint(time))

    def _order(self) -> dict[fx.Node, int]:
        if self._positions is None:
            self._positions = {node: position for position, node in enumerate(self.graph.nodes)}
        return self._positions

    def read(self, item: Any, index: Index, place: Standpoint) -> Scalar:
        if isinstance(item, fx.Node) and item in self.bound:
            outer = self.bound[item]
            if not isinstance(outer, (fx.Node, Expr)):
                return outer
            item = outer
        is_node = isinstance(item, fx.Node)
        is_written = is_node and item.graph is self.graph and self.writes.touch(item)
        key = (item, index, place if is_written else place.levels) if is_node else None
        if key in self._memo:
            return self._memo[key]
        self._steps += 1
        if self._steps > _MOST_STEPS or self._depth > _DEEPEST:
            raise NotUnderstood("too much")
        self._depth += 1
        try:
            found = self._understood(item, index, place)
        except NotUnderstood:
            found = self._as_data(item, index)
        finally:
            self._depth -= 1
        if is_node:
            self._memo[key] = found
            if isinstance(found, Condition) and not is_written and self._stands_alone(item):
                before = self.origins.get(found)
                if before is None or (_is_plain(index) and not _is_plain(before[1])):
                    self.origins[found] = item, index
        return found

    def _understood(self, item: Any, index: Index, place: Standpoint) -> Scalar:
        tensor = example_tensor(item) if isinstance(item, (fx.Node, Expr)) else None
        if tensor is None:
            raise NotUnderstood("no tensor")
        if isinstance(item, fx.Node):
            if item.graph is self.graph and self.writes.touch(item):
                return self._written(item, index, place, tensor)
            if item.op not in ("call_function", "call_method") or item.kwargs.get("out") is not None:
                raise NotUnderstood("an input")
            place = place.at(self._order().get(item, place.time))
        return self._result(item, operation(item), index, place, tensor)

    def _result(self, item: Value, name: str, index: Index, place: Standpoint, tensor: Tensor) -> Scalar:
        """What the operation `name` of `item` gives."""
        viewed = source_of(item, index)
        if viewed is not None:
            return self.read(*viewed, place)
        filling = fill(item)
        if filling is not None:
            return self._cast(self.number(filling, place), tensor.dtype)
        if name in CASTS:
            return self._cast(self.read(item.args[0], index, place), tensor.dtype)
        special = MAKERS.get(name)
        if special is not None:
            return self._cast(special(self, item, index, place), tensor.dtype)
        if name in ("div", "divide") and item.kwargs.get("rounding_mode") == "floor":
            name = "floor_divide"
        pointwise = BY_NAME.get(name)
        if pointwise is None:
            raise NotUnderstood(name)
        if name in BITWISE and tensor.dtype != torch.bool:
            raise NotUnderstood("an operation on bits")
        operands = [None if arg is None else self._operand(arg, index, place) for arg in item.args]
        names = {
            key: self._operand(value, index, place) for key, value in item.kwargs.items() if key in _OPERANDS
        }
        if set(item.kwargs) - _OPERANDS - _OPTIONS or item.kwargs.get("alpha", 1) != 1:
            raise NotUnderstood("an argument by name")
        operands += [names.pop(key) for key in ("other", "mask", "value") if key in names]
        if len(operands) not in pointwise.arguments:
            raise NotUnderstood("other arguments")
        low_and_high = {_OPERAND_NAMES[key]: value for key, value in names.items()}
        return self._cast(pointwise.function(*operands, **low_and_high), tensor.dtype)

    def _operand(self, arg: Any, index: Index, place: Standpoint) -> Scalar:
        if isinstance(arg, (fx.Node, Expr)):
            tensor = example_tensor(arg)
            if tensor is not None:
                if tensor.dim() > len(index):
                    raise NotUnderstood("a broadcast")
                return self.read(arg, broadcast(index, sizes_of(tensor)), place)
        return self.number(arg, place)

    def number(self, value: Any, place: Standpoint) -> Scalar:
        """A number in the arguments of a node; a tensor without dims counts as one."""
        if isinstance(value, (fx.Node, Expr)):
            tensor = example_tensor(value)
            if tensor is not None:
                if tensor.dim() != 0:
                    raise NotUnderstood("a number")
                return self.read(value, (), place)
            value = example_value(value)
        if isinstance(value, torch.SymInt):
            self.ranges.shape_env = self.ranges.shape_env or shape_env_of(value)
            return formula.number(known(value))
        if isinstance(value, (bool, int, float)):
            return formula.number(value)
        raise NotUnderstood("a number")

    def _cast(self, scalar: Scalar, dtype: torch.dtype) -> Scalar:
        """`scalar` in `dtype`. Raises NotUnderstood where that changes it, but for rounded constants."""
        if dtype == torch.bool:
            return as_condition(scalar)
        if isinstance(scalar, Condition):
            return choice(scalar, ONE, ZERO)
        if isinstance(scalar, Conditional):
            return choice(scalar.condition, self._cast(scalar.chosen, dtype), self._cast(scalar.other, dtype))
        if isinstance(scalar, Extreme):
            return Extreme(scalar.largest, tuple(self._cast(part, dtype) for part in scalar.numbers))
        if isinstance(scalar, Data):
            tensor = example_tensor(scalar.node)
            if tensor is None or tensor.dtype != dtype:
                raise NotUnderstood("data in another dtype")
            return scalar
        value = scalar.number if isinstance(scalar, Real) else constant_of(scalar)
        if isinstance(value, (int, float)):
            return formula.number(_rounded(value, dtype))
        assert isinstance(scalar, Linear)
        # Lengths that int32 does not hold have no arange of int32, and are none of attention's.
        if dtype != torch.int64 and (dtype != torch.int32 or any(map(_is_long, data_of(scalar)))):
            least, most = self.ranges.least(scalar), self.ranges.most(scalar)
            if least is None or most is None or not (_first(dtype) <= least and most <= _last(dtype)):
                raise NotUnderstood(f"{dtype} may not hold it")
        return scalar

    def _as_data(self, item: Any, index: Index) -> Scalar:
        tensor = example_tensor(item) if isinstance(item, fx.Node) else None
        if tensor is None or not self._stands_alone(item) or self.writes.touch(item):
            raise NotUnderstood("no data")
        if tensor.dtype == torch.bool:
            return Holds(Data(item, index))
        if tensor.is_floating_point() or tensor.is_complex():
            return Data(item, index)
        return data(item, index)

    def _stands_alone(self, node: fx.Node) -> bool:
        """Whether `node` has its value outside of functorch's transforms and subgraphs, where it can be read."""
        return node.graph is self.graph and node not in self.transformed

    # Writes in place

    def _written(self, item: fx.Node, index: Index, place: Standpoint, tensor: Tensor) -> Scalar:
        """An element of `item`, whose memory something writes to, as it is at the time of `place`."""
        order = self._order()
        storage = storage_id(tensor)
        if storage is None:
            raise NotUnderstood("memory that is not known")
        source = item.args[0] if item.args and isinstance(item.args[0], fx.Node) else None
        if not writes_in_place(item) and source is not None:
            before = example_tensor(source)
            if before is not None and storage_id(before) == storage:  # a view shows what lies there now
                return self._result(item, operation(item), index, place, tensor)
        whole = _memory(item)
        for writer, targets, _ in reversed(self.writes.writers):
            if writer not in order or order[writer] >= place.time or not self._may_reach(targets, tensor):
                continue
            if len(targets) != 1 or _memory(targets[0]) is not whole:
                raise NotUnderstood("a write by way of a view")
            return self._after(writer, index, place.at(order[writer]))
        if item.op not in ("call_function", "call_method") or writes_in_place(item):
            raise NotUnderstood("an input")
        return self._result(item, operation(item), index, place.at(order[item]), tensor)

    def _may_reach(self, targets: list[fx.Node], tensor: Tensor) -> bool:
        storages = [storage_id(found) for found in map(example_tensor, targets) if found is not None]
        return not storages or None in storages or storage_id(tensor) in storages

    def _after(self, writer: fx.Node, index: Index, place: Standpoint) -> Scalar:
        """The element at `index` that `writer` left."""
        name, target = operation(writer), writer.args[0] if writer.args else None
        tensor = example_tensor(target) if isinstance(target, fx.Node) else None
        if tensor is None or writer.kwargs.get("out") is not None:
            raise NotUnderstood("a write")
        if name == "setitem":
            condition, inner = within(whole_index(writer.args[1], tensor.dim()), index, tensor, self.ranges)
            written = self._cast(self._operand(writer.args[2], inner, place), tensor.dtype)
            before = self.read(target, index, place)
            return choice(self.ranges.simplified(condition), written, before)
        if name in ("fill_", "zero_"):
            value = self.number(writer.args[1], place) if name == "fill_" else ZERO
            return self._cast(value, tensor.dtype)
        base = IN_PLACE.get(name, name.removesuffix("_"))
        if base == name or (base not in BY_NAME and base not in MAKERS):
            raise NotUnderstood(name)
        return self._result(writer, base, index, place, tensor)


def _is_plain(index: Index) -> bool:
    """Whether a tensor is read as it stands: at the indices themselves, and nowhere else."""
    return all(at == ZERO or at in _INDICES for at in index)


def _is_long(read: Data) -> bool:
    tensor = example_tensor(read.node)
    return tensor is None or tensor.dtype == torch.int64


def _memory(node: fx.Node) -> fx.Node:
    """The node that made the tensor which `node`, by writing into it, gives back."""
    while writes_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


@lru_cache(maxsize=1024)
def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` holds it."""
    if not dtype.is_floating_point:
        if not (isinstance(value, int) and _first(dtype) <= value <= _last(dtype)):
            raise NotUnderstood(f"{dtype} does not hold {value}")
        return value
    with outside_fake_tensors(), torch.no_grad():
        return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).item())


def _last(dtype: torch.dtype) -> int:
    """The number up to which `dtype` holds all whole numbers."""
    if dtype.is_floating_point:
        return int(2 / torch.finfo(dtype).eps)
    return torch.iinfo(dtype).max


def _first(dtype: torch.dtype) -> int:
    return -_last(dtype) if dtype.is_floating_point else torch.iinfo(dtype).min
