"""A choice between configurations that give the same bits, made by trying each for a while on the work that is to be done anyway."""

import statistics
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

__all__ = ["Autotuner"]

T = TypeVar("T", bound=Hashable)

_ROUNDS = 2
_CLEARLY = 0.97
"""Another configuration than the first is taken where a pass takes at most so much of the first's time."""


class Autotuner(Generic[T]):
    """Told of each pass, it says with which configuration the next is to be computed.

    Args:
        configurations: the first of them by default.
        passes: with one before the next is tried, twice over.
        settling: of them, how many do not count yet: they still have what the one before has left.

    Attributes:
        configuration: of the next pass.
        over: whether it stays.
    """

    def __init__(self, configurations: Sequence[T], *, passes: int = 1, settling: int = 0) -> None:
        self._configurations, self._passes, self._settling = tuple(configurations), passes, settling
        self._seconds: dict[T, list[float]] = {configuration: [] for configuration in configurations}
        self._count = 0
        self.configuration, self.over = configurations[0], len(configurations) == 1

    def passed(self, seconds: float) -> None:
        """A pass took so long."""
        if self.over:
            return
        if self._count % self._passes >= self._settling:
            self._seconds[self.configuration].append(seconds)
        self._count += 1
        turn = self._count // self._passes
        if turn < _ROUNDS * len(self._configurations):
            self.configuration = self._configurations[turn % len(self._configurations)]
            return
        taken = {configuration: statistics.median(found) for configuration, found in self._seconds.items()}
        best = min(taken, key=lambda one: taken[one])
        self.configuration = best if taken[best] <= _CLEARLY * taken[self._configurations[0]] else self._configurations[0]
        self.over = True
