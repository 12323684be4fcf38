"""Resident compute threads: started once, handed a range of a program at a time, never called op by op.

The host side is two steps, so that an event loop never waits: `submit` rings the threads' mailbox and returns;
`eventfd` becomes readable when the last thread is done, and `finish` takes that note away. (A call through a thread
pool costs four times as much for each segment.)
"""

import contextlib
import os
import select
import threading
from types import TracebackType

import numpy as np
import structlog

from dairllm.engine import system
from dairllm.engine.memory import aligned
from dairllm.engine.program import Program
from dairllm.errors import EngineError
from dairllm.kernels import forms
from dairllm.kernels.entry import Entry, load_entry
from dairllm.kernels.mailbox import MAILBOX_BYTES, MAILBOX_CALL, MAILBOX_EVENTFD, MAILBOX_STOP
from dairllm.kernels.sizes import BARRIER_BYTES

__all__ = ["Executor"]

log = structlog.get_logger()

_FEW_PROCESSORS = 8
"""On more, two threads hardly ever meet on one of them while others are free."""


class _Mailbox:
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
        records, state, barrier, scratch = program.addresses
        for word, value in enumerate((records, 0, 0, state, barrier, scratch, program.scratch_stride, end)):
            self.call[word] = value

    def ring(self) -> None:
        self._generation += 1
        self._ring(self.address, self._generation)

    def stop(self) -> None:
        self._memory[MAILBOX_STOP // 8] = 1
        self.ring()


class Executor:
    """Owns the threads and the eventfd; a context manager that starts and closes them.

    Args:
        n_threads: compute threads.
        kernels: a form of dairllm.kernels.forms, or "auto".

    Attributes:
        n_threads: that compute now.
        eventfd: the same from `start` to `close`.
    """

    def __init__(self, n_threads: int, kernels: str = "auto") -> None:
        self.n_threads = n_threads
        self.form = forms.select(kernels)
        self._threads: list[threading.Thread] = []
        self._running: Program | None = None
        self._processors = os.sched_getaffinity(0)
        self._avoided = -1
        """The processor that all threads but the first keep off; -1: none."""
        self.eventfd = -1

    def start(self) -> "Executor":
        """Compile or load the kernels (seconds at first run) and start the threads. Blocks: not for the event loop."""
        if self._threads:
            return self
        entry = load_entry()
        if entry.why_numba is not None:
            log.warning("the kernels' compiler stays in this process, which takes 100 MB", reason=entry.why_numba)
        self._entry = entry
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._end = aligned(BARRIER_BYTES)  # where threads meet after a call
        self._end_address = self._end.ctypes.data
        self._start_threads()
        return self

    def _start_threads(self) -> None:
        entry = self._entry
        self._first, self._others = _Mailbox(entry, self.eventfd), _Mailbox(entry, self.eventfd)
        self._addresses: tuple[int, ...] = ()  # of the program that the mailboxes know
        self._avoided = -1
        self._threads = [
            threading.Thread(
                target=entry.run_threads,
                args=((self._others if t else self._first).address, t, self.n_threads, 0),
                name=f"compute-{t}",
                daemon=True,
            )
            for t in range(self.n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _end_threads(self) -> None:
        self._first.stop()
        self._others.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def use_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on: the old ones are ended and others started, which takes less than a millisecond.

        Raises:
            EngineError: something is running, or nothing was started.
        """
        if self._running is not None or not self._threads:
            raise EngineError("the executor is computing" if self._threads else "the executor is not running")
        if n_threads != self.n_threads:
            self._end_threads()
            self.n_threads = n_threads
            self._start_threads()

    def submit(self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        """Start computing segments first_segment..end_segment-1 for rows first_row..rows-1 of a batch; returns at once.

        One at a time. `position` is that of row 0; first_row is 0, a multiple of TILE_COLUMNS, or rows - 1.

        Raises:
            EngineError: rows, positions or segments that the program does not have, or something is running.
        """
        self._hand_over(program, first_segment, end_segment, position, rows, first_row)
        self._running = program  # keeps its memory while the threads use it
        self._first.ring()

    def run(self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        """Compute here and now, with the calling thread in the place of thread 0. Raises as `submit`."""
        if 1 < self.n_threads <= len(self._processors) <= _FEW_PROCESSORS:
            self._keep_apart()
        self._hand_over(program, first_segment, end_segment, position, rows, first_row)
        self._entry.run_threads(self._first.address, 0, self.n_threads, 1)

    def _keep_apart(self) -> None:
        """Keep the other threads off the calling thread's processor.

        Where a reader, say, is about to leave the other one as they are woken, the scheduler puts them beside the thread that wakes them,
        and there they stay: at each barrier one spins in vain, then sleeps to let another go on. That took three times the computation.
        """
        here = system.processor()
        if here != self._avoided and here in self._processors:
            self._avoided = here
            for thread in self._threads[1:]:
                with contextlib.suppress(OSError):  # not allowed here: it is only slower
                    os.sched_setaffinity(thread.native_id or 0, self._processors - {here})

    def _hand_over(self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int) -> None:
        """Tell thread 0 what to do, without waking it, and set the others off."""
        if self._running is not None or not self._threads:
            raise EngineError("the executor is already computing" if self._threads else "the executor is not running")
        if program.n_threads < self.n_threads:
            raise EngineError(f"a program for {program.n_threads} threads at most on an executor of {self.n_threads}")
        if not 0 <= first_segment < end_segment <= len(program.segments):
            raise EngineError(f"segments {first_segment} to {end_segment} of {len(program.segments)}")
        program.prepare(position, rows, first_row)
        first, end = program.segments[first_segment][0], program.segments[end_segment - 1][1]
        if program.addresses is not self._addresses:
            self._addresses = program.addresses
            for mailbox in self._first, self._others:
                mailbox.address_to(program, self._end_address)
        self._first.call[1], self._first.call[2] = first, end
        if self.n_threads > 1:
            self._others.call[1], self._others.call[2] = first, end
            self._others.ring()

    def finish(self) -> None:
        """To be called when `eventfd` is readable: takes the note away, so that the next submit may come.

        Raises:
            EngineError: nothing has finished.
        """
        try:
            os.eventfd_read(self.eventfd)
        except BlockingIOError:
            raise EngineError("the executor is still computing") from None
        self._running = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def wait(self) -> None:
        """Block until what was submitted is done, and finish it."""
        poll = select.poll()
        poll.register(self.eventfd, select.POLLIN)
        poll.poll()
        self.finish()

    def close(self) -> None:
        """Finish what is running and end the threads."""
        if not self._threads:
            return
        if self._running is not None:
            self.wait()
        self._end_threads()
        os.close(self.eventfd)
        self.eventfd = -1

    def __enter__(self) -> "Executor":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
