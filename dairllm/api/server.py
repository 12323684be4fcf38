"""An HTTP server inside the node's own event loop; signals are the runner's business, not its."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from dairllm.api.connection import BoundedConnection
from dairllm.errors import NetworkError
from dairllm.net.addresses import listening_socket

__all__ = ["HttpServer"]

IDLE_SECONDS = 5
"""That a connection is kept after an answer, for the next request."""
UNREAD_BYTES = 64 << 10
"""That the system keeps for a client that does not read; it would be megabytes, in which a whole answer vanishes."""
GRACE_SECONDS = 1
"""For answers that are on their way when the server is closed."""


class HttpServer:
    """Serves an application from `start` until it is closed.

    Args:
        app: what answers.
        connections: how many there may be; a request on one more is answered with 503.
        connection: their bounds.
    """

    def __init__(
        self, app: Starlette, host: str, port: int, *, connections: int = 64, connection: type[BoundedConnection] = BoundedConnection
    ) -> None:
        self._host, self._port = host, port
        config = uvicorn.Config(
            app, http=connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS, limit_concurrency=connections, backlog=64,
        )  # fmt: skip
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and serve; returns the port.

        Raises:
            NetworkError: the address cannot be listened on.
        """
        sock = listening_socket(self._host, self._port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="http server")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise NetworkError(f"the server on {self._host} port {self._port} ended while it was starting")
            await asyncio.sleep(0.005)
        port: int = sock.getsockname()[1]
        return port

    async def ended(self) -> None:
        """Wait until it serves no more.

        Raises:
            NetworkError: nobody has closed it.
        """
        if self._task is not None:
            await asyncio.wait({self._task})
            if not self._server.should_exit:
                cause = None if self._task.cancelled() else self._task.exception()
                raise NetworkError(f"the server on {self._host} port {self._port} has ended by itself") from cause

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
