"""How probable tokens are, told with answers and of prompts: what lm-evaluation-harness asks for."""

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.serving import scoring
from tests.api.conftest import Serve
from tests.api.serving import Models, Serving

IDS = [[1, *range(40, 60)], [1, 9, 8, 7, 200, 210], [1, 3]]


async def log_softmaxes(path: Path, executor: Executor, ids: list[int]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """After each of the tokens, one computed after the other."""
    models, found = Models(path, executor), []
    async with models.ready() as opens:
        model = await opens()
        for position, token in enumerate(ids):
            logits = await model.feed([token], position, logits=True)
            assert logits is not None
            x = logits.astype(np.float64) - logits.max()
            found.append(x - math.log(np.exp(x).sum()))
        await model.close()
    return found


def name(serving: Serving, token: int) -> str:
    piece = serving.tokenizer.pieces[token]
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


async def complete(serving: Serving, **fields: Any) -> Any:
    return await serving.client.completions.create(**{"model": "small", "max_tokens": 1, **fields})


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_a_batch_of_prompts_is_scored(max_tokens: int, serve: Serve, model_path: Path, executor: Executor) -> None:
    """The request of lm-evaluation-harness' local-completions for multiple choice, and how it reads the answer."""
    async with serve() as serving:
        answer = await complete(serving, prompt=IDS, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 3 * max_tokens
    for ids, choice in zip(IDS, answer.choices, strict=True):
        expected = await log_softmaxes(model_path, executor, ids)
        found = choice.logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + max_tokens
        assert found.tokens[: len(ids)] == [name(serving, token) for token in ids]
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for place, token in enumerate(ids[1:], 1):
            row = expected[place - 1]
            assert found.token_logprobs[place] == pytest.approx(row[token], abs=1e-5)
            top = found.top_logprobs[place]
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-5)
            assert next(iter(top)) == name(serving, int(row.argmax()))
            is_greedy = found.token_logprobs[place] == max(top.values())
            assert is_greedy == (token == int(row.argmax()))
        if max_tokens:
            assert found.token_logprobs[-1] == pytest.approx(expected[-1].max(), abs=1e-5), "the likeliest was taken"


async def test_a_greedy_continuation_is_known_as_one(serve: Serve) -> None:
    async with serve() as serving:
        said = await complete(serving, prompt=IDS[0], max_tokens=5, temperature=0, logprobs=0)
        ids = [token for one in said.choices[0].logprobs.tokens for token in range(320) if name(serving, token) == one]
        assert len(ids) == 5, "tokens have different names"
        scored = (await complete(serving, prompt=IDS[0] + ids, logprobs=1, echo=True)).choices[0].logprobs
        places = range(len(IDS[0]), len(IDS[0]) + 5)
        assert all(scored.token_logprobs[place] == max(scored.top_logprobs[place].values()) for place in places)
        assert [scored.token_logprobs[place] for place in places] == pytest.approx(said.choices[0].logprobs.token_logprobs, abs=1e-5)


async def test_a_text_is_echoed(serve: Serve) -> None:
    async with serve() as serving:
        plain = (await complete(serving, prompt="on and on", max_tokens=6, seed=1)).choices[0].text
        echoed = (await complete(serving, prompt="on and on", max_tokens=6, seed=1, echo=True)).choices[0]
        assert (echoed.text, echoed.logprobs) == ("on and on" + plain, None)
        ids = serving.tokenizer.encode_prompt("on and on")
        scored = (await complete(serving, prompt="on and on", max_tokens=0, logprobs=2, echo=True)).choices[0]
        assert (scored.text, scored.finish_reason) == ("on and on", "length")
        widths = [len(serving.tokenizer.decode([token])) for token in ids[1:]]
        assert scored.logprobs.text_offset == [0, 0, *np.cumsum(widths[:-1]).tolist()], "what begins a text is none of it"
        by_ids = (await complete(serving, prompt=ids, max_tokens=0, logprobs=2, echo=True)).choices[0]
        assert by_ids.text == serving.tokenizer.decode(ids, show_special=True)
        chunks = [
            chunk.choices[0] async for chunk in await complete(serving, prompt="on and on", max_tokens=6, seed=1, echo=True, stream=True)
        ]
        assert "".join(chunk.text for chunk in chunks) == echoed.text
        assert chunks[0].text == "on and on"


async def test_logprobs_of_an_answer_whole_and_streamed(serve: Serve) -> None:
    async with serve() as serving:
        whole = (await complete(serving, prompt="on and on", max_tokens=10, logprobs=3, echo=True, seed=2)).choices[0].logprobs
        stream = await complete(serving, prompt="on and on", max_tokens=10, logprobs=3, echo=True, seed=2, stream=True)
        parts = [chunk.choices[0].logprobs async for chunk in stream]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, field)] == getattr(whole, field)
    assert all(one is None or 3 <= len(one) <= 4 for one in whole.top_logprobs), "the token itself is always there"


