"""Bodies of requests, read within bounds: of one's size, of the time that it takes, of what all of them together hold."""

import asyncio
import codecs
import contextlib
import zlib
from collections.abc import AsyncIterator

from starlette.datastructures import Headers
from starlette.requests import Request

from dairllm.api.api_error import SERVER, ApiError
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
        """A request's body, unpacked, without a mark of its byte order; it counts as held until the context is left.

        Raises:
            ApiError: it is too large, takes too long, is of a kind that is not taken, or others are too large already.
            ClientDisconnect: the client went away.
        """
        body = bytearray()
        unpacked = 0
        too_large = ApiError(413, f"the body is larger than {format_size(self._most)} (server.request_bytes)", code="request_too_large")
        packed = _check_kind(request.headers)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._most:
            raise too_large
        try:
            try:
                async with asyncio.timeout(self._seconds), contextlib.aclosing(request.stream()) as stream:
                    async for chunk in stream:
                        if len(body) + len(chunk) > self._most:
                            raise too_large
                        self._check_room(len(body) + len(chunk), len(chunk))
                        body += chunk
                        self._held += len(chunk)
            except TimeoutError:
                patience = format_duration(self._seconds)
                raise ApiError(408, f"the body did not come within {patience}", code="request_timeout") from None
            if packed:
                said = min(_said_size(body), self._most)
                self._check_room(said, said)
                unpacked = said
                self._held += unpacked
                found = await asyncio.to_thread(_unpacked, bytes(body), said)
                if len(found) > said:
                    raise too_large if said == self._most else _not_whole("more than the size at its end says")
                self._held -= unpacked - len(found)
                unpacked = len(found)
            else:
                found = bytes(body)
            yield found.removeprefix(codecs.BOM_UTF8)
        finally:
            self._held -= len(body) + unpacked

    def _check_room(self, nbytes: int, more: int) -> None:
        """ApiError where a body of so many bytes, `more` of which do not count as held yet, is too much."""
        if nbytes > SMALL_BYTES and self._held + more > LARGEST_AT_ONCE * self._most:
            raise ApiError(503, "too many large requests at once; try again later", code="overloaded", kind=SERVER)


def _check_kind(headers: Headers) -> bool:
    """Whether the body is packed by gzip.

    A page of any site may have a browser send a text to us, unasked; JSON it may not send unless we let it (CORS).

    Raises:
        ApiError: it is packed in another way, or a page sends what is not said to be JSON.
    """
    if "origin" in headers:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"a web page's request must be of the type application/json, found {kind[:60]!r}"
            raise ApiError(415, message, code="unsupported_media_type")
    packing = headers.get("content-encoding", "").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip"):
        message = f"the body is packed by {packing[:60]!r}; expected gzip, or none"
        raise ApiError(415, message, code="unsupported_content_encoding", headers={"accept-encoding": "gzip"})
    return packing.endswith("gzip")


def _said_size(body: bytearray) -> int:
    """That the end of what gzip has packed gives for it (RFC 1952, ISIZE): any number where it is none."""
    return int.from_bytes(body[-4:], "little")


def _unpacked(body: bytes, most: int) -> bytes:
    """What gzip has packed, or its first `most` + 1 bytes. For a thread: it may take a while.

    Raises:
        ApiError: it has not, or something is missing.
    """
    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        found = unpacking.decompress(body, most + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is said to be packed by gzip, but is not: {error}", code="invalid_gzip") from None
    if len(found) <= most and (not unpacking.eof or unpacking.unused_data):
        raise _not_whole("bytes after it" if unpacking.eof else "no end")
    return found


def _not_whole(found: str) -> ApiError:
    return ApiError(400, f"the body is packed by gzip: expected one whole stream, found {found}", code="invalid_gzip")
