"""Where log lines go: a stream that may be full, slow or gone, which must never be the program's
trouble.

A line that cannot be written is counted and dropped. As soon as one can be written again, a line
before it says how many were lost. What was written of a line before the disk was full stays as a torn
line; the next one begins on a line of its own.
"""

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import TextIO

__all__ = ["LogSink"]

PATIENCE_SECONDS = 0.2
"""That a reader who lags behind is waited for, once: until he reads again lines are dropped, so that
an event loop is not held up."""

_PIECE = select.PIPE_BUF
"""Bytes that a pipe which has room takes at once."""


class LogSink:
    """A text stream for log lines, whole ones, which never raises. Of any thread.

    Args:
        stream: stderr, or what stands for it; None where the process has none: then nothing is written.
        told: the line, newline included, that says how many were lost.
    """

    def __init__(self, stream: TextIO | None, told: Callable[[int], str]) -> None:
        self._stream, self._told = stream, told
        self._lock = threading.RLock()  # a signal's handler may log while its own thread does
        self._torn = False
        self.lost = 0
        """Lines since the last one that was written."""

    def isatty(self) -> bool:
        """Whether somebody reads it at a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, line: str) -> int:
        """Write a line, or count it as lost. Returns what a stream would."""
        with self._lock:
            if self.lost and self._put(self._told(self.lost)):
                self.lost = 0
            if self.lost or not self._put(line):
                self.lost += 1
        return len(line)

    def flush(self) -> None:
        """Nothing is held back."""

    def _put(self, line: str) -> bool:
        """Whether all of it was written."""
        stream = self._stream
        if stream is None:
            return True
        text = "\n" + line if self._torn else line
        try:
            with contextlib.suppress(OSError):  # what others have left in its buffer; it is their loss
                stream.flush()
            try:
                descriptor = stream.fileno()
            except OSError:  # none of the system's
                stream.write(text)
                return True
            return self._put_bytes(descriptor, text.encode("utf-8", "backslashreplace"))
        except (OSError, ValueError):  # no reader, no room, no stream any more
            return False

    def _put_bytes(self, descriptor: int, data: bytes) -> bool:
        done = 0
        patience = 0.0 if self.lost else PATIENCE_SECONDS
        try:
            while done < len(data) and _has_room(descriptor, patience):
                done += os.write(descriptor, data[done : done + _PIECE])
        finally:
            if done:
                self._torn = not data[:done].endswith(b"\n")
        return done == len(data)


def _has_room(descriptor: int, patience: float) -> bool:
    """Whether a write would not wait, by `patience` seconds from now. Plain files always have; so has what is broken, to say so."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(patience * 1000))
