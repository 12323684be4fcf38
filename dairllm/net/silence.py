"""How long one direction of a connection may stand still."""

import asyncio
import math
from collections.abc import Callable

__all__ = ["Silence"]


class Silence:
    """The deadline of whoever waits for one direction of a connection, counted from its last byte.

    There is one timer, re-armed only when it fires: a wait that ends in time costs none.

    Args:
        moved_at: the loop's time of the last byte, asked when the timer fires.
        expire: called with the seconds that were allowed once nothing has moved for so long.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, moved_at: Callable[[], float], expire: Callable[[float], None]) -> None:
        self._loop, self._moved_at, self._expire = loop, moved_at, expire
        self._allowed, self._begun = math.inf, 0.0
        self._awaited = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, allowed: float) -> None:
        """Somebody waits from now on, and gives up after `allowed` seconds without a byte; infinite: never."""
        self._awaited, self._allowed, self._begun = True, allowed, self._loop.time()
        due = self._begun + allowed
        if self._timer is None or self._timer.when() > due:
            self._arm(due)

    def end(self) -> None:
        """Nobody waits any more."""
        self._awaited = False

    def cancel(self) -> None:
        """The connection is over: nothing will be waited for."""
        self._awaited = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._moved_at, self._expire = _never, _nothing  # they hold the connection, which holds this

    def _arm(self, due: float) -> None:
        if math.isfinite(due):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        """The timer fired: is anybody still waiting, and has nothing moved?"""
        self._timer = None
        if not self._awaited:
            return
        due = max(self._begun, self._moved_at()) + self._allowed
        if self._loop.time() < due:
            self._arm(due)
        else:
            self._expire(self._allowed)


def _never() -> float:
    return -math.inf


def _nothing(_allowed: float) -> None:
    pass
