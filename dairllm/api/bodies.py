"""Bodies of requests, read within bounds: of one's size, of the time that it takes, of what all of them together hold."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from dairllm.api.errors import SERVER, ApiError
from dairllm.units import format_duration, format_size

__all__ = ["BODY_SECONDS", "Bodies"]

BODY_SECONDS = 30.0
"""That a client may take to send its request."""
LARGEST_AT_ONCE = 8
"""Bodies of the largest size that there is memory for at once."""
SMALL_BYTES = 64 << 10
"""A body of this size is read in any case: as many as there may be connections are no burden."""


class Bodies:
    """Reads the bodies of all requests of a server.

    Args:
        most: bytes of the largest.
        seconds: that one may take.
    """

    def __init__(self, most: int, seconds: float = BODY_SECONDS) -> None:
        self._most, self._seconds = most, seconds
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which counts as held until the context is left.

        Raises:
            ApiError: it is too large, takes too long, or others are too large already.
            ClientDisconnect: the client went away.
        """
        body = bytearray()
        too_large = ApiError(413, f"the body is larger than {format_size(self._most)} (server.request_bytes)", code="request_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._most:
            raise too_large
        try:
            try:
                async with asyncio.timeout(self._seconds), contextlib.aclosing(request.stream()) as stream:
                    async for chunk in stream:
                        if len(body) + len(chunk) > self._most:
                            raise too_large
                        if len(body) + len(chunk) > SMALL_BYTES and self._held + len(chunk) > LARGEST_AT_ONCE * self._most:
                            raise ApiError(503, "too many large requests at once; try again later", code="overloaded", kind=SERVER)
                        body += chunk
                        self._held += len(chunk)
            except TimeoutError:
                patience = format_duration(self._seconds)
                raise ApiError(408, f"the body did not come within {patience}", code="request_timeout") from None
            yield bytes(body)
        finally:
            self._held -= len(body)
