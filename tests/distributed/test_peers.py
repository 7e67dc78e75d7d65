"""Ranks that write into each other's memory: the order of copies and flags, with threads for ranks and for their streams, which take their
time at random. What comes is what was sent, whatever the order in which things get done."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sage_inductor.operators.distributed.peers import Peers
from sage_inductor.operators.distributed.shards import Written
from sage_inductor.operators.distributed.ulysses import HEADS, SEQ, Heads, Room, SequencePart, by_writing
from sage_inductor.operators.distributed.wires import turns

PATIENCE = 30  # seconds that a rank waits before the test counts it as stuck


class Host:
    """The memory and the flags of all ranks."""

    def __init__(self, ranks: int, size: int, first: Callable[[int], list[int]]) -> None:
        self.memory = [torch.full((size,), 0x55, dtype=torch.uint8) for _ in range(ranks)]
        self.flags = [set(first(rank)) for rank in range(ranks)]
        self.changed = threading.Condition()
        self.stuck: list[str] = []


class Now:
    """A queue whose work is done when it is given: the stream that torch's operators are on."""

    def __init__(self, host: Host, rank: int) -> None:
        self.host, self.rank = host, rank

    def after(self, other: Any) -> None:
        other.drain()

    def drain(self) -> None:
        pass

    def copy(self, peer: int, at: int, pitch: int, source: Tensor) -> None:
        rows, columns = source.shape
        for row in range(rows):
            begin = at + row * pitch
            size = columns * source.element_size()
            assert begin + size <= self.host.memory[peer].numel()
            self.host.memory[peer][begin : begin + size].view(source.dtype).copy_(source[row])
            if random.random() < 0.1:
                time.sleep(random.random() * 1e-3)

    def signal(self, peer: int, flag: int) -> None:
        with self.host.changed:
            assert flag not in self.host.flags[peer], "a flag that nobody has taken back is set again"
            self.host.flags[peer].add(flag)
            self.host.changed.notify_all()

    def wait(self, flag: int) -> None:
        with self.host.changed:
            if not self.host.changed.wait_for(lambda: flag in self.host.flags[self.rank], PATIENCE):
                self.host.stuck.append(f"rank {self.rank} waits for flag {flag}")
                raise TimeoutError(self.host.stuck[-1])
            self.host.flags[self.rank].remove(flag)


class Later(Now):
    """A queue whose work is done at some time: a stream of copies."""

    def __init__(self, host: Host, rank: int) -> None:
        super().__init__(host, rank)
        self.work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while (step := self.work.get()) is not None:
            time.sleep(random.random() * 2e-3)
            try:
                step()
            except TimeoutError:
                pass
            finally:
                self.work.task_done()
        self.work.task_done()

    def drain(self) -> None:
        self.work.join()

    def copy(self, peer: int, at: int, pitch: int, source: Tensor) -> None:
        self.work.put(lambda: super(Later, self).copy(peer, at, pitch, source))

    def signal(self, peer: int, flag: int) -> None:
        self.work.put(lambda: super(Later, self).signal(peer, flag))

    def wait(self, flag: int) -> None:
        self.work.put(lambda: super(Later, self).wait(flag))

    def after(self, other: Any) -> None:
        assert not isinstance(other, Later)  # what is done when it is given is done


def on_threads(host: Host, ranks: int, work: Callable[[Peers], None]) -> None:
    """`work` of each rank, side by side."""
    failures: list[str] = []

    def run(rank: int) -> None:
        here, out, back = Now(host, rank), Later(host, rank), Later(host, rank)
        try:
            work(Peers(rank, ranks, host.memory[rank], here, out, back))
        except BaseException as error:
            failures.append(f"rank {rank}: {type(error).__name__}: {error}")
        out.work.put(None)
        back.work.put(None)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not failures and not host.stuck, (failures, host.stuck)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize(("is_causal", "is_balanced"), [(False, False), (True, False), (True, True)], ids=str)
