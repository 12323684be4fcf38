"""Many clients at once, clients that go away, clients that do not read."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from dairllm.api.connection import BoundedConnection
from tests.api.conftest import Serve
from tests.api.serving import Serving, dialled
from tests.patience import PATIENCE

MANY = 50


async def complete(serving: Serving, prompt: Any, **fields: Any) -> Any:
    return await serving.client.completions.create(model="small", prompt=prompt, **{"max_tokens": 12, **fields})


async def test_fifty_at_once_get_what_they_would_get_alone(serve: Serve) -> None:
    async with serve(queue=64) as serving:
        prompts = [f"question {number % 7} of {number}" for number in range(MANY)]
        alone = [(await complete(serving, prompt)).choices[0].text for prompt in prompts]
        gate = serving.models.last.gate
        gate.clear()
        together = [asyncio.create_task(complete(serving, prompt)) for prompt in prompts]
        await serving.until(lambda: serving.metrics.running + serving.metrics.waiting == MANY)
        assert (serving.metrics.running, serving.metrics.waiting) == (1, MANY - 1)
        gate.set()
        assert [answer.choices[0].text for answer in await asyncio.gather(*together)] == alone
        assert len(set(alone)) > MANY / 2
        assert serving.metrics.requests == {"length": 2 * MANY}


async def test_those_for_whom_there_is_no_place_are_told_to_come_again(serve: Serve) -> None:
    async with serve(queue=8) as serving:
        gate = serving.models.last.gate
        gate.clear()
        tasks = [asyncio.create_task(complete(serving, f"question {number}")) for number in range(MANY)]
        await serving.until(lambda: sum(task.done() for task in tasks) == MANY - 9)
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, openai.RateLimitError)]
        assert len(refused) == MANY - 9, "one is answered, eight wait"
        assert len([result for result in results if not isinstance(result, BaseException)]) == 9
        for error in refused:
            assert error.code == "rate_limit_exceeded"
            assert "requests are waiting already" in error.message
            assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert serving.metrics.requests == {"length": 9, "queue_full": MANY - 9}
        assert (await complete(serving, "again")).choices[0].text


async def test_without_a_line_one_is_answered_and_nobody_waits(serve: Serve) -> None:
    async with serve(queue=0) as serving:
        gate = serving.models.last.gate
        gate.clear()
        first = asyncio.create_task(complete(serving, "one"))
        await serving.until(lambda: serving.metrics.running == 1)
        with pytest.raises(openai.RateLimitError):
            await complete(serving, "two")
        gate.set()
        assert (await first).choices[0].text


async def test_a_client_that_goes_away_in_the_middle_frees_the_model(serve: Serve) -> None:
    async with serve() as serving:
        model = serving.models.last
        model.pause = 0.01
        stream = await complete(serving, "on", max_tokens=4000, stream=True)
        chunks = [await anext(stream) for _ in range(3)]
        assert chunks
        await stream.close()
        passes = len(model.fed)
        answer = await complete(serving, "two", max_tokens=3)
        assert answer.usage.completion_tokens == 3
        assert len(model.fed) - passes < 20, "of 4000"
        assert serving.metrics.requests == {"abandoned": 1, "length": 1}


async def test_a_client_that_goes_away_frees_the_model_though_nothing_was_streamed(serve: Serve) -> None:
    async with serve() as serving:
        model = serving.models.last
        model.pause = 0.01
        asked = asyncio.create_task(complete(serving, [7] * 1000, max_tokens=3000))
        await serving.until(lambda: len(model.fed) >= 2)
        asked.cancel()
        await asyncio.wait({asked})
        await serving.until(lambda: serving.metrics.requests["abandoned"] == 1)
        assert len(model.fed) < 20
        assert (await complete(serving, "two", max_tokens=3)).usage.completion_tokens == 3


async def test_a_client_that_goes_away_while_it_waits_gives_up_its_place(serve: Serve) -> None:
    async with serve(queue=1) as serving:
        model = serving.models.last
        model.gate.clear()
        first = asyncio.create_task(complete(serving, "one"))
        await serving.until(lambda: serving.metrics.running == 1)
        second = asyncio.create_task(complete(serving, "two"))
        await serving.until(lambda: serving.metrics.waiting == 1)
        second.cancel()
        await serving.until(lambda: serving.metrics.waiting == 0)
        third = asyncio.create_task(complete(serving, "three"))
        await serving.until(lambda: serving.metrics.waiting == 1)
        model.gate.set()
        assert (await first).choices[0].text
        assert (await third).choices[0].text
        assert serving.metrics.requests == {"abandoned": 1, "length": 2}
        n_tokens = [len(serving.tokenizer.encode_prompt(text)) for text in ("one", "three")]
        assert serving.metrics.prompt_tokens == sum(n_tokens), "nobody computed the one that was given up"


class Hasty(BoundedConnection):
    head_seconds = 0.3
    stall_seconds = 0.5


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data


@contextlib.asynccontextmanager
async def reluctant(serving: Serving, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """A client that has asked, and for which the system keeps little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", serving.port))
    async with dialled(serving, post(body), sock) as (reader, _):
        await serving.until(lambda: serving.metrics.running == 1)
        yield reader


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """All that comes before the other end closes the connection or breaks it off."""
    received = b""
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(65536):
                received += piece
    return received


