"""Resident compute threads, which live and end together.

None of them ends by itself. Where one does, for any reason, the others would wait for it at a barrier for ever: so it breaks the barriers
of the call in hand, at which the others leave the call, and sends all of them home. The last one to leave says so through the eventfd.
"""

import os
import threading
import time

import numpy as np

from dairllm.engine.allocation import aligned
from dairllm.engine.program import Program
from dairllm.errors import EngineError
from dairllm.kernels.mailbox import MAILBOX_BYTES, MAILBOX_CALL, MAILBOX_EVENTFD, MAILBOX_STOP
from dairllm.kernels.objects.entry import Entry
from dairllm.kernels.sizes import BARRIER_BROKEN, BARRIER_BYTES

__all__ = ["ComputeThreads", "Mailbox"]

_LOOK_SECONDS = 0.05
_STARTING_SECONDS = 1.0
_NEVER = 1 << 61
"""A generation that no mailbox comes to: whoever waits there wakes."""


class Mailbox:
    """Where resident threads wait for calls (dairllm.kernels.mailbox)."""

    def __init__(self, entry: Entry, eventfd: int) -> None:
        self._memory = aligned(MAILBOX_BYTES).view(np.int64)
        self._ring = entry.ring
        self._memory[MAILBOX_EVENTFD // 8] = eventfd
        self._generation = 0
        self.address = self._memory.ctypes.data
        self.call = self._memory.data[MAILBOX_CALL // 8 :]
        """The call, word by word; numpy takes three times as long to write one."""

    def address_to(self, program: Program, end: int) -> None:
        """What of a call stays the same for a program."""
        instructions, state, barrier, scratch = program.addresses
        for word, value in enumerate((instructions, 0, 0, state, barrier, scratch, program.scratch_stride, end)):
            self.call[word] = value

    def ring(self) -> None:
        self._generation += 1
        self._ring(self.address, self._generation)

    def stop(self) -> None:
        """Whoever waits or will wait here returns, whatever else is rung."""
        self._memory[MAILBOX_STOP // 8] = 1
        self._ring(self.address, _NEVER)


class ComputeThreads:
    """Started when they are made, ended by `end` or by the end of one of them.

    Args:
        eventfd: becomes readable when a call through `first` is done, and when all threads have left in the middle of it.

    Attributes:
        first: the mailbox of thread 0; `others`: that of the others.
        end_barrier: the address of that at which threads meet after a call.
        program: of the call in hand, set before that is handed over; None between two calls.
        awaited: whether somebody waits for the eventfd.
        failure: why they ended, or are ending, without having been told to; None while they live.

    Raises:
        EngineError: the system has no more threads.
    """

    def __init__(self, entry: Entry, n_threads: int, eventfd: int) -> None:
        self._entry, self._n_threads, self._eventfd = entry, n_threads, eventfd
        self.first, self.others = Mailbox(entry, eventfd), Mailbox(entry, eventfd)
        self._end = aligned(BARRIER_BYTES)
        self.end_barrier = self._end.ctypes.data
        self.program: Program | None = None
        self.awaited = False
        self.failure: str | None = None
        self._stopping = False
        self._lock = threading.Lock()
        self.threads = [
            threading.Thread(target=self._live, args=(self.others if t else self.first, t), name=f"compute-{t}", daemon=True)
            for t in range(n_threads)
        ]
        self._inside = n_threads
        """Threads that have not left."""
        for number, thread in enumerate(self.threads):
            try:
                thread.start()
            except RuntimeError as error:
                self.threads = self.threads[:number]
                self.end(_STARTING_SECONDS)
                raise EngineError(f"compute thread {number + 1} of {n_threads} cannot be started: {error}") from None

    def _live(self, mailbox: Mailbox, number: int) -> None:
        try:
            self._entry.run_threads(mailbox.address, number, self._n_threads, 0)
            why = "it returned"
        except BaseException as error:  # whatever it is, the others must not wait
            why = str(error) or type(error).__name__
        if not self._stopping:
            self.fail(f"compute thread {number} ended: {why}")
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self.failure is not None and self.awaited:
                os.eventfd_write(self._eventfd, 1)

    def fail(self, reason: str) -> None:
        """Have all threads leave: the call in hand at its next barrier, and for good. Any thread may say so; the first reason counts."""
        with self._lock:
            self.failure = self.failure or reason
            self._stopping = True
        self.first.stop()
        self.others.stop()
        self._break_barriers()

    def _break_barriers(self) -> None:
        """The end first: whoever leaves the call in the middle comes there next."""
        self._entry.ring(self.end_barrier, BARRIER_BROKEN)
        if (program := self.program) is not None:
            self._entry.ring(program.addresses[2], BARRIER_BROKEN)

    def end(self, patience: float) -> bool:
        """End all threads: at once between two calls, else at the next barrier. Whether they have left within so many seconds."""
        self._stopping = True
        self.first.stop()
        self.others.stop()
        deadline = time.monotonic() + patience
        for thread in self.threads:
            while thread.is_alive() and time.monotonic() < deadline:
                if self.failure is not None:
                    self._break_barriers()  # again: the call may have been handed over meanwhile
                thread.join(_LOOK_SECONDS)
        return not any(thread.is_alive() for thread in self.threads)
