"""Work that is pointless once somebody has gone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dairllm.errors import NetworkError
from dairllm.net.transport import Connection

__all__ = ["while_there"]


@asynccontextmanager
async def while_there(connection: Connection, grace: float) -> AsyncIterator[None]:
    """What is done within is for the other end of a connection: once that has gone, it is interrupted after `grace` seconds.

    Who waits for somebody else within would not hear of it otherwise.

    Raises:
        NetworkError: the other end has gone, and the work was not over in time.
    """
    loop = asyncio.get_running_loop()
    guard = asyncio.timeout(None)

    def gone() -> None:
        guard.reschedule(loop.time() + grace)

    try:
        async with guard:
            connection.on_end = gone
            if connection.has_ended:
                gone()
            try:
                yield
            finally:
                connection.on_end = None
    except TimeoutError:
        if not guard.expired():
            raise
        raise NetworkError(f"{connection.ending} while others were waited for") from None
