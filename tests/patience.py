"""How long a test waits for what must come: so long that no machine, however busy, is taken for one that hangs."""

import asyncio
import time
from collections.abc import Callable

__all__ = ["PATIENCE", "comes", "until"]

PATIENCE = 600.0
"""Seconds. A guard against hanging for ever, never part of what a test says."""

_PAUSE = 0.005


async def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event of its own; TimeoutError where it does not come."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - as said
            await asyncio.sleep(_PAUSE)


def comes(condition: Callable[[], object]) -> bool:
    """Whether something without an event of its own comes true, for a test that has no loop."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return bool(found)
