"""Resident compute threads: started once, handed a range of a program at a time, never called op by op.

The host side is two steps, so that an event loop never waits: `submit` rings the threads' mailbox and returns;
`eventfd` becomes readable when the last thread is done, and `finish` takes that note away. (A call through a thread
pool costs four times as much for each segment.)

Threads that end are noticed where the next step is: the call in hand fails with the reason, and the next one starts others. Threads that
do not come back cannot be ended; then the executor is `stuck`, and with it the process.
"""

import contextlib
import ctypes
import os
import select
import threading
from types import TracebackType

import structlog

from dairllm.engine import system
from dairllm.engine.compute_threads import ComputeThreads
from dairllm.engine.program import Program
from dairllm.errors import EngineError
from dairllm.kernels import forms
from dairllm.kernels.objects.entry import load_entry
from dairllm.units import format_duration

__all__ = ["Executor"]

log = structlog.get_logger()

_FEW_PROCESSORS = 8
"""On more, two threads hardly ever meet on one of them while others are free."""

LONGEST_CALL = 3600.0
"""Seconds that a call may take. None takes so long; it is the last resort against waiting for ever."""

_LOOKS = 4
"""At what is computed, while a call may take so long."""

LEAVING_SECONDS = 2.0
"""Until threads that have been told to leave have come to the next barrier: an op of a large batch."""

CLOSING_SECONDS = 2.0
"""That what runs may take when the executor is closed."""


