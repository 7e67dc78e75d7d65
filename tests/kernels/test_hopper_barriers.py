"""The barriers of K's and V's tiles in hopper/attention.cu: a model of its producer and its two or three warpgroups, step by step as
the code has them, in random order, over lists of blocks (BLOCK_LIST) and where blocks are left out (SKIP). What it is for is shown by
protocols that lack one of the steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

Block = tuple[int, int]  # tile of queries, block of keys
Wait = Callable[[], bool] | None
Program = Generator[Wait, None, None]

NOTHING, HELD = -1, -2


class Fault(Exception):
    """What must not happen."""


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.loads = self.phase = 0

    def arrive(self, loads: int = 0) -> None:
        if self.pending == 0:
            raise Fault("arrival beyond the count")
        self.loads += loads
        self.pending -= 1
        self._end()

    def come(self) -> None:
        self.loads -= 1
        self._end()

    def _end(self) -> None:
        if self.pending == 0 and self.loads == 0:
            self.phase ^= 1
            self.pending = self.count

    def is_over(self, parity: int) -> bool:
        return self.phase != parity


@dataclass
class Tiles:
    """Those of K or of V: what each holds, who reads it, and what is on its way."""

    stages: int
    consumers: int
    full: list[Barrier] = field(init=False)
    empty: list[Barrier] = field(init=False)
    held: list[Block | None] = field(init=False)
    readers: list[int] = field(init=False)
    coming: list[tuple[int, Block]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.full = [Barrier(1) for _ in range(self.stages)]
        self.empty = [Barrier(self.consumers) for _ in range(self.stages)]
        self.held, self.readers = [None] * self.stages, [0] * self.stages

    def load(self, stage: int, block: Block) -> None:
        self.full[stage].arrive(loads=1)
        self.coming.append((stage, block))

    def come(self, number: int) -> None:
        stage, block = self.coming.pop(number)
        if self.readers[stage]:
            raise Fault("a tile is overwritten while it is read")
        self.held[stage] = block
        self.full[stage].come()

    def read(self, stage: int, block: Block, readers: int) -> None:
        if self.held[stage] != block:
            raise Fault("another block's tile is read")
        self.readers[stage] += readers


@dataclass(frozen=True)
class Part:
    """What a program reads of a tile's list of blocks: entries begin .. end - 1, or, where there are none, entry `begin`, all of it
    masked. Without a list the entries are all blocks."""

    entries: list[int]
    begin: int
    end: int

    @classmethod
    def drawn(cls, choose: random.Random) -> Part:
        """All of a list, or a share of it, of which there may be nothing. The entry behind an empty list is there, too."""
        blocks = choose.choice([1, 2, 3, 5, 9, 24])
        listed = choose.randint(0, min(blocks, 9))
        entries = sorted(choose.sample(range(blocks), listed)) or [0]
        first = choose.randrange(blocks)
        count = choose.randint(1, blocks - first)
        if choose.random() < 0.5:
            first, count = 0, blocks
        return cls(entries, first * listed // blocks, (first + count) * listed // blocks)

    def blocks(self) -> list[int]:
        """As the producer walks them."""
        return self.entries[self.begin : max(self.end, self.begin + 1)]


class Model:
    """Of one program, by the loop of the consumers: "skip", where blocks are left out, "beside", where a product goes on during
    the next softmax, or "in turn", where there are three warpgroups. `lacking` is a rule that it does not keep."""

    def __init__(self, seed: int, stages: int, lacking: str = "", loop: str = "skip") -> None:
        self.random = choose = random.Random(seed)
        self.stages, self.lacking, self.loop = stages, lacking, loop
        self.consumers = 3 if loop == "in turn" else 2
        self.parts = [Part.drawn(choose) for _ in range(choose.choice([1, 2, 4]))]
        self.blocks = [(tile, i) for tile, part in enumerate(self.parts) for i in part.blocks()]
        share = choose.choice([0.0, 0.3, 0.7, 0.95, 1.0]) if loop == "skip" else 0.0
        first = {(tile, part.blocks()[0]) for tile, part in enumerate(self.parts)}
        self.left_out = [
            {block for block in self.blocks if block not in first and choose.random() < share}
            for _ in range(self.consumers)
        ]
        self.k, self.v = Tiles(stages, self.consumers), Tiles(stages, self.consumers)
        self.multiplied: list[set[Block]] = [set() for _ in range(self.consumers)]

    def advanced(self, stage: int, phase: int) -> tuple[int, int]:
        return (stage + 1, phase) if stage + 1 < self.stages else (0, phase ^ 1)

    def producer(self) -> Program:
        k, v = self.k, self.v
        stage, phase = 0, 1
        for tile, part in enumerate(self.parts):
            n = part.begin
            while n < part.end or (n == part.begin and self.lacking != "a block of an empty part"):
                block = (tile, part.entries[n])
                yield partial(k.empty[stage].is_over, phase)
                k.load(stage, block)
                yield None
                yield partial(v.empty[stage].is_over, phase)
                v.load(stage, block)
                yield None
                stage, phase = self.advanced(stage, phase)
                n += 1

    def leave_out(self, number: int, stage: int, phase: int) -> Program:
        if self.lacking != "the wait for V":
            yield partial(self.v.full[stage].is_over, phase)
        self.v.empty[stage].arrive()

    def warpgroup(self, number: int) -> Program:
        k, v, skips, in_turn = self.k, self.v, self.loop == "skip", self.loop == "in turn"
        flight: list[tuple[Tiles, int, Block]] = []  # products

        def multiply(tiles: Tiles, stage: int, block: Block) -> None:
            tiles.read(stage, block, 1)
            flight.append((tiles, stage, block))

        def wait_for_all_but(pending: int) -> None:
            while len(flight) > pending:
                tiles, stage, block = flight.pop(0)
                tiles.read(stage, block, -1)
                if tiles is v:
                    self.multiplied[number].add(block)

        stage = k_stage = phase = k_phase = 0
        yield partial(k.full[0].is_over, 0)
        multiply(k, 0, (0, self.parts[0].entries[self.parts[0].begin]))
        yield None
        wait_for_all_but(0)
        k.empty[0].arrive()
        k_stage, k_phase = self.advanced(k_stage, k_phase)
        for tile, part in enumerate(self.parts):
            previous = NOTHING
            i, end = part.begin, part.end
            if not in_turn:
                if not skips:
                    yield partial(v.full[stage].is_over, phase)
                if i + 1 < end:
                    yield partial(k.full[k_stage].is_over, k_phase)
            while True:
                block = (tile, part.entries[i])
                yield None
                counts = block not in self.left_out[number]
                if counts and not in_turn:  # attend
                    yield None
                    wait_for_all_but(0)
                    if previous >= 0:
                        v.empty[previous].arrive()
                    previous = NOTHING
                    yield None
                if not i + 1 < end:
                    break
                after = (tile, part.entries[i + 1])
                if in_turn:  # go_on_in_turn
                    yield partial(v.full[stage].is_over, phase)
                    multiply(v, stage, block)
                    yield None
                    yield partial(k.full[k_stage].is_over, k_phase)
                    wait_for_all_but(0)
                    v.empty[stage].arrive()
                    yield None
                    multiply(k, k_stage, after)
                    stage, phase = self.advanced(stage, phase)
                    yield None
                    wait_for_all_but(0)
                    k.empty[k_stage].arrive()
                    k_stage, k_phase = self.advanced(k_stage, k_phase)
                    i += 1
                    continue
                if skips and previous < 0:
                    yield partial(k.full[k_stage].is_over, k_phase)
                multiply(k, k_stage, after)
                yield None
                if counts:  # go_on
                    if skips:
                        yield partial(v.full[stage].is_over, phase)
                    multiply(v, stage, block)
                    previous, done = stage, k_stage
                    stage, phase = self.advanced(stage, phase)
                    k_stage, k_phase = self.advanced(k_stage, k_phase)
                    yield None
                    if not skips:
                        yield partial(v.full[stage].is_over, phase)
                    if i + 2 < end:
                        yield partial(k.full[k_stage].is_over, k_phase)
                    wait_for_all_but(1)
                    k.empty[done].arrive()
                    yield None
                else:  # go_on_without
                    yield from self.leave_out(number, stage, phase)
                    stage, phase = self.advanced(stage, phase)
                    done = k_stage
                    k_stage, k_phase = self.advanced(k_stage, k_phase)
                    yield None
                    wait_for_all_but(0)
                    if previous >= 0:
                        v.empty[previous].arrive()
                        previous = HELD
                    k.empty[done].arrive()
                    yield None
                i += 1
            # The last block of the tile, and the first scores of the next.
            if in_turn:
                yield partial(v.full[stage].is_over, phase)
            following: Block | None = None
            if tile + 1 < len(self.parts):
                following = (tile + 1, self.parts[tile + 1].entries[self.parts[tile + 1].begin])
                yield partial(k.full[k_stage].is_over, k_phase)
                if not in_turn:
                    multiply(k, k_stage, following)
            yield None
            if counts:
                if skips:
                    yield partial(v.full[stage].is_over, phase)
                multiply(v, stage, block)
            else:
                yield from self.leave_out(number, stage, phase)
            yield None
            wait_for_all_but(0)
            of_product = stage if counts else previous
            if of_product >= 0:
                v.empty[of_product].arrive()
            if following is not None:
                if in_turn:
                    multiply(k, k_stage, following)
                    yield None
                    wait_for_all_but(0)
                k.empty[k_stage].arrive()
            stage, phase = self.advanced(stage, phase)
            k_stage, k_phase = self.advanced(k_stage, k_phase)
            yield None

    def run(self) -> None:
        """Raises Fault."""
        choose = self.random
        programs = [self.producer(), *(self.warpgroup(number) for number in range(self.consumers))]
        # One of them, or what is on its way, may be much faster or slower than the others.
        count = len(programs)
        speeds = [choose.choice([1.0, 1.0, 10.0, 0.1]) for _ in range(count + 2)]
        waits: dict[int, Wait] = dict.fromkeys(range(count))
        while waits:
            able = [number for number, wait in waits.items() if wait is None or wait()]
            able += [count + which for which, tiles in enumerate((self.k, self.v)) if tiles.coming]
            if not able:
                raise Fault("all wait")
            number = choose.choices(able, [speeds[number] for number in able])[0]
            if number >= count:
                tiles = (self.k, self.v)[number - count]
                tiles.come(choose.randrange(len(tiles.coming)))
                continue
            try:
                waits[number] = next(programs[number])
            except StopIteration:
                del waits[number]
        if self.k.coming or self.v.coming:
            raise Fault("a tile is on its way when the program has ended")
        for multiplied, left_out in zip(self.multiplied, self.left_out, strict=True):
            assert multiplied == set(self.blocks) - left_out


def faults(seeds: range, stages: Sequence[int], lacking: str = "", loop: str = "skip") -> set[str]:
    found = set()
    for seed in seeds:
        try:
            Model(seed, stages[seed % len(stages)], lacking, loop).run()
        except Fault as fault:
            found.add(str(fault))
    return found


LOOPS = ("skip", "beside", "in turn")


@pytest.mark.parametrize("loop", LOOPS)
def test_no_order_of_events_is_a_fault(loop: str) -> None:
    assert faults(range(1500 if loop == "skip" else 700), (2, 3, 4), loop=loop) == set()


@pytest.mark.parametrize(
    ("lacking", "stages", "expected"),
    [
        ("the wait for V", (2, 3, 4), {"all wait", "a tile is overwritten while it is read"}),
    ],
)
def test_each_rule_is_needed(lacking: str, stages: tuple[int, ...], expected: set[str]) -> None:
    assert expected & faults(range(1500), stages, lacking)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_part_without_blocks_has_one_nevertheless(loop: str) -> None:
    """The consumers take one step in any case, which the producer has to bring a tile for."""
    found = faults(range(100), (2, 3, 4), "a block of an empty part", loop)
    assert {"all wait", "another block's tile is read"} & found


def test_parts_without_blocks_are_drawn() -> None:
    parts = [part for seed in range(200) for part in Model(seed, 2).parts]
    assert any(part.begin == part.end for part in parts) and any(len(part.blocks()) > 3 for part in parts)


class Vote:
    """The four warps of a warpgroup, which agree on each block: a named barrier that only those wait at for which the block does
    not count, one word, and the products between the votes."""

    def __init__(self, seed: int, lacking: str = "") -> None:
        self.random = choose = random.Random(seed)
        self.lacking = lacking
        share = choose.choice([0.0, 0.1, 0.5, 1.0])
        self.counts = [[choose.random() < share for _ in range(4)] for _ in range(12)]
        self.word = self.opened = 0
        self.waiting: set[int] = set()  # at the barrier that has not opened
        self.issued = [0] * 4

    def arrive(self, warp: int) -> None:
        if warp in self.waiting:
            raise Fault("a warp arrives twice at a barrier")
        self.waiting.add(warp)
        if len(self.waiting) == 4:
            self.waiting.clear()
            self.opened += 1

    def warp(self, number: int) -> Program:
        for block, counts in enumerate(self.counts):
            ballot = block + 1
            kept = counts[number]
            if kept:
                self.word = ballot
                yield None
                self.arrive(number)
            else:
                opened = self.opened
                self.arrive(number)
                if self.lacking != "the wait of those who found nothing":
                    yield lambda opened=opened: self.opened > opened  # type: ignore[misc]
                yield None
                kept = self.word == ballot
            if kept != any(counts):
                raise Fault("the warps do not agree")
            yield None
            self.issued[number] += 1
            if self.lacking != "a product of the whole warpgroup":
                yield lambda ballot=ballot: min(self.issued) >= ballot  # type: ignore[misc]
            yield None

    def run(self) -> None:
        """Raises Fault."""
        programs = [self.warp(number) for number in range(4)]
        speeds = [self.random.choice([1.0, 1.0, 10.0, 0.1]) for _ in range(4)]
        waits: dict[int, Wait] = dict.fromkeys(range(4))
        while waits:
            able = [number for number, wait in waits.items() if wait is None or wait()]
            if not able:
                raise Fault("all wait")
            number = self.random.choices(able, [speeds[number] for number in able])[0]
            try:
                waits[number] = next(programs[number])
            except StopIteration:
                del waits[number]


def faults_of_votes(lacking: str = "") -> set[str]:
    found = set()
    for seed in range(400):
        try:
            Vote(seed, lacking).run()
        except Fault as fault:
            found.add(str(fault))
    return found


def test_warps_agree_in_every_order() -> None:
    assert faults_of_votes() == set()


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("the wait of those who found nothing", {"the warps do not agree"}),
        ("a product of the whole warpgroup", {"a warp arrives twice at a barrier", "the warps do not agree"}),
    ],
)
def test_each_rule_of_the_vote_is_needed(lacking: str, expected: set[str]) -> None:
    assert expected <= faults_of_votes(lacking)
