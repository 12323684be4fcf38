"""HTTP connections that nobody can hold for ever.

uvicorn bounds how long a connection may idle after an answer. Two more bounds stand here: how long a client may take to say what it
wants, and how long what was written may wait for a client that does not read. Both end in an abort; the request that may be in hand
learns it as it learns of any client that goes away.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "STALL_SECONDS", "BoundedConnection"]

HEAD_SECONDS = 20.0
"""From the connection, or from the end of a request, to the next request's last header. A body that is refused must end in it too."""

STALL_SECONDS = 30.0
"""That bytes may wait for a client to read."""


class BoundedConnection(H11Protocol):
    """One connection of a client. Subclasses may have other bounds."""

    head_seconds = HEAD_SECONDS
    stall_seconds = STALL_SECONDS
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that anything that waits is seen to wait
        self._wait_for_a_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_a_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head()
        self._stop_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall()

    def _wait_for_a_request(self) -> None:
        """Let the time run unless a request is in hand."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head()
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
