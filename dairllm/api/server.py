"""An HTTP server inside the node's own event loop; signals are the runner's business, not its."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dairllm.api.connection import BoundedConnection
from dairllm.api.front import Front
from dairllm.errors import NetworkError
from dairllm.net.addresses import address_of, listening_socket
from dairllm.net.listener import Listener

__all__ = ["HttpServer"]

IDLE_SECONDS = 75.0
"""That a connection is kept after an answer, for the next request: longer than clients and proxies keep theirs, so that it is they who
close it, and no request meets a connection that is just being closed."""
UNREAD_BYTES = 64 << 10
"""That the system keeps for a client that does not read; it would be megabytes, in which a whole answer vanishes."""
GRACE_SECONDS = 1
"""For answers that are on their way when the server is closed."""


class HttpServer:
    """Serves an application from `start` until it is closed.

    Args:
        app: what answers.
        connections: how many there may be; a request on one more is answered with 503 where none of the others idles.
        connection: their bounds.
        keep_alive: seconds that one may idle after an answer.
        hosts: names under which it may be asked, beside this machine's, where it listens on a loopback address.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        connections: int = 64,
        connection: type[BoundedConnection] = BoundedConnection,
        keep_alive: float = IDLE_SECONDS,
        hosts: Sequence[str] = (),
    ) -> None:
        self._host, self._port, self._most = host, port, connections
        self._front = Front(app, self._is_crowded, hosts)
        idle: Any = keep_alive  # which need not be whole
        config = uvicorn.Config(
            self._front, http=connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=idle, timeout_graceful_shutdown=GRACE_SECONDS, limit_concurrency=connections,
            backlog=64,
        )  # fmt: skip
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and serve; returns the port.

        Raises:
            NetworkError: the address cannot be listened on.
        """
        sock = listening_socket(self._host, self._port)
        self._front.loopback = address_of(sock.getsockname()[0]).is_loopback
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

    def _is_crowded(self) -> bool:
        return len(self._server.server_state.connections) > self._most

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with doors that survive the limit of descriptors."""
        await self.lifespan.startup()

        def connection() -> asyncio.BaseProtocol:
            kind: Any = self.config.http_protocol_class
            made: asyncio.BaseProtocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
            return made

        doors: list[Any] = [Listener(sock, connection, self.config.backlog) for sock in sockets or ()]
        self.servers = doors
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
