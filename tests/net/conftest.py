"""Connections over real sockets, and the simplest link that one can serve."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from dairllm.config import Keepalive
from dairllm.errors import RemoteProtocolError
from dairllm.net.addresses import listening_socket
from dairllm.net.transport import Connection
from dairllm.protocol.stream import Intake


class Feed:
    """A link without a protocol: fills the memory that it is told of, and its only event is that it is full."""

    def __init__(self) -> None:
        self._intake = Intake()
        self._told = False

    @property
    def wants_data(self) -> bool:
        return self._intake.has_room

    @property
    def kept(self) -> int:
        return self._intake.available

    @property
    def expecting(self) -> str:
        return f"{self._intake.missing} more bytes"

    def want(self, *views: memoryview) -> None:
        self._told = True
        self._intake.receive_into(views)

    def get_buffer(self) -> memoryview:
        return self._intake.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._intake.buffer_updated(nbytes)

    def next_event(self) -> str | None:
        if not self._told or self._intake.filling:
            return None
        self._told = False
        return "full"

    def eof(self) -> None:
        if self._intake.filling:
            raise RemoteProtocolError(f"the end; expecting {self.expecting}")


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
async def accepted() -> AsyncIterator[tuple[int, "asyncio.Queue[Connection]"]]:
    """A port, and the connections that were made to it."""
    queue: asyncio.Queue[Connection] = asyncio.Queue()
    made: list[Connection] = []

    def opened(connection: Connection) -> None:
        made.append(connection)
        queue.put_nowait(connection)

    sock = listening_socket("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(Keepalive(), opened), sock=sock)
    yield sock.getsockname()[1], queue
    server.close()
    for connection in made:
        connection.abort()
        await connection.closed()
    await server.wait_closed()


@pytest.fixture
async def pair(
    accepted: tuple[int, "asyncio.Queue[Connection]"],
) -> AsyncIterator[tuple[Connection, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, and a plain stream at its other end."""
    port, queue = accepted
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    yield await queue.get(), reader, writer
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
