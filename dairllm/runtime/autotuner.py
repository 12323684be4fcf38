"""A choice between ways that give the same bits, made by trying each for a while on the work that is to be done anyway."""

import statistics
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

__all__ = ["Trial"]

T = TypeVar("T", bound=Hashable)

_ROUNDS = 2
_CLEARLY = 0.97
"""Another way than the first is taken where a pass takes at most so much of the first's time."""


class Trial(Generic[T]):
    """Told of each pass, it says in which way the next is to be computed.

    Args:
        ways: the first of them by default.
        passes: in one way before the next is tried, twice over.
        settling: of them, how many do not count yet: they still have what the way before has left.

    Attributes:
        way: of the next pass.
        over: whether it stays.
    """

    def __init__(self, ways: Sequence[T], *, passes: int = 1, settling: int = 0) -> None:
        self._ways, self._passes, self._settling = tuple(ways), passes, settling
        self._seconds: dict[T, list[float]] = {way: [] for way in ways}
        self._count = 0
        self.way, self.over = ways[0], len(ways) == 1

    def passed(self, seconds: float) -> None:
        """A pass took so long."""
        if self.over:
            return
        if self._count % self._passes >= self._settling:
            self._seconds[self.way].append(seconds)
        self._count += 1
        turn = self._count // self._passes
        if turn < _ROUNDS * len(self._ways):
            self.way = self._ways[turn % len(self._ways)]
            return
        taken = {way: statistics.median(found) for way, found in self._seconds.items()}
        best = min(taken, key=lambda way: taken[way])
        self.way = best if taken[best] <= _CLEARLY * taken[self._ways[0]] else self._ways[0]
        self.over = True
