"""What a stream says before its first piece: proxies cut a connection on which nothing comes."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from dairllm.errors import NetworkError
from tests.api.conftest import Serve
from tests.api.serving import Serving
from tests.patience import PATIENCE

BODY: dict[str, Any] = {"prompt": "on", "max_tokens": 12, "stream": True}


async def complete(serving: Serving, **fields: Any) -> Any:
    return await serving.client.completions.create(**{"model": "small", "prompt": "on", "max_tokens": 12, **fields})


async def test_a_stream_in_line_has_its_headers_and_signs_of_life(serve: Serve) -> None:
    async with serve(heartbeat=0.05) as serving, httpx.AsyncClient(base_url=serving.url, timeout=PATIENCE) as client:
        gate = serving.models.last.gate
        gate.clear()
        first = asyncio.create_task(complete(serving))
        await serving.until(lambda: serving.metrics.running == 1)
        async with client.stream("POST", "/v1/completions", json=BODY) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = answer.aiter_lines()
            said = [await anext(lines) for _ in range(4)]
            assert said == [": waiting, position 1", ""] * 2
            gate.set()
            rest = [line async for line in lines if line]
        assert (await first).choices[0].text
    data = [line.removeprefix("data: ") for line in rest if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in data[:-1]) == (await first).choices[0].text
    begun = next(number for number, line in enumerate(rest) if line.startswith("data: "))
    assert all(line.startswith(": waiting, position ") for line in rest[:begun])
    assert not any(line.startswith(":") for line in rest[begun:]), "none once it has begun"


async def test_a_prompt_that_is_being_computed(serve: Serve) -> None:
    async with serve(heartbeat=0.05) as serving, httpx.AsyncClient(base_url=serving.url, timeout=PATIENCE) as client:
        serving.models.last.gate.clear()
        async with client.stream("POST", "/v1/completions", json=BODY) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": waiting, position 0 (the prompt is being computed)"
            serving.models.last.gate.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_a_model_that_is_being_recovered(serve: Serve) -> None:
    async with serve(heartbeat=0.05) as serving, httpx.AsyncClient(base_url=serving.url, timeout=PATIENCE) as client:
        serving.models.last.failure = NetworkError("gone")
        serving.models.gate.clear()
        async with client.stream("POST", "/v1/completions", json=BODY) as answer:
            lines = answer.aiter_lines()
            recovering = ": waiting, position 1 (the model is being recovered)"
            while await anext(lines) != recovering:
                pass
            serving.models.gate.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert serving.metrics.requests == {"length": 1}


async def test_clients_pass_over_them(serve: Serve) -> None:
    async with serve(heartbeat=0.01) as serving:
        whole = await complete(serving)
        gate = serving.models.last.gate
        gate.clear()
        stream = await complete(serving, stream=True)
        await asyncio.sleep(0.05)
        gate.set()
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


async def test_what_is_known_before_the_line_is_a_status(serve: Serve) -> None:
    async with serve(queue=0) as serving:
        with pytest.raises(openai.BadRequestError):
            await complete(serving, prompt=[], stream=True)
        gate = serving.models.last.gate
        gate.clear()
        first = asyncio.create_task(complete(serving))
        await serving.until(lambda: serving.metrics.running == 1)
        with pytest.raises(openai.RateLimitError):
            await complete(serving, stream=True)
        gate.set()
        assert (await first).choices[0].text


async def test_who_goes_away_before_the_first_piece_leaves_the_line(serve: Serve) -> None:
    async with serve(heartbeat=0.05) as serving:
        gate = serving.models.last.gate
        gate.clear()
        first = asyncio.create_task(complete(serving))
        await serving.until(lambda: serving.metrics.running == 1)
        stream = await complete(serving, stream=True)
        await serving.until(lambda: serving.metrics.waiting == 1)
        await stream.close()
        await serving.until(lambda: serving.metrics.waiting == 0)
        gate.set()
        assert (await first).choices[0].text
        assert serving.metrics.requests == {"abandoned": 1, "length": 1}
