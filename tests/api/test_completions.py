"""The two addresses for text, asked by OpenAI's own client."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dairllm.engine.executor import Executor
from dairllm.serving.generation import Generation
from dairllm.serving.sampler import Sampler
from tests.api.conftest import Serve
from tests.api.serving import FINGERPRINT, SEQ_LEN, Models, Serving, write_model

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is that?"}]
PROMPT = "<|begin|><|turn|>system: Be brief.<|turn|>user: What is that?<|turn|>assistant: "


async def chat(serving: Serving, **fields: Any) -> Any:
    return await serving.client.chat.completions.create(**{"model": "small", "messages": MESSAGES, "max_tokens": 24, **fields})


async def complete(serving: Serving, **fields: Any) -> Any:
    return await serving.client.completions.create(**{"model": "small", "prompt": "on and on", "max_tokens": 24, **fields})


async def test_an_answer_is_what_the_model_generates_alone(serve: Serve, model_path: Path, executor: Executor) -> None:
    async with serve() as serving:
        answer = await chat(serving, seed=7)
        prompt_ids = serving.tokenizer.encode(PROMPT)
        models = Models(model_path, executor)
        async with models.ready() as opens:
            generation = Generation(await opens(), Sampler(1.0, 0.9, 7), prompt_ids, 24)
            ids = [token async for token in generation.run()]
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == serving.tokenizer.decode(ids)
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "small"
    assert answer.system_fingerprint == FINGERPRINT.of(models.last.nodes)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt_ids), 24, len(prompt_ids) + 24)
    assert usage.prompt_tokens_details.cached_tokens == 0


async def test_a_stream_says_the_same_in_pieces(serve: Serve) -> None:
    async with serve() as serving:
        whole = await chat(serving)
        chunks = [chunk async for chunk in await chat(serving, stream=True, stream_options={"include_usage": True})]
    *text, usage = chunks
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert {(chunk.object, chunk.id, chunk.created, chunk.model) for chunk in chunks} == {
        ("chat.completion.chunk", chunks[0].id, chunks[0].created, "small")
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text) == whole.choices[0].message.content
    assert len(text) > 5, "it comes in pieces"
    assert [chunk.choices[0].finish_reason for chunk in text] == [None] * (len(text) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in text)
    assert usage.choices == []
    assert usage.usage.prompt_tokens_details.cached_tokens == usage.usage.prompt_tokens - 1, "the one before had the same prompt"
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


async def test_a_stream_has_no_usage_unless_it_is_asked_for(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient() as client:
        body = {"prompt": "a", "max_tokens": 3, "stream": True}
        answer = await client.post(f"{serving.url}/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert not any("usage" in json.loads(event.removeprefix("data: ")) for event in events[:-2])


async def test_completions(serve: Serve) -> None:
    async with serve() as serving:
        whole = await complete(serving)
        chunks = [chunk async for chunk in await complete(serving, stream=True)]
        ids = serving.tokenizer.encode_prompt("on and on")
        by_ids, in_a_list, ids_in_a_list = [await complete(serving, prompt=prompt) for prompt in (ids, ["on and on"], [ids])]
    assert whole.object == "text_completion"
    assert whole.id.startswith("cmpl-")
    assert whole.usage.prompt_tokens == len(ids)
    assert ids[0] == serving.tokenizer.bos_id
    text = whole.choices[0].text
    assert text
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert [one.choices[0].text for one in (by_ids, in_a_list, ids_in_a_list)] == [text] * 3


async def test_sampling_is_the_requests(serve: Serve) -> None:
    async with serve() as serving:
        default = await complete(serving)
        same, other, greedy, cold, narrow = [
            (await complete(serving, **fields)).choices[0].text
            for fields in ({"seed": 1}, {"seed": 2}, {"temperature": 0}, {"temperature": 0, "seed": 5}, {"top_p": 0.0, "seed": 5})
        ]
        short = await complete(serving, max_tokens=2)
        unsaid = await serving.client.completions.create(model="small", prompt="on and on")
    text = default.choices[0].text
    assert same == text, "the settings' seed is 1"
    assert other != text
    assert greedy == cold == narrow, "the likeliest token, whatever the seed"
    assert (short.usage.completion_tokens, unsaid.usage.completion_tokens) == (2, 16), "sampling.steps where nothing is said"


async def test_max_completion_tokens_is_the_newer_name(serve: Serve) -> None:
    async with serve() as serving:
        assert (await chat(serving, max_completion_tokens=3)).usage.completion_tokens == 3
        assert (await chat(serving, max_completion_tokens=3, max_tokens=openai.omit)).usage.completion_tokens == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("in_a_list", [False, True], ids=["a string", "an array"])
async def test_stop_strings(in_a_list: bool, streamed: bool, serve: Serve) -> None:
    async with serve() as serving:
        free = (await complete(serving, max_tokens=60)).choices[0].text
        word = free[len(free) // 2 : len(free) // 2 + 3]
        stop = [word, "never said so"] if in_a_list else word
        answer = await complete(serving, max_tokens=60, stop=stop, stream=streamed)
        chunks = [chunk async for chunk in answer] if streamed else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == free[: free.index(word)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    if not streamed:
        assert 0 < answer.usage.completion_tokens < 60


async def test_no_stop_string(serve: Serve) -> None:
    async with serve() as serving:
        free = await complete(serving)
        for stop in (None, [], "", [""], ["never said so"] * 40, [f"never {n}" for n in range(40)]):
            assert (await complete(serving, stop=stop)).choices[0].text == free.choices[0].text


async def test_an_eos_id_ends_an_answer(tmp_path: Path, serve: Serve) -> None:
    path = write_model(tmp_path, eos=True)
    async with serve() as serving:
        free = await complete(serving, max_tokens=400, seed=3)
    async with serve(path=path) as serving:
        answer = await complete(serving, max_tokens=400, seed=3)
    assert answer.choices[0].finish_reason == "stop"
    assert free.choices[0].text.startswith(answer.choices[0].text)
    assert 0 < answer.usage.completion_tokens < 400


async def test_content_parts_are_joined_and_null_is_nothing(serve: Serve) -> None:
    async with serve() as serving:
        plain = await chat(serving, messages=[{"role": "user", "content": "one two"}, {"role": "assistant", "content": ""}])
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
        parted = await chat(serving, messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
        assert parted.choices[0].message.content == plain.choices[0].message.content
        assert parted.usage.prompt_tokens == plain.usage.prompt_tokens
        picture = [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
        with pytest.raises(openai.BadRequestError, match=r"part 1 is of type 'image_url'") as refused:
            await chat(serving, messages=[{"role": "user", "content": picture}])
        assert refused.value.param == "messages[0].content"


@pytest.mark.parametrize(
    ("role", "known_as"), [("system", "system"), ("user", "user"), ("assistant", "assistant"), ("developer", "system")]
)
async def test_roles_go_to_the_template(role: str, known_as: str, serve: Serve) -> None:
    """A role that no template knows as the one that it knows."""
    async with serve() as serving:
        answer = await chat(serving, messages=[{"role": role, "content": "x"}])
        expected = serving.tokenizer.encode(f"<|begin|><|turn|>{known_as}: x<|turn|>assistant: ")
    assert answer.usage.prompt_tokens == len(expected)


async def test_a_conversation_that_the_template_refuses(serve: Serve) -> None:
    async with serve() as serving:
        with pytest.raises(openai.BadRequestError, match="the chat template refuses this conversation: no tools here"):
            await chat(serving, messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
        with pytest.raises(openai.BadRequestError, match="no tools here"):
            await chat(serving, messages=[{"role": "function", "name": "f", "content": "x"}])


async def test_no_chat_template(tmp_path: Path, serve: Serve) -> None:
    path = write_model(tmp_path, template=None)
    async with serve(path=path) as serving:
        with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
            await chat(serving)
        assert (await complete(serving)).choices[0].text


async def test_a_conversation_that_goes_on_computes_only_what_is_new(serve: Serve) -> None:
    """And says the same as one that is computed from its beginning."""
    async with serve() as serving:
        model, tokenizer = serving.models.last, serving.tokenizer
        first = await complete(serving, prompt=list(range(40, 90)), max_tokens=10)
        assert model.fed == [(0, 50), *((position, 1) for position in range(50, 59))]
        model.fed.clear()
        longer = [*range(40, 90), *range(100, 130)]
        warm = await complete(serving, prompt=longer)
        assert model.fed[0] == (50, 30)
        assert warm.usage.prompt_tokens_details.cached_tokens == 50
        model.fed.clear()
        shorter = await complete(serving, prompt=longer[:20])
        assert model.fed[0] == (19, 1), "one token is always computed: its logits are wanted"
        await complete(serving, prompt=[1, 2, 3])
        model.fed.clear()
        cold = await complete(serving, prompt=longer)
        assert model.fed[0] == (0, 80)
        assert cold.usage.prompt_tokens_details.cached_tokens == 0
        assert cold.choices[0].text == warm.choices[0].text
        await complete(serving, prompt=[1, 2, 3])
        assert (await complete(serving, prompt=longer[:20])).choices[0].text == shorter.choices[0].text
        assert first.choices[0].text
        assert tokenizer.bos_id not in longer
    assert serving.metrics.cached_tokens == 50 + 19
    assert serving.metrics.prompt_tokens == 50 + 80 + 20 + 3 + 80 + 3 + 20


async def test_the_whole_context(serve: Serve) -> None:
    async with serve() as serving:
        answer = await complete(serving, prompt=[7] * SEQ_LEN, max_tokens=5)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "length"), "predicted from the last position"
        longest = f"this model's maximum context length is {SEQ_LEN} tokens"
        for prompt, found in (([7] * (SEQ_LEN + 1), f"has {SEQ_LEN + 1} tokens"), ("x" * 200_000, "has at least ")):
            with pytest.raises(openai.BadRequestError, match=f"prompt is too long: it {found}.*{longest}") as refused:
                await complete(serving, prompt=prompt)
            assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError) as refused:
            await chat(serving, messages=[{"role": "user", "content": "x" * (SEQ_LEN + 1)}])
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


async def test_models(serve: Serve) -> None:
    async with serve() as serving:
        (model,) = (await serving.client.models.list()).data
        assert (model.id, model.object, model.owned_by) == ("small", "model", "dairllm")
        assert await serving.client.models.retrieve("small") == model
        for asked in (serving.client.models.retrieve("org/other"), complete(serving, model="org/other")):
            with pytest.raises(openai.NotFoundError, match="the model 'org/other' does not exist; 'small' does") as refused:
                await asked
            assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


async def test_what_changes_nothing_is_taken(serve: Serve) -> None:
    """Clients say a great deal that is so anyway, or that concerns others."""
    idle: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "u"}
    async with serve() as serving:
        plain = await chat(serving)
        wordy = await chat(
            serving,
            **idle,
            logprobs=False,
            response_format={"type": "text"},
            metadata={"a": "b"},
            store=True,
            extra_body={"tools": [], "tool_choice": "none", "top_k": 0, "min_p": 0, "repetition_penalty": 1, "of_nobody": [1]},
        )
        assert wordy.choices[0].message.content == plain.choices[0].message.content
        assert (await complete(serving, **idle, echo=False, best_of=1, suffix="")).choices[0].text


async def test_answers_are_counted(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient() as client:
        await chat(serving, max_tokens=5)
        await asyncio.gather(complete(serving, max_tokens=4), complete(serving, max_tokens=4), return_exceptions=True)
        with pytest.raises(openai.BadRequestError):
            await chat(serving, max_tokens=0)
        text = (await client.get(f"{serving.url}/metrics")).text
        ready = await client.get(f"{serving.url}/readyz")
        alive = await client.get(f"{serving.url}/healthz")
    assert 'dairllm_requests_total{outcome="length"} 3.0' in text
    assert 'dairllm_requests_total{outcome="invalid"} 1.0' in text
    assert "dairllm_generation_tokens_total 13.0" in text
    assert "dairllm_time_to_first_token_seconds_count 3.0" in text
    assert "dairllm_inter_token_latency_seconds_count 10.0" in text
    assert "dairllm_num_requests_running 0.0" in text
    assert "dairllm_num_requests_waiting 0.0" in text
    assert (ready.status_code, alive.status_code) == (200, 200)
    assert "access-control-allow-origin" not in ready.headers
