"""How the tiles of an attention call are dealt out to the multiprocessors.

A tile is 64 to 192 queries of one head over all of their keys. With 132 multiprocessors and 140 tiles of one length, 8 tiles
would be left for a second round in which 124 multiprocessors idle. The last tiles are split over keys instead, so that
every multiprocessor has as much to do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# Splitting tiles costs a launch and the traffic of the parts, about what this many blocks take.
_SPLIT_BLOCKS = 12
_LEAST_BLOCKS = 4  # of one program


class Share(NamedTuple):
    """How tiles are dealt out to `grid` programs, one for each multiprocessor.

    Tiles 0 .. whole - 1 are computed undivided; a program takes the next one when it is free. The other tiles have `units`
    blocks of 128 keys together, which all programs share in equal parts: a part may end one tile and begin the next.
    """

    grid: int
    whole: int
    units: int


def part_starts(work: Share, blocks: int) -> list[tuple[int, int]]:
    """Where the parts begin that do not begin with their tile: (tile, block), for tiles of `blocks` key blocks each."""
    places = (
        [divmod(work.units * program // work.grid, blocks) for program in range(work.grid)]
        if work.units
        else []
    )
    return [(work.whole + tile, block) for tile, block in places if block]


@lru_cache(maxsize=4096)
def share(tiles: int, blocks: int, processors: int) -> Share:
    """The share of each program, for `tiles` of `blocks` key blocks each. `blocks` is 0 where tiles differ in length, as
    under a causal mask; such tiles are not split. `processors` is the number of multiprocessors."""
    rest = tiles % processors
    if blocks and tiles < processors:
        grid = min(processors, max(tiles, tiles * blocks // _LEAST_BLOCKS))
        if blocks - tiles * blocks // grid > _SPLIT_BLOCKS:
            return Share(grid, 0, tiles * blocks)
    elif rest and blocks - blocks * rest // processors > _SPLIT_BLOCKS:
        # The last full round is dealt out together with the rest, so that no program has more than two parts.
        return Share(processors, tiles - rest - processors, (rest + processors) * blocks)
    return Share(min(tiles, processors), tiles, 0)
