"""The time in which requests wait for a model that was lost, before they are told that it is not there."""

import asyncio
import time
from collections.abc import Callable

from dairllm.telemetry import Readiness

__all__ = ["Recovery"]


class Recovery:
    """Begins when a model is lost, ends when it is back or when the time is over.

    Args:
        readiness: its `waiting_until` says whether requests wait.
        seconds: that they do, counted from the loss.
        over: called when so many have passed.
    """

    def __init__(self, readiness: Readiness, seconds: float, over: Callable[[], None]) -> None:
        self.seconds = seconds
        self._readiness, self._over = readiness, over
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether requests wait for the model."""
        return self._timer is not None

    def begin(self) -> None:
        """The model was lost. Of no effect while one is running already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._expire)
            self._readiness.waiting_until = time.monotonic() + self.seconds

    def end(self) -> None:
        """The model is back, or nobody is to wait for it any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._readiness.waiting_until = None

    def _expire(self) -> None:
        self.end()
        self._over()
