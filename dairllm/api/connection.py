"""HTTP connections that nobody can hold for ever.

uvicorn bounds how long a connection may idle after an answer. Three more bounds stand here: how long a client may take to say what it
wants, how long what was written may wait for a client that does not read, and how many connections there may be: where one more comes,
the one that has idled longest goes. The first two end in an abort; the request that may be in hand learns it as it learns of any client
that goes away.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dairllm.api.api_error import ApiError
from dairllm.api.front import new_request_id

__all__ = ["HEAD_SECONDS", "STALL_SECONDS", "BoundedConnection"]

HEAD_SECONDS = 20.0
"""From the connection, or from the first byte of a further request, to its last header. A body that is refused must end in it too."""

STALL_SECONDS = 30.0
"""That bytes may wait for a client to read."""


class BoundedConnection(H11Protocol):
    """One connection of a client. Subclasses may have other bounds."""

    head_seconds = HEAD_SECONDS
    stall_seconds = STALL_SECONDS
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn would refuse a request with a text of its own, and keep those that idle
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._idle_since: float | None = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that anything that waits is seen to wait
        self._wait_for_a_request()
        if self._most is not None and len(self.connections) > self._most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        self._idle_since = None
        super().data_received(data)
        self._wait_for_a_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop_head()  # nothing of a further request is there: that uvicorn lets it idle for a while is enough
            self._idle_since = self.loop.time()
        else:
            self._wait_for_a_request()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP. uvicorn would say it in a form that no client of ours understands, also where an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        named = (b"x-request-id", new_request_id().encode())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close"), named]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

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

    def _make_room(self) -> None:
        """Close the connection that has idled longest, if one does; another than this one."""
        idle = [
            (one._idle_since, number, one)
            for number, one in enumerate(self.connections)
            if isinstance(one, BoundedConnection) and one is not self and one._idle_since is not None
        ]
        if idle:
            min(idle)[2].shutdown()

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