class Executor:
    """Owns the threads and the eventfd; a context manager that starts and closes them.

    Args:
        n_threads: compute threads.
        kernels: a form of dairllm.kernels.forms, or "auto".

    Attributes:
        n_threads: that compute now.
        eventfd: the same from `start` to `close`.
        stuck: why nothing can be computed any more, and the process should end; None while all is well.
    """

    def __init__(self, n_threads: int, kernels: str = "auto") -> None:
        self.n_threads = n_threads
        self.form = forms.select(kernels)
        self._threads: ComputeThreads | None = None
        self._running: Program | None = None
        self._processors = os.sched_getaffinity(0)
        self._avoided = -1
        """The processor that all threads but the first keep off; -1: none."""
        self.eventfd = -1
        self.stuck: str | None = None
        self._calls = 0
        """So far: how the guard tells one from the next."""
        self._closed = threading.Event()

    def start(self) -> "Executor":
        """Compile or load the kernels (seconds at first run) and start the threads. Blocks: not for the event loop."""
        if self.eventfd >= 0:
            return self
        entry = load_entry()
        if entry.why_numba is not None:
            log.warning("the kernels' compiler stays in this process, which takes 100 MB", reason=entry.why_numba)
        self._entry = entry
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._start_threads()
        self._closed.clear()
        threading.Thread(target=self._guard, args=(LONGEST_CALL,), name="executor guard", daemon=True).start()
        return self

    def _guard(self, patience: float) -> None:
        """Break off a call that takes longer than any does: who computes in the place of thread 0 could not be told so otherwise."""
        seen, looks = 0, 0
        while not self._closed.wait(patience / _LOOKS):
            threads = self._threads
            running = threads is not None and threads.program is not None
            looks = looks + 1 if running and self._calls == seen else 0
            seen = self._calls
            if looks > _LOOKS and threads is not None:
                threads.fail(f"it has not ended within {format_duration(patience)}")

    def _start_threads(self) -> ComputeThreads:
        self._addresses: tuple[int, ...] = ()  # of the program that the mailboxes know
        self._avoided = -1
        self._threads = ComputeThreads(self._entry, self.n_threads, self.eventfd)
        return self._threads

    def _end_threads(self, patience: float) -> None:
        """Whether they leave or not: then they are given up.

        Raises:
            EngineError: they do not.
        """
        threads, self._threads = self._threads, None
        if threads is None or threads.end(patience):
            return
        self.stuck = f"compute threads have not left within {format_duration(patience)}: {threads.failure or 'they were told to end'}"
        log.critical("compute threads are stuck, and the process must end", reason=self.stuck)
        for kept in (threads, threads.program):  # they may still write there
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        for thread in threads.threads:
            thread.name = f"abandoned {thread.name}"  # for dairllm.net.runner: native code does not survive the interpreter's own end
        raise EngineError(self.stuck)

    def use_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on: the old ones are ended and others started, which takes less than a millisecond.

        Raises:
            EngineError: something is running, nothing was started, or the system has no more threads.
        """
        self._check_free()
        if n_threads != self.n_threads:
            self._end_threads(LEAVING_SECONDS)
            self.n_threads = n_threads
            self._start_threads()

    def submit(self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        """Start computing segments first_segment..end_segment-1 for rows first_row..rows-1 of a batch; returns at once.

        One at a time. `position` is that of row 0; first_row is 0, a multiple of TILE_COLUMNS, or rows - 1.

        Raises:
            EngineError: rows, positions or segments that the program does not have, something is running, or there are no threads.
        """
        threads = self._hand_over(program, first_segment, end_segment, position, rows, first_row, awaited=True)
        self._running = program  # keeps its memory while the threads use it
        threads.first.ring()

    def run(self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        """Compute here and now, with the calling thread in the place of thread 0. Raises as `submit`, and

        EngineError: the computation failed.
        """
        threads = self._hand_over(program, first_segment, end_segment, position, rows, first_row)
        try:
            self._entry.run_threads(threads.first.address, 0, self.n_threads, 1)
        except EngineError as error:
            threads.fail(str(error))
        if threads.failure is not None:
            self._running = program
            self._fail(threads)
        threads.program = None

    def _keep_apart(self, threads: ComputeThreads) -> None:
        """Keep the other threads off the calling thread's processor.

        Where a reader, say, is about to leave the other one as they are woken, the scheduler puts them beside the thread that wakes them,
        and there they stay: at each barrier one spins in vain, then sleeps to let another go on. That took three times the computation.
        """
        here = system.processor()
        if here != self._avoided and here in self._processors:
            self._avoided = here
            for thread in threads.threads[1:]:
                with contextlib.suppress(OSError):  # not allowed here: it is only slower
                    os.sched_setaffinity(thread.native_id or 0, self._processors - {here})

    def _check_free(self) -> None:
        if self.stuck is not None:
            raise EngineError(self.stuck)
        if self._running is not None or self.eventfd < 0:
            raise EngineError("the executor is already computing" if self.eventfd >= 0 else "the executor is not running")

    def _hand_over(
        self, program: Program, first_segment: int, end_segment: int, position: int, rows: int, first_row: int, awaited: bool = False
    ) -> ComputeThreads:
        """Tell thread 0 what to do, without waking it, and set the others off."""
        self._check_free()
        if program.n_threads < self.n_threads:
            raise EngineError(f"a program for {program.n_threads} threads at most on an executor of {self.n_threads}")
        if not 0 <= first_segment < end_segment <= len(program.segments):
            raise EngineError(f"segments {first_segment} to {end_segment} of {len(program.segments)}")
        program.prepare(position, rows, first_row)
        self._calls += 1
        threads = self._with(program, awaited)
        if not awaited and 1 < self.n_threads <= len(self._processors) <= _FEW_PROCESSORS:
            self._keep_apart(threads)
        first, end = program.segments[first_segment][0], program.segments[end_segment - 1][1]
        if program.addresses is not self._addresses:
            self._addresses = program.addresses
            for mailbox in threads.first, threads.others:
                mailbox.address_to(program, threads.end_barrier)
        threads.first.call[1], threads.first.call[2] = first, end
        if self.n_threads > 1:
            threads.others.call[1], threads.others.call[2] = first, end
            threads.others.ring()
        return threads

    def _with(self, program: Program, awaited: bool) -> ComputeThreads:
        """Threads that live, and know whose barriers to break if one of them ends from now on."""
        threads = self._threads or self._start_threads()
        threads.program, threads.awaited = program, awaited
        if threads.failure is None:
            return threads
        log.error("compute threads ended between two calls and are started anew", reason=threads.failure)
        threads.awaited = False
        self._end_threads(LEAVING_SECONDS)
        self._forget_note()
        threads = self._start_threads()
        threads.program, threads.awaited = program, awaited
        return threads

    def _fail(self, threads: ComputeThreads) -> None:
        """The call in hand was left in the middle of it. What follows starts other threads.

        Raises:
            EngineError: always.
        """
        reason, program = threads.failure, threads.program
        self._end_threads(LEAVING_SECONDS)
        self._forget_note()
        self._running = None
        if program is not None:
            program.recover()
        log.error("compute threads have left a computation and will be started anew", reason=reason)
        raise EngineError(f"the computation failed: {reason}")

    def _forget_note(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)

    def finish(self) -> None:
        """To be called when `eventfd` is readable: takes the note away, so that the next submit may come.

        Raises:
            EngineError: nothing has finished, or the computation failed.
        """
        try:
            os.eventfd_read(self.eventfd)
        except BlockingIOError:
            raise EngineError("the executor is still computing") from None
        threads = self._threads
        if threads is not None:
            if threads.failure is not None:
                self._fail(threads)
            threads.program, threads.awaited = None, False
        self._running = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def break_off(self, reason: str) -> None:
        """Have the threads leave what was submitted, at its next barrier; `finish` will say the reason. Nothing where nothing runs."""
        if self._running is not None and self._threads is not None:
            self._threads.fail(reason)

    def give_up(self, reason: str) -> None:
        """What was submitted and broken off does not end: nothing can be computed any more. `stuck` says why."""
        if self._running is not None:
            self._running = None
            with contextlib.suppress(EngineError):
                self._end_threads(0.0)
            self.stuck = self.stuck or reason

    def wait(self, patience: float = LONGEST_CALL) -> None:
        """Block until what was submitted is done, and finish it.

        Raises:
            EngineError: the computation failed, or took longer than so many seconds.
        """
        poll = select.poll()
        poll.register(self.eventfd, select.POLLIN)
        if not poll.poll(1000.0 * patience):
            reason = f"it has not ended within {format_duration(patience)}"
            self.break_off(reason)
            if not poll.poll(1000.0 * LEAVING_SECONDS):
                self.give_up(reason)
                raise EngineError(self.stuck)
        self.finish()

    def close(self, patience: float = CLOSING_SECONDS) -> None:
        """Wait for what is running for so many seconds, then have it left; end the threads. Those that do not leave are given up."""
        if self.eventfd < 0:
            return
        self._closed.set()
        try:
            if self._running is not None:
                self.wait(patience)
            self._end_threads(LEAVING_SECONDS)
        except EngineError as error:
            log.warning("computing ended in the middle", reason=str(error))
        if self.stuck is None:  # else a thread may still write into it
            os.close(self.eventfd)
        self.eventfd = -1

    def __enter__(self) -> "Executor":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
