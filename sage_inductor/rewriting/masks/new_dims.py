"""Views of a mask, or of what it is made of, that put in dims of one element."""

from __future__ import annotations

from torch import fx

from sage_inductor.graph.call import Expr, Value, example_tensor
from sage_inductor.graph.facts import BROADCASTS, operation
from sage_inductor.graph.sizes import sizes_of
from sage_inductor.graph.writes import Writes
from sage_inductor.rewriting.masks.conjunction import is_function


def new_dims(item: Value, writes: Writes) -> tuple[int, list[int]] | None:
    """How many dims the first argument of `item` has, and where `item` puts new ones of one element. None where it is no
    such view."""
    before = example_tensor(item.args[0]) if item.args and isinstance(item.args[0], (fx.Node, Expr)) else None
    after = example_tensor(item)
    if before is None or after is None or not is_function(item, writes):
        return None
    name, rank = operation(item), before.dim()
    if name == "unsqueeze" and len(item.args) == 2 and isinstance(item.args[1], int):
        return rank, [item.args[1] % (rank + 1)]
    if name in ("view", "reshape") and after.dim() == rank + 1:
        sizes, wanted = sizes_of(after), sizes_of(before)
        places = [
            dim for dim in range(rank + 1) if sizes[dim] == 1 and sizes[:dim] + sizes[dim + 1 :] == wanted
        ]
        return (rank, places[:1]) if places else None
    if name not in ("getitem", "__getitem__"):
        return None
    index = item.args[1] if isinstance(item.args[1], tuple) else (item.args[1],)
    if any(part is not None and part is not Ellipsis and part != slice(None) for part in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        whole = (slice(None),) * (rank - sum(part == slice(None) for part in index))
        index = index[:at] + whole + index[at + 1 :]
    return rank, [dim for dim, part in enumerate(index) if part is None]


def with_dims(item: Value, rank: int, dims: list[int]) -> Value:
    """`item`, which broadcasts to a tensor of `rank` dims, with new ones so that it broadcasts to that tensor with `dims` put
    into it."""
    for dim in dims:
        tensor = example_tensor(item)
        assert tensor is not None
        place = dim - (rank - tensor.dim())
        if place > 0:  # where it would stand in front, it broadcasts
            item = Expr.of("unsqueeze", item, place)
        rank += 1
    return item


def operands(part: Value, names: tuple[str, ...], writes: Writes) -> tuple[str, Value, Value] | None:
    """(name, left, right) of an operation of two tensors that is one of `names`, also where `part` puts new dims into its value:
    those are put into the operands then. The operands are those before they were broadcast."""
    dims, source = new_dims(part, writes), part.args[0] if part.args else None
    if dims is not None and isinstance(source, (fx.Node, Expr)):
        inner = operands(source, names, writes)
        return None if inner is None else (inner[0], with_dims(inner[1], *dims), with_dims(inner[2], *dims))
    if operation(part) not in names or len(part.args) != 2 or part.kwargs or not is_function(part, writes):
        return None
    left, right = part.args
    if not isinstance(left, (fx.Node, Expr)) or not isinstance(right, (fx.Node, Expr)):
        return None
    return operation(part), _before_broadcast(left, writes), _before_broadcast(right, writes)


def _before_broadcast(item: Value, writes: Writes) -> Value:
    while operation(item) in BROADCASTS and isinstance(item.args[0], fx.Node) and is_function(item, writes):
        item = item.args[0]
    return item
