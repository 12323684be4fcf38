"""`POST /v1/chat/completions` and `POST /v1/completions`: read, check, ask, answer."""

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from dairllm.api.answers import ChatShape, CompletionShape, Shape
from dairllm.api.api_error import ApiError
from dairllm.api.bodies import Bodies
from dairllm.api.choices import Choices
from dairllm.api.front import REQUEST_ID
from dairllm.api.other_fields import ignored_header
from dairllm.api.prompts import ServedModel, choices_of
from dairllm.api.schema import ChatRequest, CompletionRequest, parse
from dairllm.api.stream import send_stream, send_whole, while_connected
from dairllm.errors import DairllmError
from dairllm.serving.service import Service
from dairllm.telemetry import ServiceMetrics

__all__ = ["Completions"]

BRIEF_BYTES = 1024
"""Of a body whose text is encoded at once: to hand it to a thread would take longer."""


class Completions:
    """One of the two addresses, as an ASGI application.

    Args:
        schema: of its requests, which says which of the two it is.
        bodies: reads them.
        heartbeat: seconds between signs of life in a stream that has not begun.
    """

    def __init__(
        self,
        schema: type[ChatRequest] | type[CompletionRequest],
        served: ServedModel,
        service: Service,
        metrics: ServiceMetrics,
        bodies: Bodies,
        heartbeat: float,
    ) -> None:
        self._schema: type[ChatRequest] | type[CompletionRequest] = schema
        self._shape: type[Shape] = ChatShape if schema is ChatRequest else CompletionShape
        self._served, self._service, self._metrics, self._bodies = served, service, metrics, bodies
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.check()  # before the body is read: whoever has to come again need not send it
        try:
            async with self._bodies.read(Request(scope, receive)) as body:
                call = parse(self._schema, body)
                self._served.check_name(call.model)
                headers = ignored_header(call.ignored)
                if isinstance(call, CompletionRequest) and len(body) <= BRIEF_BYTES:
                    wanted = choices_of(call, self._served)
                else:
                    wanted = await asyncio.to_thread(choices_of, call, self._served)
        except (ApiError, DairllmError, ClientDisconnect) as error:
            self._metrics.requests["abandoned" if isinstance(error, ClientDisconnect) else "invalid"] += 1
            raise
        choices = Choices(wanted, self._service, whole=not call.stream, request_id=scope["state"][REQUEST_ID])
        shape = self._shape(self._served.name, self._served.tokenizer)
        async with while_connected(receive, choices):
            if call.stream:
                heartbeat, waiting = self._heartbeat, self._service.waiting
                await send_stream(choices, shape, send, headers, include_usage=call.include_usage, heartbeat=heartbeat, waiting=waiting)
            else:
                await send_whole(choices, shape, send, headers)
