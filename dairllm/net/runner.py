"""A program's life: an event loop, signals, startup and shutdown as ordered steps.

run(main)          main() is one coroutine on uvloop. SIGTERM, SIGINT or SIGHUP cancels it once, and it ends
                   in good order, or is ended: whatever hangs, the process is gone `shutdown` seconds and a few
                   later; a second signal ends it at once. A service has then done its work; a command was
                   cut short.
Steps              startup is a list of named steps; leaving undoes them in reverse, each within a deadline
until_one_ends     a program's parts, none of which may end unnoticed
in_thread          a blocking call that must not keep the process alive when it is not wanted any more
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

import structlog
import uvloop

from dairllm.net.signals import Signals
from dairllm.units import format_duration

__all__ = ["Steps", "in_thread", "run", "until_one_ends"]

log = structlog.get_logger()
ONE_TELLING = 0.5
"""Seconds in which further signals count as the first: a terminal and `timeout` tell the process and its whole group."""
SPARE_SECONDS = 4.0
"""Beyond `shutdown`, for what comes after the work in hand: connections are closed, threads and the interpreter end."""

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, None]], *, service: bool = True, shutdown: float | None = None) -> None:
    """Run `main` to its end, or until a signal has ended it in good order.

    Args:
        service: a signal is how it ends. Otherwise a signal cuts it short, which the exit code says: 128 and the signal's number.
        shutdown: seconds that the work in hand may take after a signal. Some more, and the process is ended whatever it does.

    Raises:
        SystemExit: a signal cut short what is no service.
        whatever `main` raises, but not the cancellation that a signal caused.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told = runner.run(_until_told(main, None if shutdown is None else shutdown + SPARE_SECONDS))
    code = 0 if service or told is None else 128 + told
    if any(thread.name.startswith(_ABANDONED) for thread in threading.enumerate()):
        # A call that nobody waits for is still inside native code (a compiler, say), which does not survive the interpreter's own end.
        for stream in sys.stdout, sys.stderr:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or none who reads it
                stream.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


async def _until_told(main: Callable[[], Coroutine[Any, Any, None]], deadline: float | None) -> signal.Signals | None:
    """The signal that ended it, or None."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unexpected)
    task = asyncio.ensure_future(main())
    told: signal.Signals | None = None
    told_at = 0.0

    def tell(signum: signal.Signals) -> None:
        nonlocal told, told_at
        if told is None:
            told, told_at = signum, loop.time()
            task.cancel()
            log.info("shutting down", signal=signum.name)
        elif loop.time() - told_at > ONE_TELLING:
            log.warning("second signal, ending at once", signal=signum.name)
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    with Signals(tell, deadline=deadline):
        try:
            await task
        except asyncio.CancelledError:
            if told is None:
                raise
    return told


def _unexpected(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a callback or a task raised that nobody waits for. Its message alone: what else there is would show the exception's text."""
    log.error("unexpected error in the event loop", what=context.get("message"), exc_info=context.get("exception"))


async def until_one_ends(*parts: Awaitable[None]) -> None:
    """Until the first part of a program ends, which ends the others. Raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()


class Steps:
    """A context whose body starts things one after the other, and whose end stops them in reverse.

    Args:
        patience: seconds that each stop may take; what takes longer is cancelled.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._stops: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    async def start(self, name: str, start: Callable[[], Awaitable[T]], stop: Callable[[], Awaitable[None]]) -> T:
        """Start one thing; `stop` is called at the end even where starting fails halfway."""
        self._stops.append((name, stop))
        begun = time.perf_counter()
        result = await start()
        log.debug("started", step=name, took=format_duration(time.perf_counter() - begun))
        return result

    async def __aenter__(self) -> "Steps":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, stop in reversed(self._stops):
            begun = time.perf_counter()
            try:
                async with asyncio.timeout(self._patience):
                    await stop()
            except TimeoutError:
                log.warning("stopping took too long", step=name, patience=format_duration(self._patience))
            except Exception:
                log.exception("stopping failed", step=name)  # the others are to be stopped all the same
            else:
                log.debug("stopped", step=name, took=format_duration(time.perf_counter() - begun))


_ABANDONED = "abandoned "


async def in_thread(name: str, call: Callable[[], T], drop: Callable[[T], None] | None = None) -> T:
    """What `call` returns or raises, computed in a thread of its own.

    Unlike `asyncio.to_thread`, cancelling the wait abandons the call: neither the loop nor the process waits for its end.

    Args:
        drop: called in a thread with what an abandoned call returns, to give back what that holds.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    thread = threading.Thread(target=_work, args=(loop, future, call, drop), name=name, daemon=True)
    thread.start()
    try:
        return await future
    except asyncio.CancelledError:
        thread.name = _ABANDONED + name
        raise
    finally:
        # An error knows this frame, and the future the error: a circle, which would keep what the call held.
        del future, call, drop, thread


def _work(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[T]", call: Callable[[], T], drop: Callable[[T], None] | None) -> None:
    """The thread's body."""
    result, error = None, None
    try:
        result = call()
    except BaseException as caught:  # it is raised where it is waited for
        error = caught
    try:
        loop.call_soon_threadsafe(_settle, future, result, error, drop)
    except RuntimeError:  # the loop is closed: nobody waits
        if error is None and drop is not None:
            drop(result)  # type: ignore[arg-type] # a result of None is one of T's
    del error  # which knows this frame


def _settle(future: "asyncio.Future[T]", result: T | None, error: BaseException | None, drop: Callable[[T], None] | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(result)  # type: ignore[arg-type] # a result of None is one of T's
        else:
            future.set_exception(error)
    elif error is None and drop is not None:
        threading.Thread(target=drop, args=(result,), name="drop", daemon=True).start()
