"""The event loop's side of the compute threads: hand them a range of segments, go on moving bytes, be woken when they are done.

Two awakenings, of a compute thread and of the loop, cost 50 to 100 microseconds, on virtual machines three times that: as much as a segment
of a small model, and a fifth of a large one's. So what took
less than BRIEF_SECONDS the last time is computed on the loop's own thread; within so little time nothing needs the loop. Whatever takes
longer is handed over, and the threads say through an eventfd, which the loop watches, that they are done. (A call through
`run_in_executor` costs four times as much for each segment.)

No wait is for ever. A computation that takes longer than any does, or that nobody waits for any more, is broken off; where the threads do
not leave even then, nothing can be computed any more, and the process is to end (`ended`).
"""

import asyncio
import contextlib
import math
import time
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from dairllm.errors import EngineError
from dairllm.units import format_duration

__all__ = ["BRIEF_SECONDS", "LONGEST_CALL", "Compute", "Computer"]

BRIEF_SECONDS = 0.005
"""The longest that a computation may keep the loop from health probes and signals."""

LONGEST_CALL = 3600.0
"""Seconds that a computation may take: the last resort. Threads that have ended are noticed at once."""

UNWANTED_SECONDS = 1.0
"""That a computation goes on after its wait was cancelled, before it is broken off."""

LEAVING_SECONDS = 2.0
"""That threads may take to leave what is broken off: an op of a large batch."""

_MOST_REMEMBERED = 8192
"""Calls whose duration is remembered: a program of many segments, with batches of any number of rows, would fill the memory otherwise."""

P = TypeVar("P")
ProgramT = TypeVar("ProgramT", contravariant=True)


class Computer(Protocol[ProgramT]):
    """What is needed of `dairllm.engine.executor.Executor`."""

    @property
    def eventfd(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def stuck(self) -> str | None: ...
    def use_threads(self, n_threads: int) -> None: ...
    def submit(self, program: ProgramT, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None: ...
    def finish(self) -> None: ...
    def break_off(self, reason: str) -> None: ...
    def give_up(self, reason: str) -> None: ...
    def run(self, program: ProgramT, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None: ...


class Compute(Generic[P]):
    """One executor on the running loop, from `open` to `close`. One task at a time computes.

    Args:
        brief_seconds: the longest that a computation may keep the loop; infinite where nothing else needs it.
        patience: seconds that one may take; LONGEST_CALL if None.
    """

    def __init__(self, executor: Computer[P], brief_seconds: float = BRIEF_SECONDS, patience: float | None = None) -> None:
        self._executor, self._brief = executor, brief_seconds
        self._patience = LONGEST_CALL if patience is None else patience
        self._too_long = f"it has not ended within {format_duration(self._patience)}"
        self._done: asyncio.Future[None] | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._stuck = asyncio.Event()
        self._program: Callable[[], P | None] = lambda: None
        """The last one, as a weak reference: a program may hold gigabytes."""
        self._took: dict[tuple[int, int, int, int], float] = {}
        """Seconds that its segments first .. stop - 1 last took for rows first_row .. rows - 1."""

    def open(self) -> None:
        """Watch the executor, which has been started."""
        asyncio.get_running_loop().add_reader(self._executor.eventfd, self._finished)

    def close(self) -> None:
        """Watch it no more."""
        if self._executor.eventfd >= 0:
            asyncio.get_running_loop().remove_reader(self._executor.eventfd)

    async def ended(self) -> None:
        """Wait until nothing can be computed any more, and the process is to end.

        Raises:
            EngineError: so it is.
        """
        await self._stuck.wait()
        raise EngineError(self._executor.stuck)

    @property
    def n_threads(self) -> int:
        """That compute."""
        return self._executor.n_threads

    def use_threads(self, n_threads: int) -> None:
        """Compute with so many from now on. Nothing may be computing."""
        if n_threads != self._executor.n_threads:
            self._executor.use_threads(n_threads)
            self._took = {}

    async def run(self, program: P, first: int, stop: int, position: int, rows: int, first_row: int = 0) -> None:
        """Compute segments first .. stop - 1 for rows first_row .. rows - 1 of a batch.

        Args:
            position: of row 0.
            first_row: 0, a multiple of the tile's 16 rows, or rows - 1.

        Even when cancelled it returns only after the threads have left the program's memory, or are given up.

        Raises:
            EngineError: the batch does not fit the program, or the computation failed.
        """
        if self._program() is not program:
            self._program, self._took = weakref.ref(program), {}
        call = first, stop, first_row, rows
        begun = time.perf_counter()
        try:
            if self._brief == math.inf or self._took.get(call, self._brief) < self._brief:
                self._executor.run(program, first, stop, position, rows, first_row)
            else:
                await self._run_beside(program, first, stop, position, rows, first_row)
        finally:
            if self._executor.stuck is not None:
                self._stuck.set()
        if len(self._took) >= _MOST_REMEMBERED:
            self._took.clear()
        self._took[call] = time.perf_counter() - begun

    async def _run_beside(self, program: P, first: int, stop: int, position: int, rows: int, first_row: int) -> None:
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._executor.submit(program, first, stop, position, rows, first_row)
        self._break_off_in(self._patience, self._too_long)
        try:
            await self._done
        except asyncio.CancelledError:
            self._break_off_in(UNWANTED_SECONDS, "nobody waits for it any more")
            while self._executor.busy:
                self._done = loop.create_future()
                with contextlib.suppress(asyncio.CancelledError, EngineError):
                    await self._done
            raise
        finally:
            self._call_in(None)
            self._done = None  # an error in it would keep all that its waiters held

    def _break_off_in(self, seconds: float, reason: str) -> None:
        def break_off() -> None:
            self._call_in(LEAVING_SECONDS, give_up)
            self._executor.break_off(reason)

        def give_up() -> None:
            self._executor.give_up(reason)
            if self._done is not None and not self._done.done():
                self._done.set_exception(EngineError(self._executor.stuck))

        self._call_in(seconds, break_off)

    def _call_in(self, seconds: float | None, call: Callable[[], None] = lambda: None) -> None:
        """What is to be called where nothing happens meanwhile: one thing at a time."""
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = None if seconds is None else asyncio.get_running_loop().call_later(seconds, call)

    def _finished(self) -> None:
        try:
            self._executor.finish()
        except Exception as error:  # it is raised where it is waited for
            if self._done is not None and not self._done.done():
                self._done.set_exception(error)
        else:
            if self._done is not None and not self._done.done():
                self._done.set_result(None)
