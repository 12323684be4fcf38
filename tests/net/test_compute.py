"""The loop goes on while threads compute, is woken when they are done, and never leaves while they are inside."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator

import pytest

from dairllm.errors import EngineError
from dairllm.net.compute import Compute


class SlowComputer:
    """Says through a real eventfd that it is done, after as many seconds as the program says."""

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.busy = False
        self.calls: list[tuple[int, int, int, int]] = []
        self.error: EngineError | None = None

    def submit(self, program: float, first_segment: int, end_segment: int, position: int, rows: int) -> None:
        self.calls.append((first_segment, end_segment, position, rows))
        self.busy = True
        threading.Thread(target=self._work, args=(program,), daemon=True).start()

    def _work(self, seconds: float) -> None:
        time.sleep(seconds)
        os.eventfd_write(self.eventfd, 1)

    def finish(self) -> None:
        os.eventfd_read(self.eventfd)
        self.busy = False
        if self.error is not None:
            raise self.error


@pytest.fixture
def computer() -> Iterator[SlowComputer]:
    made = SlowComputer()
    yield made
    os.close(made.eventfd)


async def test_the_loop_goes_on_meanwhile(computer: SlowComputer) -> None:
    compute: Compute[float] = Compute(computer)
    compute.open()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    await compute.run(0.1, 0, 3, 7, 1)
    assert ticks >= 5
    await compute.run(0.0, 3, 4, 7, 1)
    assert computer.calls == [(0, 3, 7, 1), (3, 4, 7, 1)]
    ticking.cancel()
    compute.close()


async def test_an_error_is_raised_where_it_is_waited_for(computer: SlowComputer) -> None:
    compute: Compute[float] = Compute(computer)
    compute.open()
    computer.error = EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        await compute.run(0.0, 0, 1, 0, 1)
    compute.close()


async def test_who_is_cancelled_waits_until_the_threads_have_left(computer: SlowComputer) -> None:
    compute: Compute[float] = Compute(computer)
    compute.open()
    running = asyncio.create_task(compute.run(0.2, 0, 1, 0, 1))
    await asyncio.sleep(0.02)
    for _ in range(2):  # even when told twice
        running.cancel()
        await asyncio.sleep(0.02)
        assert computer.busy
        assert not running.done()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not computer.busy
    await compute.run(0.0, 0, 1, 0, 1)
    compute.close()
