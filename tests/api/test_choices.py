"""Several answers to one request: lists of prompts, and `n`."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from dairllm.errors import NetworkError
from tests.api.conftest import Serve
from tests.api.serving import Serving


async def complete(serving: Serving, **fields: Any) -> Any:
    return await serving.client.completions.create(**{"model": "small", "prompt": "on and on", "max_tokens": 12, **fields})


async def test_each_prompt_is_answered_as_by_itself(serve: Serve) -> None:
    async with serve() as serving:
        ids = [serving.tokenizer.encode_prompt(text) for text in ("on and on", "so it goes", "x")]
        alone = [(await complete(serving, prompt=one)).choices[0].text for one in ids]
        assert len(set(alone)) == 3
        for prompts in (["on and on", "so it goes", "x"], ids):
            answer = await complete(serving, prompt=prompts)
            assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(alone))
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            assert answer.usage.prompt_tokens == sum(map(len, ids))
            assert answer.usage.completion_tokens == 36


async def test_n_answers_have_seeds_one_after_the_other(serve: Serve) -> None:
    async with serve() as serving:
        alone = [(await complete(serving, seed=seed)).choices[0].text for seed in (7, 8, 9)]
        assert len(set(alone)) == 3
        answer = await complete(serving, seed=7, n=3, best_of=3)
        assert [choice.text for choice in answer.choices] == alone
        n_prompt = len(serving.tokenizer.encode_prompt("on and on"))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 36), "one prompt"
        both = await complete(serving, seed=7, n=2, prompt=["on and on", "x"])
        assert [choice.text for choice in both.choices[:2]] == alone[:2]
        assert [choice.text for choice in both.choices[2:]] == [
            (await complete(serving, seed=s, prompt="x")).choices[0].text for s in (7, 8)
        ]
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        talk = await serving.client.chat.completions.create(model="small", messages=messages, n=2, max_tokens=9)
        assert [choice.index for choice in talk.choices] == [0, 1]
        assert talk.choices[0].message.content != talk.choices[1].message.content


async def test_a_stream_of_several_answers(serve: Serve) -> None:
    async with serve() as serving:
        whole = await complete(serving, prompt=["on and on", "x"], n=2, seed=3)
        stream = await complete(serving, prompt=["on and on", "x"], n=2, seed=3, stream=True, stream_options={"include_usage": True})
        *chunks, last = [chunk async for chunk in stream]
    said = (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens)
    assert said == (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    assert last.choices == []
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    assert {chunk.id for chunk in chunks} == {last.id}


async def test_others_have_their_turn_between_two_answers(serve: Serve) -> None:
    """And who was taken once keeps its place in a full line."""
    async with serve(queue=1) as serving:
        model = serving.models.last
        model.gate.clear()
        many = asyncio.create_task(complete(serving, prompt=[[5] * 9, [6] * 10, [7] * 11], max_tokens=1))
        await serving.until(lambda: serving.metrics.running == 1)
        one = asyncio.create_task(complete(serving, prompt=[8] * 12, max_tokens=1))
        await serving.until(lambda: serving.metrics.waiting == 1)
        model.gate.set()
        assert len((await many).choices) == 3
        await one
        assert [rows for _, rows in model.fed] == [9, 12, 10, 11]


async def test_who_goes_away_is_given_no_further_answer(serve: Serve) -> None:
    async with serve() as serving:
        model = serving.models.last
        model.pause = 0.01
        asking = asyncio.create_task(complete(serving, prompt=[[5] * 9, [6] * 10], max_tokens=3000))
        await serving.until(lambda: len(model.fed) >= 2)
        asking.cancel()
        await serving.until(lambda: serving.metrics.requests["abandoned"] == 1)
        assert (await complete(serving, prompt=[8] * 12, max_tokens=1)).choices
        assert [rows for _, rows in model.fed if rows > 1] == [9, 12]
        assert serving.metrics.requests == {"abandoned": 1, "length": 1}


async def test_a_model_that_comes_back_between_two_answers(serve: Serve) -> None:
    async with serve() as serving:
        expected = await complete(serving, prompt=["a", "b"], max_tokens=1)
        model = serving.models.last
        model.failure, model.fails_in = NetworkError("the worker has gone"), 1
        assert (await complete(serving, prompt=["a", "b"], max_tokens=1)).choices == expected.choices


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_is_lost_between_two_answers(stream: bool, serve: Serve) -> None:
    async with serve(recovery=0.1) as serving:
        model = serving.models.last
        serving.models.refusals += [NetworkError("the worker has gone")] * 10_000
        model.failure, model.fails_in = NetworkError("the worker has gone"), 1
        if not stream:
            with pytest.raises(openai.InternalServerError, match="the worker has gone"):
                await complete(serving, prompt=["a", "b"], max_tokens=1)
            return
        async with httpx.AsyncClient(base_url=serving.url) as client:
            answer = await client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1, "stream": True})
        *events, error, done = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == "service_unavailable"
        assert {json.loads(event)["choices"][0]["index"] for event in events} == {0}