def test_a_shard_stays_until_it_has_been_attended_to(ranks: int, is_causal: bool, is_balanced: bool) -> None:
    random.seed(ranks)
    sizes = [(37, 500), (64, 64), (300, 1), (37, 500)]  # of K and of V, call by call

    def shard(rank: int, call: int) -> tuple[Tensor, Tensor]:
        k, v = sizes[call]
        return torch.full((k,), 100.0 * rank + call), torch.full((v,), rank * 16 + call, dtype=torch.uint8)

    def first(rank: int) -> list[int]:
        return [(rank + turn) % ranks for turn in range(1, min(ranks, 3))]

    def seen(rank: int, turn: int) -> bool:
        return turns(rank, ranks, is_causal, is_balanced)[turn] is not None

    def work(peers: Peers) -> None:
        for call in range(len(sizes)):
            shards = Written(peers, shard(peers.rank, call), seen)
            for turn in range(ranks):
                found, expected = shards.of_turn(turn), shard((peers.rank - turn) % ranks, call)
                for _ in range(2):
                    if seen(peers.rank, turn):
                        assert all(map(torch.equal, found, expected)), (call, turn)
                    time.sleep(random.random() * 5e-3)
                shards.attended(turn)
            shards.end()

    host = Host(ranks, 1 << 14, first)
    on_threads(host, ranks, work)
    assert host.flags == [set(first(rank)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_heads_are_exchanged_for_parts_of_the_sequence(ranks: int) -> None:
    random.seed(ranks)
    torch.manual_seed(ranks)
    batch, head_dim, value_head_dim = 2, 8, 4
    calls = [  # key heads of a rank, queries' heads for each, groups, tokens of a rank
        (3, 2, 2, 5),
        (4, 1, 4, 3),
        (1, 2, 1, 7),
        (3, 2, 3, 5),
    ]
    problems = []
    for key_heads, each, groups, tokens in calls:
        heads, seq = ranks * key_heads, ranks * tokens
        whole = [
            torch.randn(batch, heads * each, seq, head_dim),
            torch.randn(batch, heads, seq, head_dim),
            torch.randn(batch, heads, seq, value_head_dim),
        ]
        expected = F.scaled_dot_product_attention(*whole, enable_gqa=True)
        lse = torch.logsumexp(whole[0] @ whole[1].repeat_interleave(each, 1).mT * head_dim**-0.5, -1)
        problems.append((whole, expected, lse, groups))

    def others(rank: int) -> list[int]:
        return [other for other in range(ranks) if other != rank]

    def work(peers: Peers) -> None:
        for whole, expected, lse, groups in problems:
            query, key, value = (tensor.chunk(ranks, SEQ)[peers.rank] for tensor in whole)
            part = SequencePart(query, key, value, peers.rank, ranks, None)

            def attend(came: list[Tensor], heads: Heads) -> tuple[Tensor, Tensor]:
                for _ in range(2):
                    q, k, v = (tensor.transpose(HEADS, SEQ) for tensor in came)
                    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * head_dim**-0.5
                    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                    time.sleep(random.random() * 5e-3)
                return out, torch.logsumexp(scores, -1)

            for_each = [[part.pieces(heads) for heads in part.heads(to, groups)] for to in range(ranks)]
            output = torch.empty_like(expected.chunk(ranks, SEQ)[peers.rank])
            room = Room(ranks, for_each[peers.rank], output)
            assert room.size <= peers.memory.numel()
            found = by_writing(peers, room, part, for_each, attend, output)
            torch.testing.assert_close(output, expected.chunk(ranks, SEQ)[peers.rank])
            torch.testing.assert_close(found, lse.chunk(ranks, HEADS)[peers.rank])

    host = Host(ranks, 1 << 18, others)
    on_threads(host, ranks, work)
    assert host.flags == [set(others(rank)) for rank in range(ranks)]
