"""How attention is divided among the ranks of a mesh: for each dim of the mesh one tensor dim that is sharded along it.

Batch and heads are independent of one another. Queries are, too, where no query's keys depend on where it stands (no
causality, no window): each rank then has a part of the queries and the whole of K and V. Masks and sinks are sharded by the
dims that they really have: a mask `[1, heads, 1, kv_len]` is whole on every rank of a mesh that shards the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from sage_inductor.graph.sizes import size_hint

Division: TypeAlias = Literal["batch", "heads", "queries", "whole", "ring"]
"""What one dim of a mesh divides. "whole": every rank of it computes the same. "ring": queries, keys and values, of which
those of the other ranks come around."""
DIVISIONS: tuple[Division, ...] = ("batch", "heads", "queries", "whole")


@dataclass(frozen=True)
class Layout:
    """The divisions of a mesh, one for each of its dims, and what they mean for each input and output."""

    divisions: tuple[Division, ...]

    def placements(self, name: str, shape: Sequence[Any], dims: int) -> tuple[Placement, ...]:
        """Placements of the tensor called `name` (query, key, value, grad_output, attn_mask, sink, query_segments,
        key_segments, output) of `shape`, beside a query of `dims` dims."""
        return tuple(_placement(division, name, shape, dims) for division in self.divisions)

    def gradients(self, name: str, shape: Sequence[Any], dims: int) -> tuple[Placement, ...]:
        """Placements of the gradient of `name`: each part of the queries adds to those of the whole K and V."""
        return tuple(
            Partial() if division == "queries" and name in ("key", "value") else placement
            for division, placement in zip(self.divisions, self.placements(name, shape, dims), strict=True)
        )


def _placement(division: Division, name: str, shape: Sequence[Any], dims: int) -> Placement:
    if division == "whole" or (division == "queries" and name in ("key", "value", "key_segments")):
        return Replicate()
    if name in ("query_segments", "key_segments"):  # `[batch, seq]`, or without batch
        if division == "heads":
            return Replicate()
        return Shard(len(shape) - 1) if division == "queries" else Shard(0)
    dim = {"batch": dims - 4, "heads": dims - 3, "queries": dims - 2, "ring": dims - 2}[division]
    if name in ("attn_mask", "sink"):
        # They broadcast from the right, a mask to `[batch, heads, q_len, kv_len]`, a sink to `[batch, heads, q_len]`.
        dim -= (dims if name == "attn_mask" else dims - 1) - len(shape)
        if dim < 0 or size_hint(shape[dim]) == 1:
            return Replicate()
    return Shard(dim)


def choose(tensors: Mapping[str, Any], is_banded: bool, ring: int | None = None) -> Layout:
    """The layout for DTensors `tensors` (query, key, value, and whatever else is given) that moves the fewest elements between
    ranks, those of an output that is placed as the query was among them; of equal ones that of the query, then one that
    divides the work. `is_banded`: which keys a query sees depends on where it stands. `ring` is the dim of the mesh that is
    a ring."""
    query = tensors["query"]
    mesh, dims = query.device_mesh, query.dim()
    ranks = dict.fromkeys(DIVISIONS, 1)  # among which a dim is divided so far
    chosen: list[Division] = []
    for mesh_dim in range(mesh.ndim):
        size = mesh.size(mesh_dim)
        if mesh_dim == ring:
            chosen.append("ring")
            continue
        possible = [
            division
            for division in DIVISIONS
            if _divides(division, tensors, ranks[division] * size, is_banded)
        ]
        own = query.placements[mesh_dim]
        costs: dict[Division, float] = {}
        for division in possible:
            then = {name: _placement(division, name, item.shape, dims) for name, item in tensors.items()}
            costs[division] = sum(
                _moved(item.placements[mesh_dim], then[name], item, size) for name, item in tensors.items()
            )
            # What stands behind will want the output as the query was.
            costs[division] += _moved(then["query"], own, query, size)
        all_whole = all(tensor.placements[mesh_dim] == Replicate() for tensor in tensors.values())

        def rank(division: Division, costs: dict[Division, float] = costs, own: Placement = own) -> Any:
            is_own = _placement(division, "query", query.shape, dims) == own
            return costs[division], not is_own, DIVISIONS.index(division)

        best: Division = "whole" if all_whole else min(possible, key=rank)
        ranks[best] *= size
        chosen.append(best)
    return Layout(tuple(chosen))


def _divides(division: Division, tensors: Mapping[str, Any], ranks: int, is_banded: bool) -> bool:
    """Whether attention falls into `ranks` parts by `division`, none of them empty."""
    query, key = tensors["query"], tensors["key"]
    if division == "whole":
        return True
    if division == "batch":
        return query.dim() == 4 and _fills(query.shape[0], ranks)
    if division == "queries":
        return not is_banded and query.dim() >= 2 and _fills(query.shape[-2], ranks)
    if query.dim() < 3:
        return False
    heads, kv_heads = _size(query.shape[-3]), _size(key.shape[-3])
    # Groups of query heads must stay with their key head.
    return _fills(heads, ranks) if heads == kv_heads else kv_heads % ranks == 0


def _fills(size: Any, ranks: int) -> bool:
    """Whether every rank gets something: five heads on four ranks are two, two, one and none."""
    return -(-_size(size) // ranks) * (ranks - 1) < _size(size)


def _moved(now: Placement, then: Placement, tensor: Tensor, ranks: int) -> float:
    """Elements that reach each rank, about, where a tensor changes its placement along a mesh dim of `ranks`."""
    if now == then or now == Replicate():  # a part of what is there
        return 0.0
    whole = math.prod(_size(size) for size in tensor.shape)
    if then != Replicate():
        return whole / ranks
    return whole * (1 if isinstance(now, Shard) else 2)


def _size(size: Any) -> int:
    return size_hint(size) or 1


def ring_dim(query: Any, key: Any, value: Any) -> int | None:
    """The dim of the mesh along which query, key and value are all sharded by the sequence; None where there is none. Raises
    NotImplementedError for several."""
    found = list(_sequence_dims((query, key, value)))
    if len(found) > 1:
        raise NotImplementedError(
            f"attention with its sequence sharded over {len(found)} dims of a mesh (valid: one)"
        )
    return found[0] if found else None


def _sequence_dims(tensors: Sequence[Any]) -> Iterator[int]:
    for mesh_dim in range(tensors[0].device_mesh.ndim):
        if all(tensor.placements[mesh_dim] == Shard(tensor.dim() - 2) for tensor in tensors):
            yield mesh_dim