async def test_logprobs_in_a_conversation(serve: Serve, model_path: Path, executor: Executor) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    words: dict[str, Any] = {"model": "small", "messages": messages, "max_tokens": 8, "logprobs": True, "seed": 4}
    async with serve() as serving:
        create = serving.client.chat.completions.create
        whole = (await create(**words, top_logprobs=2)).choices[0]
        parts = [chunk.choices[0] async for chunk in await create(**words, top_logprobs=2, stream=True)]
        alone = (await create(**words)).choices[0]
        prompt = serving.tokenizer.encode("<|begin|><|turn|>user: hello<|turn|>assistant: ")
    content = whole.logprobs.content
    assert len(content) == 8
    assert [one for part in parts if part.logprobs for one in part.logprobs.content] == content
    assert [one.logprob for one in alone.logprobs.content] == [one.logprob for one in content]
    assert all(one.top_logprobs == [] for one in alone.logprobs.content)
    pieces = list(serving.tokenizer.pieces)
    ids = [pieces.index(bytes(one.bytes)) for one in content]
    expected = (await log_softmaxes(model_path, executor, prompt + ids))[len(prompt) - 1 :]
    for token, one, row in zip(ids, content, expected[:-1], strict=True):
        assert one.logprob == pytest.approx(row[token], abs=1e-5)
        assert [bytes(top.bytes) for top in one.top_logprobs] == [pieces[best] for best in np.argsort(-row, kind="stable")[:2]]
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(np.sort(row)[::-1][:2].tolist(), abs=1e-5)


async def test_a_token_that_cannot_be_has_a_logprob_that_json_can_say(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        model = serving.models.last
        feed_rows = model.feed_rows

        async def forbidding(tokens: Any, position: int) -> Any:
            rows = [row.copy() for row in await feed_rows(tokens, position)]
            for row in rows:
                row[8] = -np.inf
            return iter(rows)

        model.feed_rows = forbidding  # type: ignore[method-assign] # a model whose logits we choose
        answer = await client.post("/v1/completions", json={"prompt": [1, 9, 8], "max_tokens": 0, "logprobs": 0, "echo": True})
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["logprobs"]["token_logprobs"][2] == -9999.0


async def test_a_client_that_goes_away_while_its_prompt_is_scored_frees_the_model(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * 320 * 8)
    async with serve() as serving:
        model = serving.models.last
        model.pause = 0.01
        asked = asyncio.create_task(complete(serving, prompt=[7] * 2000, max_tokens=0, logprobs=1, echo=True))
        await serving.until(lambda: len(model.fed) >= 2)
        asked.cancel()
        await serving.until(lambda: serving.metrics.requests["abandoned"] == 1)
        assert len(model.fed) < 100, "of 250"
        assert {rows for _, rows in model.fed} == {8}
        model.pause = 0.0
        assert (await complete(serving, prompt=IDS[1])).choices
        assert len(serving.models.opened) == 1
