"""The loop goes on while threads compute, is woken when they are done, and never leaves while they are inside."""

import asyncio
import math
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest

from dairllm.errors import EngineError
from dairllm.runtime.compute import BRIEF_SECONDS, Compute
from tests.patience import PATIENCE, until


class Work:
    """A program: how long it takes, in seconds; what it waits for then."""

    def __init__(self, seconds: float, until: threading.Event | None = None) -> None:
        self.seconds = seconds
        self.until = until or threading.Event()
        if until is None:
            self.until.set()


class SlowComputer:
    """Says through a real eventfd that it is done, after as many seconds as the work says; or does it where it is called."""

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.busy = False
        self.beside: list[tuple[int, int, int, int, int]] = []
        self.here: list[tuple[int, int, int, int, int]] = []
        self.error: EngineError | None = None
        self.stuck: str | None = None
        self.never_leaves = False
        self.broken_off = threading.Event()

    def submit(self, program: Work, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        self.beside.append((first_segment, end_segment, position, rows, first_row))
        self.busy = True
        threading.Thread(target=self._work, args=(program.seconds, program.until), daemon=True).start()

    def _work(self, seconds: float, until: threading.Event) -> None:
        if not self.broken_off.wait(seconds):
            until.wait(PATIENCE)
        if not self.never_leaves:
            os.eventfd_write(self.eventfd, 1)

    def break_off(self, reason: str) -> None:
        self.error = EngineError(reason)
        self.broken_off.set()

    def give_up(self, reason: str) -> None:
        self.stuck, self.busy = f"stuck: {reason}", False

    def finish(self) -> None:
        os.eventfd_read(self.eventfd)
        self.busy = False
        if self.error is not None:
            raise self.error

    def run(self, program: Work, first_segment: int, end_segment: int, position: int, rows: int, first_row: int = 0) -> None:
        self.here.append((first_segment, end_segment, position, rows, first_row))
        time.sleep(program.seconds)


@pytest.fixture
def computer() -> Iterator[SlowComputer]:
    made = SlowComputer()
    yield made
    os.close(made.eventfd)


@pytest.fixture
def brief_seconds() -> float:
    """Set by tests that care."""
    return BRIEF_SECONDS


@pytest.fixture
async def compute(computer: SlowComputer, brief_seconds: float) -> AsyncIterator[Compute[Work]]:
    made: Compute[Work] = Compute(computer, brief_seconds)
    made.open()
    yield made
    made.close()


async def test_the_loop_goes_on_meanwhile(computer: SlowComputer, compute: Compute[Work]) -> None:
    """The work ends only when the loop has gone on beside it."""
    slow = Work(0.0, threading.Event())

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.005)
            if computer.busy:
                slow.until.set()

    ticking = asyncio.create_task(tick())
    for position in (7, 8):
        slow.until.clear()
        await compute.run(slow, 0, 3, position, 1)
    assert computer.beside == [(0, 3, 7, 1, 0), (0, 3, 8, 1, 0)]
    assert computer.here == []
    ticking.cancel()


@pytest.mark.parametrize("brief_seconds", [10.0])
async def test_what_was_brief_is_computed_where_it_is_called(computer: SlowComputer, compute: Compute[Work]) -> None:
    quick = Work(0.0)
    await compute.run(quick, 0, 3, 7, 1)
    for position in (8, 9):
        await compute.run(quick, 0, 3, position, 1)
    await compute.run(quick, 0, 3, 10, 32)  # how long a batch takes is not known yet
    await compute.run(quick, 0, 3, 10, 32, 16)  # nor how long its second half does
    await compute.run(quick, 0, 3, 10, 32)
    assert computer.beside == [(0, 3, 7, 1, 0), (0, 3, 10, 32, 0), (0, 3, 10, 32, 16)]
    assert computer.here == [(0, 3, 8, 1, 0), (0, 3, 9, 1, 0), (0, 3, 10, 32, 0)]


@pytest.mark.parametrize("brief_seconds", [0.3])
async def test_what_has_become_slow_is_computed_beside_again(computer: SlowComputer, compute: Compute[Work]) -> None:
    work = Work(0.0)
    await compute.run(work, 0, 1, 0, 1)
    work.seconds = 0.4
    await compute.run(work, 0, 1, 1, 1)
    await compute.run(work, 0, 1, 2, 1)
    assert computer.beside == [(0, 1, 0, 1, 0), (0, 1, 2, 1, 0)]


@pytest.mark.parametrize("brief_seconds", [math.inf])
async def test_where_nothing_else_needs_the_loop_all_is_computed_on_it(computer: SlowComputer, compute: Compute[Work]) -> None:
    work = Work(0.01)
    for position in (0, 1):
        await compute.run(work, 0, 1, position, 1)
    assert computer.here == [(0, 1, 0, 1, 0), (0, 1, 1, 1, 0)]


async def test_programs_are_not_kept(compute: Compute[Work]) -> None:
    work = Work(0.0)
    await compute.run(work, 0, 1, 0, 1)
    gone = weakref.ref(work)
    del work
    assert gone() is None


async def test_an_error_is_raised_where_it_is_waited_for(computer: SlowComputer, compute: Compute[Work]) -> None:
    computer.error = EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        await compute.run(Work(0.0), 0, 1, 0, 1)


async def test_who_is_cancelled_waits_until_the_threads_have_left(computer: SlowComputer, compute: Compute[Work]) -> None:
    work = Work(0.0, threading.Event())
    running = asyncio.create_task(compute.run(work, 0, 1, 0, 1))
    await until(lambda: computer.busy)
    for _ in range(2):  # even when told twice
        running.cancel()
        await asyncio.sleep(0.02)
        assert computer.busy
        assert not running.done()
    work.until.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not computer.busy
    await compute.run(Work(0.0), 0, 1, 0, 1)


async def test_what_nobody_waits_for_is_broken_off(computer: SlowComputer, compute: Compute[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.runtime.compute.UNWANTED_SECONDS", 0.05)
    running = asyncio.create_task(compute.run(Work(3600), 0, 1, 0, 1))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert str(computer.error) == "nobody waits for it any more"
    assert not computer.busy


async def test_what_takes_longer_than_anything_is_broken_off(computer: SlowComputer) -> None:
    compute: Compute[Work] = Compute(computer, patience=0.05)
    compute.open()
    with pytest.raises(EngineError, match="it has not ended within 50ms"):
        await compute.run(Work(3600), 0, 1, 0, 1)
    assert computer.stuck is None
    computer.error = None
    computer.broken_off.clear()
    await compute.run(Work(0), 0, 1, 0, 1)
    compute.close()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_threads_that_do_not_leave_end_what_waits(cancelled: bool, computer: SlowComputer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.runtime.compute.UNWANTED_SECONDS", 0.05)
    monkeypatch.setattr("dairllm.runtime.compute.LEAVING_SECONDS", 0.05)
    computer.never_leaves = True
    compute: Compute[Work] = Compute(computer, patience=3600 if cancelled else 0.05)
    compute.open()
    watching = asyncio.create_task(compute.ended())
    running = asyncio.create_task(compute.run(Work(0), 0, 1, 0, 1))
    await asyncio.sleep(0.01)
    assert not watching.done()
    if cancelled:
        running.cancel()
    with pytest.raises(asyncio.CancelledError if cancelled else EngineError):
        await running
    with pytest.raises(EngineError, match="stuck: "):
        await watching
    compute.close()
