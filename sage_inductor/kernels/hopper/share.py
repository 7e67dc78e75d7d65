"""How the tiles of an attention call are dealt out to the multiprocessors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# Splitting tiles costs a launch and the traffic of the parts, about what this many blocks take.
_SPLIT_BLOCKS = 12
_LEAST_BLOCKS = 4  # of one program


class Share(NamedTuple):
    """How tiles are dealt out to `grid` programs: the first `whole` each to whoever is free, `units` blocks of the
    others in equal parts."""

    grid: int
    whole: int
    units: int


@lru_cache(maxsize=4096)
def share(tiles: int, blocks: int, processors: int) -> Share:
    """For `tiles` of `blocks` key blocks each, 0 where they differ."""
    rest = tiles % processors
    if blocks and tiles < processors:
        grid = min(processors, max(tiles, tiles * blocks // _LEAST_BLOCKS))
        if blocks - tiles * blocks // grid > _SPLIT_BLOCKS:
            return Share(grid, 0, tiles * blocks)
    elif rest and blocks - blocks * rest // processors > _SPLIT_BLOCKS:
        # The last full round is dealt out together with the rest, so that no program has more than two parts.
        return Share(processors, tiles - rest - processors, (rest + processors) * blocks)
    return Share(min(tiles, processors), tiles, 0)
