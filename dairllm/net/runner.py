"""A program's life: an event loop, signals, startup and shutdown as ordered steps.

run(main)          main() is one coroutine on uvloop. SIGTERM or SIGINT cancels it once, and it ends in good order;
                   a second signal ends the process at once. A service has then done its work; a command was cut short.
Steps              startup is a list of named steps; leaving undoes them in reverse, each within a deadline
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

from dairllm.units import format_duration

__all__ = ["Steps", "in_thread", "run"]

log = structlog.get_logger()
ONE_TELLING = 0.5
"""Seconds in which further signals count as the first: a terminal and `timeout` tell the process and its whole group."""

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, None]], *, service: bool = True) -> None:
    """Run `main` to its end, or until a signal has ended it in good order.

    Args:
        service: a signal is how it ends. Otherwise a signal cuts it short, which the exit code says: 128 and the signal's number.

    Raises:
        SystemExit: a signal cut short what is no service.
        whatever `main` raises, but not the cancellation that a signal caused.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told = runner.run(_until_told(main))
    code = 0 if service or told is None else 128 + told
    if any(thread.name.startswith(_ABANDONED) for thread in threading.enumerate()):
        # A call that nobody waits for is still inside native code (a compiler, say), which does not survive the interpreter's own end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


async def _until_told(main: Callable[[], Coroutine[Any, Any, None]]) -> signal.Signals | None:
    """The signal that ended it, or None."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main())
    told: signal.Signals | None = None
    told_at = 0.0

    def tell(signum: signal.Signals) -> None:
        nonlocal told, told_at
        if told is None:
            told, told_at = signum, loop.time()
            log.info("shutting down", signal=signum.name)
            task.cancel()
        elif loop.time() - told_at > ONE_TELLING:
            log.warning("second signal, ending at once", signal=signum.name)
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in handlers:
        loop.add_signal_handler(signum, tell, signum)
    try:
        await task
    except asyncio.CancelledError:
        if told is None:
            raise
    finally:
        for signum, handler in handlers.items():
            loop.remove_signal_handler(signum)
            if handler is not None:
                signal.signal(signum, handler)
    return told


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


async def in_thread(name: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises, computed in a thread of its own.

    Unlike `asyncio.to_thread`, cancelling the wait abandons the call: neither the loop nor the process waits for its end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)  # type: ignore[arg-type] # a result of None is one of T's
            else:
                future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as caught:  # it is raised where it is waited for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        return await future
    except asyncio.CancelledError:
        thread.name = _ABANDONED + name
        raise
