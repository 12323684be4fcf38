"""The event loop's side of the compute threads: hand them a range of segments, go on moving bytes, be woken when they are done.

The threads say so through an eventfd that the loop watches. (A call through `run_in_executor` costs four times as much for each segment.)
"""

import asyncio
import contextlib
from typing import Generic, Protocol, TypeVar

__all__ = ["Compute", "Computer"]

P = TypeVar("P")
ProgramT = TypeVar("ProgramT", contravariant=True)


class Computer(Protocol[ProgramT]):
    """What is needed of `dairllm.engine.executor.Executor`."""

    @property
    def eventfd(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def submit(self, program: ProgramT, first_segment: int, end_segment: int, position: int, rows: int) -> None: ...
    def finish(self) -> None: ...


class Compute(Generic[P]):
    """One executor on the running loop, from `open` to `close`. One task at a time computes."""

    def __init__(self, executor: Computer[P]) -> None:
        self._executor = executor
        self._done: asyncio.Future[None] | None = None

    def open(self) -> None:
        """Watch the executor, which has been started."""
        asyncio.get_running_loop().add_reader(self._executor.eventfd, self._finished)

    def close(self) -> None:
        """Watch it no more."""
        if self._executor.eventfd >= 0:
            asyncio.get_running_loop().remove_reader(self._executor.eventfd)

    async def run(self, program: P, first: int, stop: int, position: int, rows: int) -> None:
        """Compute segments first .. stop - 1 for a batch.

        Even when cancelled it returns only after the threads have left the program's memory.

        Raises:
            EngineError: the batch does not fit the program, or the computation failed.
        """
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._executor.submit(program, first, stop, position, rows)
        try:
            await self._done
        except asyncio.CancelledError:
            while self._executor.busy:
                self._done = loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._done
            raise

    def _finished(self) -> None:
        try:
            self._executor.finish()
        except Exception as error:  # it is raised where it is waited for
            if self._done is not None and not self._done.done():
                self._done.set_exception(error)
        else:
            if self._done is not None and not self._done.done():
                self._done.set_result(None)
