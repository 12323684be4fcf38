"""How many threads compute and how many read while a node pages: found by trying, while tokens are generated.

Reading takes processor time, so beside it fewer compute threads may be faster: where disk and arithmetic take about as long, on few
processors, by a tenth. What is best depends on the processors, the disk, the room and on what else the machine does, so it is measured
where it matters: over the passes of one row that are computed anyway. Threads change no bit of the result.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Effort", "EffortTrial", "possible_efforts"]

_ROUNDS = 2
_PASSES = 3
"""Of one effort in a row; the first still has what the one before has read."""
_CLEARLY = 0.97
"""Another than the first is taken where a pass takes at most so much of the first's time."""


class Effort(NamedTuple):
    """Attributes:
    threads: that compute.
    readers: that read.
    """

    threads: int
    readers: int


def possible_efforts(threads: int | None, readers: int | None, *, most_threads: int, first_readers: int) -> list[Effort]:
    """Efforts worth a trial, the first to be had until another proves better.

    Args:
        threads: as somebody wants it; None: any.
        readers: likewise.
        most_threads: that can compute.
        first_readers: that reading alone was fastest with, of 1 and 2.
    """
    computing = [most_threads, most_threads - 1, most_threads // 2] if threads is None else [min(threads, most_threads)]
    reading = [first_readers, 3 - first_readers] if readers is None else [readers]
    return list(dict.fromkeys(Effort(max(t, 1), r) for t in computing for r in reading))


class EffortTrial:
    """Told of each pass, it says with which effort the next is to be computed.

    Args:
        efforts: the first of them by default.

    Attributes:
        effort: of the next pass.
        over: whether it stays.
    """

    def __init__(self, efforts: Sequence[Effort]) -> None:
        self._efforts = tuple(efforts)
        self._seconds: dict[Effort, list[float]] = {effort: [] for effort in efforts}
        self._passes = 0
        self.effort, self.over = efforts[0], len(efforts) == 1

    def passed(self, seconds: float) -> None:
        """A pass of one row, right after another one, took so long."""
        if self.over:
            return
        if self._passes % _PASSES:
            self._seconds[self.effort].append(seconds)
        self._passes += 1
        turn = self._passes // _PASSES
        if turn < _ROUNDS * len(self._efforts):
            self.effort = self._efforts[turn % len(self._efforts)]
            return
        taken = {effort: statistics.median(found) for effort, found in self._seconds.items()}
        best = min(taken, key=lambda effort: taken[effort])
        self.effort = best if taken[best] <= _CLEARLY * taken[self._efforts[0]] else self._efforts[0]
        self.over = True
