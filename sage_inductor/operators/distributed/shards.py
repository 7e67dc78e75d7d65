"""How a shard of keys and values comes to the other ranks of a ring while they attend to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from torch import Tensor

from sage_inductor.operators.distributed.peers import Peers, peers_of
from sage_inductor.torch_internals.distributed import arrived, sent_to_next

Shard: TypeAlias = tuple[Tensor, ...]
"""What travels of a rank's keys and values: dense tensors of one dim."""

_ALIGNED = 256  # bytes; where the tensors of a shard begin
_LEAST = 1 << 20  # bytes of a shard below which collectives take no longer
# Flags of a rank: whether it may write into another rank's memory, whether what another sent is there.
_ROOM = 0


class Shards(Protocol):
    """The shards that a rank of a ring attends to: in turn its own, that of the rank before it, and so on."""

    def of_turn(self, turn: int) -> Shard: ...

    def attended(self, turn: int) -> None:
        """What was computed of this turn's shard is all that is."""

    def end(self) -> None: ...


def shards_of(
    group_name: str, rank: int, ranks: int, own: Shard, is_seen: Callable[[int, int], bool]
) -> Shards:
    """The shards of a ring's turns, as alike on all ranks; `is_seen(rank, turn)`: whether that rank attends to anything of that turn's."""
    sizes = list(_places(own))
    slot = sizes[-1]
    peers = None
    if slot >= _LEAST and ranks > 1:
        first = [_ROOM + (rank + turn) % ranks for turn in range(1, min(ranks, 3))]
        peers = peers_of(group_name, "ring", 2 * slot, own[0].device, first)
    if peers is None:
        return SentOn(group_name, rank, ranks, own)
    return Written(peers, own, is_seen)


def _places(shard: Shard) -> Iterator[int]:
    """Where each tensor of `shard` begins, and where the last ends, in bytes."""
    at = 0
    for tensor in shard:
        yield at
        at += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    yield at


class SentOn:
    """Each rank sends what it attends to on to the next, by collectives."""

    def __init__(self, group_name: str, rank: int, ranks: int, own: Shard) -> None:
        self._ring = group_name, rank, ranks
        self._coming: Shard = own

    def of_turn(self, turn: int) -> Shard:
        shard = self._coming if turn == 0 else tuple([arrived(tensor) for tensor in self._coming])
        if turn < self._ring[2] - 1:  # on its way while this one is attended to
            self._coming = tuple([sent_to_next(tensor, *self._ring) for tensor in shard])
        return shard

    def attended(self, turn: int) -> None:
        pass

    def end(self) -> None:
        pass


class Written:
    """Each rank writes its own shard into the memory of the others, in the order in which they attend to it.

    A rank has room for two: turns 1, 3, ... and 2, 4, ... It tells the rank that will write there next when it has attended to what is
    there; after the last turns of a call that is for the first of the next call.
    """

    def __init__(self, peers: Peers, own: Shard, is_seen: Callable[[int, int], bool]) -> None:
        self._peers, self._own = peers, own
        self._places = list(_places(own))
        self._half = peers.memory.shape[0] // 2  # the same for shards of all sizes
        self._half -= self._half % _ALIGNED
        queue = peers.outgoing
        queue.after(peers.current)
        for turn in range(1, peers.ranks):
            to = (peers.rank + turn) % peers.ranks
            queue.wait(_ROOM + to)
            if is_seen(to, turn):
                for tensor, at in zip(own, self._places, strict=False):
                    queue.copy(to, self._slot(turn) + at, 0, tensor.unsqueeze(0))
            queue.signal(to, peers.ranks + peers.rank)

    def _slot(self, turn: int) -> int:
        return self._half * ((turn - 1) % 2)

    def of_turn(self, turn: int) -> Shard:
        if turn == 0:
            return self._own
        peers = self._peers
        peers.current.wait(peers.ranks + (peers.rank - turn) % peers.ranks)
        begin = self._slot(turn)
        return tuple(
            [
                _like(peers.memory, begin + at, tensor)
                for tensor, at in zip(self._own, self._places, strict=False)
            ]
        )

    def attended(self, turn: int) -> None:
        if turn == 0:
            return
        peers = self._peers
        following = turn + 2 if turn + 2 < peers.ranks else 2 - turn % 2
        peers.current.signal((peers.rank - following) % peers.ranks, _ROOM + peers.rank)

    def end(self) -> None:
        self._peers.current.after(self._peers.outgoing)  # reads this rank's tensors


def _like(memory: Tensor, at: int, tensor: Tensor) -> Tensor:
    """What lies at byte `at` of `memory`, as long and of the dtype of `tensor`."""
    size = tensor.numel() * tensor.element_size()
    found: Tensor = memory[at : at + size].view(tensor.dtype)
    return found
