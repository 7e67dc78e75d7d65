"""A dictionary for results that are computed once per kind of call."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(dict[K, V]):
    """A dictionary of at most `size` entries, emptied when it is full. Entries still in use are soon back, and a look-up costs
    no more than a dictionary's. Threads may share it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def keep(self, key: K, value: V) -> V:
        if len(self) >= self.size:
            self.clear()
        self[key] = value
        return value
