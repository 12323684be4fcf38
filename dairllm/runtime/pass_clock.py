"""How long passes take: the one that is running, and what is usual.

A node that hangs in the middle of a pass says nothing, and neither does one that is slow. What tells them apart is what is
usual. A pass of the same cluster takes about the same time again, a batch of a prompt in proportion to its rows.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

__all__ = ["PassClock"]

FIRST_SECONDS = 60.0
"""Silence allowed while nothing is usual: first passes read weights from cold disks. Also the most that ten usual passes come to."""
FLOOR_SECONDS = 5.0
"""Silence that is always allowed: a machine may swap, or do something else."""
USUAL_TIMES = 10
FEW = 4
"""Passes before which nothing is usual."""
_REMEMBERED = 15
"""Of each size: a median of so many follows a context that grows, and forgets a pass that was slow by chance."""


class PassClock:
    """One model's, from opening to opening.

    Args:
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begun: float | None = None
        self._took: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        """Seconds of passes by size: 1 row, 2 or 3, 4 to 7, ..."""
        self._passes = 0

    @property
    def running_seconds(self) -> float:
        """How long the pass in hand has been running; 0 where none is."""
        return 0.0 if self._begun is None else self._now() - self._begun

    def forget(self) -> None:
        """The model is opened anew: what was usual may not be so any more."""
        self._took.clear()
        self._passes = 0

    @contextmanager
    def running(self, rows: int) -> Iterator[None]:
        """A pass of so many rows. One that fails says nothing of what is usual."""
        self._begun = begun = self._now()
        try:
            yield
            self._took[rows.bit_length()].append(self._now() - begun)
            self._passes += 1
        finally:
            self._begun = None

    def usual_seconds(self, rows: int) -> float | None:
        """Of a pass of so many rows; None while nothing is usual.

        Where there was none of that size, it is taken from others: no longer than a larger one, in proportion to a smaller one.
        """
        if self._passes < FEW:
            return None
        if known := self._took.get(rows.bit_length()):
            return float(median(known))
        return float(min(median(took) * max(1.0, rows / 2 ** (size - 1)) for size, took in self._took.items()))

    def silence(self, rows: int) -> float:
        """Seconds without a byte after which a node is given up in a pass of so many rows.

        Ten usual passes, but at least 5 s, and at most 60 s or two passes, whichever is longer.
        """
        usual = self.usual_seconds(rows)
        if usual is None:
            return FIRST_SECONDS
        return max(FLOOR_SECONDS, min(USUAL_TIMES * usual, max(FIRST_SECONDS, 2 * usual)))