ENDLESS = {"prompt": "on", "max_tokens": 4000, "stream": True}


async def test_the_model_does_not_wait_for_ever_for_a_client_that_does_not_read(serve: Serve) -> None:
    async with serve(patience=0.3) as serving, reluctant(serving, ENDLESS) as reader:
        assert (await complete(serving, "two", max_tokens=3)).usage.completion_tokens == 3
        assert serving.metrics.requests == {"stalled": 1, "length": 1}
        assert serving.metrics.generated_tokens < 4000
        received = b""
        while b"[DONE]" not in received:
            received += await reader.read(65536)
        assert b'"error":{"message":"the answer was not read in time' in received, "for who reads after all"


async def test_a_connection_whose_client_does_not_read_is_broken_off(serve: Serve) -> None:
    async with serve(connection=Hasty) as serving, reluctant(serving, ENDLESS) as reader:
        assert (await complete(serving, "two", max_tokens=3)).usage.completion_tokens == 3
        assert serving.metrics.requests == {"abandoned": 1, "length": 1}
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"[DONE]" not in received


async def test_a_client_that_reads_late_gets_all_of_it(serve: Serve) -> None:
    """The answer is longer than what is kept for it: the model waits."""
    body = {"prompt": "on", "max_tokens": 2000, "stream": True}
    async with serve() as serving:
        async with reluctant(serving, body) as reader:
            model, passes = serving.models.last, -1
            while passes != len(model.fed):
                passes = len(model.fed)
                await asyncio.sleep(0.1)
            assert passes < 2000
            late = b""
            while b"[DONE]" not in late:
                late += await reader.read(65536)
        async with httpx.AsyncClient(base_url=serving.url) as client:
            prompt = (await client.post("/v1/completions", json=body)).text
        assert text_of(late.decode()) == text_of(prompt)
        assert serving.metrics.requests == {"length": 2}


def text_of(events: str) -> str:
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


@pytest.mark.parametrize(
    "said", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["nothing", "half", "idle"]
)
async def test_a_connection_without_a_request_is_closed(said: bytes, serve: Serve) -> None:
    async with serve(connection=Hasty, keep_alive=0.3) as serving, dialled(serving, said) as (reader, _):
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 200 OK") is said.endswith(b"\r\n\r\n")


BODY_BEGUN = b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize("begun", [b"GET /healthz HTTP/1.1\r\nX: ", BODY_BEGUN], ids=["head", "body"])
async def test_a_client_that_sends_drop_by_drop_is_not_waited_for(begun: bytes, serve: Serve) -> None:
    """In the head of a request, or in a body that nobody reads since the answer has been given."""
    async with serve(connection=Hasty) as serving, dialled(serving, begun) as (reader, writer):

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        await until_closed(reader)
        dripping.cancel()
        await asyncio.wait({dripping})
