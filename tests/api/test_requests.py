"""What real programs send beside the text: how long, how chosen, in what form; and what is passed over, which is said."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from dairllm.config import Sampling
from tests.api.conftest import Serve
from tests.api.serving import SEQ_LEN, write_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = Sampling(temperature=1.0, seed=1)


class Asking:
    """Sends bodies as they are: some are none that OpenAI's own client would send."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.headers: httpx.Headers = httpx.Headers()

    async def chat(self, **fields: Any) -> dict[str, Any]:
        return await self._post(CHAT, {"messages": HELLO, "max_tokens": 8, **fields})

    async def complete(self, **fields: Any) -> dict[str, Any]:
        return await self._post(COMPLETIONS, {"prompt": "on and on", "max_tokens": 24, **fields})

    async def text(self, **fields: Any) -> str:
        choice = (await self.complete(**fields))["choices"][0]
        return str(choice["text"])

    async def _post(self, address: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._client.post(address, json={name: value for name, value in body.items() if value != "left out"})
        assert answer.status_code == 200, answer.text
        self.headers = answer.headers
        found = answer.json()
        assert isinstance(found, dict)
        return found


@pytest.mark.parametrize("said", ["left out", None, -1, -1.0])
async def test_an_answer_without_max_tokens_goes_on_to_the_end_of_the_context(said: object, serve: Serve) -> None:
    async with serve(sampling=ENDLESS) as serving, httpx.AsyncClient(base_url=serving.url, timeout=60) as client:
        prompt = [7] * (SEQ_LEN - 300)
        for fields in ({"max_tokens": said}, {"max_tokens": said, "max_completion_tokens": said}):
            found = await Asking(client).complete(prompt=prompt, **fields)
            assert found["usage"]["completion_tokens"] == 301, "the last one needs no position"
            assert found["choices"][0]["finish_reason"] == "length"


async def test_a_whole_number_may_be_written_as_any_number(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        plain = await asking.complete(max_tokens=16, seed=5, top_k=7)
        same = await asking.complete(max_tokens=16.0, seed=5.0, n=1.0, top_k=7.0, logprobs=None)
        assert same["choices"] == plain["choices"]
        assert (await asking.complete(max_tokens=1e1))["usage"]["completion_tokens"] == 10
        assert (await asking.chat(max_completion_tokens=5.0))["usage"]["completion_tokens"] == 5
        assert (await asking.complete(prompt=[7.0, 8], seed=5))["choices"] == (await asking.complete(prompt=[7, 8], seed=5))["choices"]


async def test_any_number_of_stop_strings(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        free = await asking.text(max_tokens=60)
        word = free[len(free) // 2 : len(free) // 2 + 3]
        stop = [*(f"never said so {number}" for number in range(50)), "", word, ""]
        assert await asking.text(max_tokens=60, stop=stop) == free[: free.index(word)]


async def test_tokens_are_chosen_as_the_request_says(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        greedy = await asking.text(temperature=0)
        for fields in ({"top_k": 1}, {"top_k": 1.0}, {"min_p": 1}, {"min_p": 1.0, "top_k": 9}):
            assert await asking.text(temperature=1.5, seed=3, **fields) == greedy
        for fields in ({"top_k": 0}, {"top_k": -1}, {"min_p": 0}):
            assert await asking.text(seed=3, **fields) == await asking.text(seed=3)
        first = serving.tokenizer.encode(greedy)[0]
        assert not (await asking.text(temperature=0, logit_bias={str(first): -100})).startswith(greedy[:1])
        assert await asking.text(temperature=0, max_tokens=3, logit_bias={"65": 100}) == 3 * serving.tokenizer.decode([65])
        assert (
            len(set(await asking.text(temperature=0, max_tokens=3, logit_bias={"65": 100}, frequency_penalty=2, presence_penalty=2))) == 1
        )
        biased = {"65": 60, "66": 59, "67": 58}
        taking_turns = await asking.text(temperature=0, max_tokens=3, logit_bias=biased, presence_penalty=2)
        assert sorted(taking_turns) == sorted(serving.tokenizer.decode([65, 66, 67]))
        repeating = await asking.text(temperature=0, max_tokens=6, logit_bias=biased)
        for name in ("repetition_penalty", "repeat_penalty"):
            assert await asking.text(temperature=0, max_tokens=6, logit_bias=biased, **{name: 1.5}) != repeating


async def test_the_settings_say_what_a_request_does_not(serve: Serve) -> None:
    narrow = Sampling(steps=16, temperature=1.0, seed=1, top_k=1)
    async with serve(sampling=narrow) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        assert await asking.text() == await asking.text(temperature=0)
        assert await asking.text(top_k=0) != await asking.text(temperature=0)


async def test_an_end_of_text_is_passed_over_where_that_is_asked_for(tmp_path: Path, serve: Serve) -> None:
    async with serve(path=write_model(tmp_path, eos=True)) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        assert (await asking.complete(max_tokens=400, seed=3))["choices"][0]["finish_reason"] == "stop"
        whole = await asking.complete(max_tokens=400, seed=3, ignore_eos=True)
        assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 400)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


async def test_what_a_template_is_told(tmp_path: Path, serve: Serve) -> None:
    """Prompts are told apart by their tokens, a byte each."""
    path = write_model(tmp_path, template=TEMPLATE)
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    async with serve(path=path) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        for fields, text in (
            ({}, "<user>hello</><assistant>"),
            ({"chat_template_kwargs": {"enable_thinking": False}}, "<user>hello</><assistant><think></think>"),
            ({"chat_template_kwargs": {"enable_thinking": True, "more": [1], "self": 1}}, "<user>hello</><assistant>"),
            ({"add_generation_prompt": False}, "<user>hello</>"),
            ({"add_generation_prompt": True}, "<user>hello</><assistant>"),
            ({"messages": begun}, "<user>hello</><assistant>Well, </><assistant>"),
            ({"messages": begun, "continue_final_message": True}, "<user>hello</><assistant>Well, "),
            ({"messages": begun, "continue_final_message": True, "add_generation_prompt": False}, "<user>hello</><assistant>Well, "),
            ({"messages": [*HELLO, *HELLO], "continue_final_message": True}, "<user>hello</><user>hello"),
        ):
            chatted = await asking.chat(**fields, seed=2)
            written = await asking.complete(prompt=serving.tokenizer.encode(text), max_tokens=8, seed=2)
            assert chatted["usage"]["prompt_tokens"] == written["usage"]["prompt_tokens"], fields
            assert chatted["choices"][0]["message"]["content"] == written["choices"][0]["text"], fields


async def test_a_message_that_a_template_trims_is_continued_where_it_ends(tmp_path: Path, serve: Serve) -> None:
    path = write_model(tmp_path, template="{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    async with serve(path=path) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        found = await asking.chat(messages=[{"role": "assistant", "content": "  Well,  "}], continue_final_message=True, seed=2)
        expected = await asking.complete(prompt=serving.tokenizer.encode("[Well,"), max_tokens=8, seed=2)
        assert found["choices"][0]["message"]["content"] == expected["choices"][0]["text"]


async def test_tools_are_taken_where_none_is_to_be_called(serve: Serve) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        asking = Asking(client)
        plain = await asking.chat()
        assert (await asking.chat(tools=tools, tool_choice="none"))["choices"] == plain["choices"]
        assert (await asking.chat(functions=[{"name": "f"}], function_call="none"))["choices"] == plain["choices"]
        assert "x-dairllm-ignored" not in asking.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_fields_that_are_passed_over_are_named(stream: bool, serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for address, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})):
            body |= {"max_tokens": 2, "stream": stream, "user": "u", "metadata": {}, "store": None}
            answer = await client.post(address, json=body)
            assert answer.status_code == 200
            assert "x-dairllm-ignored" not in answer.headers
            more = {"repeat_last_n": 64, "of_nobody": [1], "nothing": None, "a\r\nset-cookie": 1, "é": 2}
            answer = await client.post(address, json=body | more)
            assert answer.status_code == 200
            assert answer.headers["x-dairllm-ignored"] == "repeat_last_n, of_nobody, ?"
        many = {f"field_{number}": number for number in range(100)}
        header = (await client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1, **many})).headers["x-dairllm-ignored"]
        assert header.split(", ") == [*(f"field_{number}" for number in range(32)), "..."]
