"""Signals that end a program: heard whatever the event loop does, and obeyed within a deadline.

The system's own handler, which runs at once, writes the signal's number into a pipe, and a thread that
reads nothing else tells the loop of it. So a loop that hangs does not keep a signal from being heard:
from the first one on the process has so many seconds left. When they are over it says where each thread
is and ends (exit code 1); should even that hang, because nobody reads what is said, the system's alarm
ends it a second later.
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Signals"]

_END = 0
"""Of the thread; no signal has this number."""


class Signals:
    """A context, of the main thread and its running loop, in which SIGTERM, SIGINT and SIGHUP are heard.

    A SIGHUP that the process was started to ignore (`nohup`) stays ignored.

    Args:
        told: called on the loop with each signal.
        deadline: seconds from the first signal to the end of the process, which nothing calls off;
            None: there is none.
    """

    def __init__(self, told: Callable[[signal.Signals], None], *, deadline: float | None = None) -> None:
        self._told, self._deadline = told, deadline
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[signal.Signals, Any] = {}
        self._is_counting = False

    def __enter__(self) -> "Signals":
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {signum: signal.signal(signum, self._handle) for signum in heard}
        for signum in heard:
            signal.siginterrupt(signum, False)
        if self._deadline is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._writer, bytes([_END]))
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        """Python's own handler, on the main thread between two of its steps: the thread may not run
        while native code on this one keeps the interpreter."""
        self._count_down()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number == _END:
                    return
                if number not in self._handlers:  # somebody else's
                    self._pass_on(number)
                    continue
                self._count_down()
                with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                    self._loop.call_soon_threadsafe(self._told, signal.Signals(number))

    def _pass_on(self, number: int) -> None:
        if self._wakeup >= 0:
            with contextlib.suppress(OSError):
                os.write(self._wakeup, bytes([number]))

    def _count_down(self) -> None:
        if self._deadline is None or self._is_counting:
            return
        self._is_counting = True
        signal.setitimer(signal.ITIMER_REAL, self._deadline + 1)
        # No stderr, or none of the system's: then the alarm alone.
        with contextlib.suppress(AttributeError, OSError, ValueError, RuntimeError):
            faulthandler.dump_traceback_later(self._deadline, exit=True, file=sys.stderr)
