"""A reply, sent to whoever asked: whole, or as server-sent events while it comes. A client that goes away frees the model."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dairllm.api.answers import Shape
from dairllm.api.errors import api_error
from dairllm.errors import DairllmError
from dairllm.nodes.reply import Reply

__all__ = ["send_stream", "send_whole", "while_connected"]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what is meant to be seen as it comes
]


@contextlib.asynccontextmanager
async def while_connected(receive: Receive, reply: Reply) -> AsyncIterator[None]:
    """Abandon the reply when the client goes away, and when the body ends, however it does."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        reply.abandon()

    watching = asyncio.create_task(watch(), name="client watch")
    try:
        yield
    finally:
        reply.abandon()
        watching.cancel()
        await asyncio.wait({watching})


async def send_whole(reply: Reply, shape: Shape, scope: Scope, receive: Receive, send: Send) -> None:
    """One JSON object.

    Raises:
        DairllmError: there is no answer, and nothing has been sent.
    """
    text = await reply.text()
    shape.fingerprint = reply.fingerprint
    await JSONResponse(shape.whole(text, reply))(scope, receive, send)


async def send_stream(
    reply: Reply, shape: Shape, send: Send, *, include_usage: bool, heartbeat: float, waiting: Callable[[Reply], str]
) -> None:
    """Events. The headers leave at once, and comments until the first piece is there: whoever stands between the client and us takes a
    connection for dead where nothing comes for a minute. So what fails from now on is an event, the last one.

    Args:
        heartbeat: seconds between comments.
        waiting: what a comment says.
    """

    async def say(*events: dict[str, Any]) -> None:
        if include_usage:
            events = tuple({**event, "usage": event.get("usage")} if "choices" in event else event for event in events)
        text = "".join(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n" for event in events)
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    while not await reply.begins(heartbeat):
        await send({"type": "http.response.body", "body": f": {waiting(reply)}\n\n".encode(), "more_body": True})
    async with contextlib.aclosing(reply.pieces()) as pieces:
        try:
            first = await anext(pieces, "")
            shape.fingerprint = reply.fingerprint
            await say(*shape.opening(), *([shape.chunk(first)] if first else []))
            async for piece in pieces:
                await say(shape.chunk(piece))
        except DairllmError as error:
            await say(api_error(error).body)
        else:
            await say(shape.closing(reply), *([shape.usage(reply)] if include_usage else []))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
