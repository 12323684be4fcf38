"""Compute threads with faults: real ones, whose kernels raise or do not come back when they are told to."""

import ctypes
import os
import threading
import time
from collections.abc import Callable

from dairllm.errors import EngineError
from dairllm.kernels.mailbox import MAILBOX_EVENTFD, MAILBOX_STOP
from dairllm.kernels.objects.entry import Entry, load_entry

__all__ = ["RAISED", "FaultyThreads"]

RAISED = "the kernels raised an exception"


class FaultyThreads:
    """An entry of the kernels whose threads ask before each call which fault they are to have.

    Args:
        fault: (thread) -> "raise", "hang", "leave", or None: then the call is computed.

    Attributes:
        released: set by a test's end, so that threads that hang leave.
    """

    def __init__(self, fault: Callable[[int], str | None]) -> None:
        self._real, self._fault, self.released = load_entry(), fault, threading.Event()
        self.entry = Entry(self._run_threads, self._real.ring, None)

    def _run_threads(self, mailbox: int, thread: int, n_threads: int, guest: int) -> None:
        if guest:
            if not self._has_left(thread):
                self._real.run_threads(mailbox, thread, n_threads, 1)
            return
        seen = 0
        while True:
            while _word(mailbox) == seen:
                time.sleep(0.0002)
            seen += 1
            if _word(mailbox + MAILBOX_STOP) or self._has_left(thread):
                return
            self._real.run_threads(mailbox, thread, n_threads, 1)
            if thread == 0 and not _word(mailbox + MAILBOX_STOP):
                os.eventfd_write(_word(mailbox + MAILBOX_EVENTFD), 1)

    def _has_left(self, thread: int) -> bool:
        match self._fault(thread):
            case "raise":
                raise EngineError(RAISED)
            case "hang":
                self.released.wait()
                return True
            case fault:
                return fault == "leave"


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value
