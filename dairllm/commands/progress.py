"""Signs of life on stderr for what takes more than a moment. Where stderr is no terminal, or NO_COLOR is set, nothing moves."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["COMPILING", "PATIENCE_SECONDS", "TELLING_SECONDS", "byte_bar", "count_bar", "is_watched", "telling", "waiting"]

log = structlog.get_logger()

PATIENCE_SECONDS = 2.0
"""How long a command may be silent."""

TELLING_SECONDS = 5.0
"""Between two log lines of something that takes long."""

COMPILING = "compiling the kernels (half a minute, once on a machine)"
"""What the start of a node waits for where nothing has been compiled yet."""


def is_watched() -> bool:
    """Whether there is somebody to see a progress bar."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar that goes away at the end, told what is at hand, bytes done, bytes in all; None, and a line, where nobody would see it."""
    if not is_watched():
        with waiting(title):
            yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, detail="")

        def progress(detail: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, detail=detail)

        yield progress


@contextmanager
def count_bar(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar that goes away at the end, for a few things that take long: told what is at hand and how many are done. A line for each where
    nobody would see it move; a bar without an end where there is but one."""
    if not is_watched():

        def line(detail: str, done: int) -> None:
            sys.stderr.write(f"{title}: {detail} ({done + 1} of {total}) ...\n")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total if total > 1 else None, detail="", count="")

        def progress(detail: str, done: int) -> None:
            bar.update(task, completed=done, detail=detail, count=f"{done}/{total}" if total > 1 else "")

        yield progress


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner with the seconds so far, for what cannot say how far it is; a plain line where nobody would see it move.

    It appears after `PATIENCE_SECONDS`: what is done by then needs no sign.
    """
    shown: list[Progress] = []

    def show() -> None:
        if not is_watched():
            sys.stderr.write(f"{title} ...\n")
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bar = Progress(SpinnerColumn(), TextColumn(title), TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        task = bar.add_task(title, total=None)
        bar.tasks[task].start_time = bar.get_time() - PATIENCE_SECONDS
        shown.append(bar)
        bar.start()

    timer = threading.Timer(PATIENCE_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for bar in shown:
            bar.stop()


@asynccontextmanager
async def telling(event: str) -> AsyncIterator[None]:
    """For services: log lines with the seconds so far, while the block lasts. None within `PATIENCE_SECONDS`."""
    begun = time.monotonic()

    async def tell() -> None:
        await asyncio.sleep(PATIENCE_SECONDS)
        while True:
            log.info(event, seconds=round(time.monotonic() - begun))
            await asyncio.sleep(TELLING_SECONDS)

    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()
