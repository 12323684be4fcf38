"""`POST /v1/chat/completions` and `POST /v1/completions`: read, check, ask, answer."""

import asyncio
import contextlib

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from dairllm.api.answers import ChatShape, CompletionShape, Shape
from dairllm.api.errors import ApiError
from dairllm.api.prompts import ServedModel, order_of
from dairllm.api.schema import ChatRequest, CompletionRequest, parse
from dairllm.api.stream import send_stream, send_whole, while_connected
from dairllm.errors import DairllmError
from dairllm.nodes.service import Service
from dairllm.telemetry import ServiceMeters
from dairllm.units import format_duration, format_size

__all__ = ["Completions"]

BODY_SECONDS = 30.0
"""That a client may take to send its request."""


class Completions:
    """One of the two addresses, as an ASGI application.

    Args:
        schema: of its requests, which says which of the two it is.
        body_seconds: that a client may take to send its request.
    """

    def __init__(
        self,
        schema: type[ChatRequest] | type[CompletionRequest],
        served: ServedModel,
        service: Service,
        meters: ServiceMeters,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._schema: type[ChatRequest] | type[CompletionRequest] = schema
        self._shape: type[Shape] = ChatShape if schema is ChatRequest else CompletionShape
        self._served, self._service, self._meters = served, service, meters
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.check()  # before the body is read: whoever has to come again need not send it
        try:
            call = parse(self._schema, await self._body(Request(scope, receive)))
            self._served.check_name(call.model)
            order = await asyncio.to_thread(order_of, call, self._served)
        except (ApiError, DairllmError, ClientDisconnect) as error:
            self._meters.requests["abandoned" if isinstance(error, ClientDisconnect) else "invalid"] += 1
            raise
        reply, shape = self._service.ask(order), self._shape(self._served.name)
        async with while_connected(receive, reply):
            if call.stream:
                await send_stream(reply, shape, send, include_usage=call.include_usage)
            else:
                await send_whole(reply, shape, scope, receive, send)

    async def _body(self, request: Request) -> bytes:
        """All of it, within bounds of size and time.

        Raises:
            ApiError: it is too large, or takes too long.
        """
        most, body = self._served.request_bytes, bytearray()
        too_large = ApiError(413, f"the body is larger than {format_size(most)} (server.request_bytes)", code="request_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._body_seconds), contextlib.aclosing(request.stream()) as stream:
                async for chunk in stream:
                    if len(body) + len(chunk) > most:
                        raise too_large
                    body += chunk
        except TimeoutError:
            patience = format_duration(self._body_seconds)
            raise ApiError(408, f"the body did not come within {patience}", code="request_timeout") from None
        return bytes(body)
