"""A door: connections are accepted as long as the process has descriptors to spare.

A loop of its own, since those of asyncio and uvloop do not survive the limit (`ulimit -n`): one logs
without end, the other gives the listening socket up, and what they accept last leaves nothing to open a
model or to dial a worker with. Here connections wait in the system's queue until there is room again,
and the log says so once.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable

import structlog

__all__ = ["Listener"]

log = structlog.get_logger()

LOOK_SECONDS = 0.2
"""Between two looks whether there is room again."""
SPARE = 16
"""Descriptors that connections leave to the program, or a quarter of all where that is less."""
AT_ONCE = 16
"""Connections that are accepted before the loop does something else."""


class Listener:
    """Accepts from its making to `close`.

    Args:
        sock: bound; from now on this one's.
        protocol: made for each connection.
        backlog: connections that may wait in the system's queue.
    """

    def __init__(self, sock: socket.socket, protocol: Callable[[], asyncio.BaseProtocol], backlog: int = 100) -> None:
        self._sock, self._fileno, self._protocol = sock, sock.fileno(), protocol
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._later: asyncio.TimerHandle | None = None
        self._is_closed = self._is_told = False
        sock.setblocking(False)
        sock.listen(backlog)
        self._loop.add_reader(self._fileno, self._accept)

    def close(self) -> None:
        """Accept nobody more; connections that there are stay."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._later is None:
            self._loop.remove_reader(self._fileno)
        else:
            self._later.cancel()
        self._sock.close()

    async def wait_closed(self) -> None:
        """Until those who were just being let in are in."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if not self._has_room():
                self._pause()
                return
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                self._tell_that_all_are_in()
                return
            except ConnectionError:  # it has gone already
                continue
            except OSError as error:  # no descriptor in the whole system, no memory
                self._pause(error.strerror)
                return
            task = self._loop.create_task(self._let_in(sock), name="listener")
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _let_in(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, sock)
        except OSError:  # it has gone already
            sock.close()

    def _has_room(self) -> bool:
        """Whether the next connection leaves enough descriptors: the system gives the lowest that is free."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            probe = self._sock.dup()
        except OSError:
            return False
        with probe:
            return most == resource.RLIM_INFINITY or probe.fileno() < most - min(SPARE, most // 4)

    def _pause(self, reason: str | None = None) -> None:
        self._loop.remove_reader(self._fileno)
        self._later = self._loop.call_later(LOOK_SECONDS, self._look)
        if not self._is_told:
            self._is_told = True
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            why = reason or "no descriptors to spare (ulimit -n)"
            log.warning("connections wait", port=self._port, reason=why, limit=limit)

    def _look(self) -> None:
        if not self._has_room():
            self._later = self._loop.call_later(LOOK_SECONDS, self._look)
            return
        self._later = None
        self._loop.add_reader(self._fileno, self._accept)

    def _tell_that_all_are_in(self) -> None:
        if self._is_told:
            self._is_told = False
            log.info("connections are accepted again", port=self._port)

    @property
    def _port(self) -> int | None:
        with contextlib.suppress(OSError, IndexError, TypeError):
            port: int = self._sock.getsockname()[1]
            return port
        return None
