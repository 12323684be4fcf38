"""A reply, sent to whoever asked: whole, or as server-sent events while it comes. A client that goes away frees the model."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.types import Receive, Send

from dairllm.api.answers import ChoiceShape, Shape
from dairllm.api.choices import Choices
from dairllm.api.errors import api_error
from dairllm.errors import DairllmError
from dairllm.serving.reply import Reply

__all__ = ["send_stream", "send_whole", "while_connected"]

Headers = Sequence[tuple[bytes, bytes]]

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what is meant to be seen as it comes
]


@contextlib.asynccontextmanager
async def while_connected(receive: Receive, choices: Choices) -> AsyncIterator[None]:
    """Abandon the answer when the client goes away, and when the body ends, however it does."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        choices.abandon()

    watching = asyncio.create_task(watch(), name="client watch")
    try:
        yield
    finally:
        choices.abandon()
        watching.cancel()
        await asyncio.wait({watching})


async def send_whole(choices: Choices, shape: Shape, send: Send, headers: Headers) -> None:
    """One JSON object.

    Raises:
        DairllmError: there is no answer, and nothing has been sent.
    """
    forms = []
    for choice, reply in choices.answered():
        text = await reply.text()
        shape.fingerprint = reply.fingerprint
        forms.append(shape.choice(choice, reply).whole(text))
    body = _json(shape.whole(forms, choices.usage())).encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_stream(
    choices: Choices,
    shape: Shape,
    send: Send,
    headers: Headers,
    *,
    include_usage: bool,
    heartbeat: float,
    waiting: Callable[[Reply], str],
) -> None:
    """Events. The headers leave at once, and comments until the first piece of a choice is there: whoever stands between the client and us
    takes a connection for dead where nothing comes for a minute. So what fails from now on is an event, the last one.

    Args:
        heartbeat: seconds between comments.
        waiting: what a comment says.
    """

    async def say(*events: dict[str, Any]) -> None:
        if include_usage:
            events = tuple({**event, "usage": event.get("usage")} if "choices" in event else event for event in events)
        text = "".join(f"data: {_json(event)}\n\n" for event in events)
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def say_choice(form: ChoiceShape, reply: Reply) -> None:
        while not await reply.begins(heartbeat):
            await send({"type": "http.response.body", "body": f": {waiting(reply)}\n\n".encode(), "more_body": True})
        async with contextlib.aclosing(reply.pieces()) as pieces:
            first = await anext(pieces, "")
            shape.fingerprint = reply.fingerprint
            await say(*map(shape.chunk, form.opening() + ([form.piece(first)] if first else [])))
            async for piece in pieces:
                await say(shape.chunk(form.piece(piece)))
        await say(shape.chunk(form.closing()))

    await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
    try:
        for choice, reply in choices.answered():
            await say_choice(shape.choice(choice, reply), reply)
    except DairllmError as error:
        await say(api_error(error).body)
    else:
        if include_usage:
            await say(shape.usage(choices.usage()))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
