"""What is wrong with a request is told in OpenAI's form, with the field and a reason, and harms nobody."""

import asyncio
import contextlib
import gzip
import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import Serve
from tests.api.serving import VOCAB, Serving, dialled
from tests.patience import PATIENCE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", **fields}


CASES: list[tuple[str, Any, str | None, str]] = [
    # address, body, param, part of the message
    (CHAT, b"", None, "the body is not JSON"),
    (CHAT, b"{", None, "the body is not JSON"),
    (CHAT, b"\xff\xfe", None, "the body is not JSON"),
    (CHAT, b"[" * 100_000, None, "the body is not JSON: recursion limit exceeded"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "the body is not JSON"),
    (CHAT, [], None, "the body is JSON, but no object"),
    (CHAT, "text", None, "the body is JSON, but no object"),
    (CHAT, None, None, "the body is JSON, but no object"),
    (CHAT, {}, "messages", "the field is missing"),
    (CHAT, {"prompt": "x"}, "messages", "the field is missing"),
    (CHAT, {"messages": None}, "messages", "expected a valid array, found null"),
    (CHAT, {"messages": []}, "messages", "expected at least one"),
    (CHAT, {"messages": "hello"}, "messages", "expected a valid array, found 'hello'"),
    (CHAT, {"messages": [HELLO[0], 3]}, "messages[1]", "expected an object, found 3"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "the field is missing"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "expected 'system', 'user'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "expected a string, null or a list of parts"),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "part 0: expected an object"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "part 0: expected a string"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content", "type 'input_audio'"),
    (CHAT, chat(model=3), "model", "expected a valid string, found 3"),
    (CHAT, chat(temperature="warm"), "temperature", "expected a valid number, found 'warm'"),
    (CHAT, chat(temperature=-1), "temperature", "expected greater than or equal to 0, found -1"),
    (CHAT, chat(temperature=True), "temperature", "expected a valid number, found True"),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature", "expected a finite number"),
    (CHAT, chat(top_p=1.5), "top_p", "expected less than or equal to 1, found 1.5"),
    (CHAT, chat(seed="x"), "seed", "expected a valid integer"),
    (CHAT, chat(seed=2**64), "seed", "expected less than"),
    (CHAT, chat(max_tokens=0), "max_tokens", "expected greater than or equal to 1, found 0"),
    (CHAT, chat(max_tokens=2.5), "max_tokens", "expected a valid integer"),
    (CHAT, chat(max_completion_tokens=-2), "max_completion_tokens", "expected greater than or equal to 1"),
    (CHAT, chat(max_tokens=True), "max_tokens", "expected a valid integer, found True"),
    (CHAT, chat(stop=["a"] * 1025), "stop", "expected up to 1024 strings, found 1025"),
    (CHAT, chat(stop=["a" * 1025]), "stop", "expected strings of up to 1024 characters, 16384 in all"),
    (CHAT, chat(stop=["a" * 1000] * 17), "stop", "expected strings of up to 1024 characters, 16384 in all"),
    (CHAT, chat(stop=[1]), "stop", "expected a string or a list of strings"),
    (CHAT, chat(stop={}), "stop", "expected a string or a list of strings"),
    (CHAT, chat(stream="yes"), "stream", "expected a valid boolean"),
    (CHAT, chat(stream_options={"include_usage": 1}), "stream_options.include_usage", "expected a valid boolean"),
    (CHAT, chat(n=0), "n", "expected greater than or equal to 1"),
    (CHAT, chat(n=257), "n", "expected less than or equal to 256"),
    (CHAT, chat(logprobs=3), "logprobs", "expected a valid boolean"),
    (CHAT, chat(top_logprobs=3), "top_logprobs", "expected logprobs true beside it"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "expected less than or equal to 20"),
    (CHAT, chat(top_k=-2), "top_k", "expected greater than or equal to 0"),
    (CHAT, chat(min_p=1.5), "min_p", "expected less than or equal to 1"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty", "expected greater than 0"),
    (CHAT, chat(repeat_penalty=-1), "repeat_penalty", "expected greater than 0"),
    (CHAT, chat(presence_penalty=2.5), "presence_penalty", "expected less than or equal to 2"),
    (CHAT, chat(ignore_eos=1), "ignore_eos", "expected a valid boolean"),
    (CHAT, chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message", "expected add_generation_prompt false"),
    (CHAT, chat(continue_final_message=True) | {"messages": [{"role": "assistant"}]}, "continue_final_message", "has no content"),
    (CHAT, chat(chat_template_kwargs=[]), "chat_template_kwargs", "expected an object, found a list"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "messages is not to be set there"),
    (CHAT, chat(echo=True, enable_thinking=False), "enable_thinking", "say chat_template_kwargs"),
    (CHAT, chat(grammar="root ::= x"), "grammar", 'not supported (only "" is)'),
    (CHAT, chat(n_predict=5), "n_predict", "not supported (only -1 is); leave it out, say max_tokens"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools", "not supported (only [] is)"),
    (CHAT, chat(tools=[{"type": "function"}], tool_choice="auto"), "tools", 'or with tool_choice "none"'),
    (CHAT, chat(tool_choice="required"), "tool_choice", 'not supported (only "none" and "auto" are)'),
    (CHAT, chat(functions=[{}]), "functions", "not supported"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format", 'not supported (only {"type": "text"} is)'),
    (CHAT, chat(frequency_penalty=-2.5), "frequency_penalty", "expected greater than or equal to -2"),
    (CHAT, chat(logit_bias=[1]), "logit_bias", "expected an object such as"),
    (CHAT, chat(logit_bias={"x": 2}), "logit_bias", "expected token ids, found 'x'"),
    (CHAT, chat(logit_bias={"1": 101}), "logit_bias", "token 1: expected a number from -100 to 100"),
    (CHAT, chat(logit_bias={"1": None}), "logit_bias", "token 1: expected a number"),
    (CHAT, chat(logit_bias={str(VOCAB): 1}), "logit_bias", f"token {VOCAB}; the model knows ids 0 to {VOCAB - 1}"),
    (CHAT, chat(logit_bias={str(token): 1 for token in range(1025)}), "logit_bias", "expected up to 1024 tokens, found 1025"),
    (CHAT, chat(audio={"voice": "x"}), "audio", "not supported; leave it out"),
    (COMPLETIONS, {}, "prompt", "the field is missing"),
    (COMPLETIONS, {"messages": HELLO}, "prompt", "the field is missing"),
    (COMPLETIONS, {"prompt": None}, "prompt", "expected a string, or a list of token ids"),
    (COMPLETIONS, {"prompt": ["a", 3]}, "prompt", "expected a string, or a list of token ids, or a list of these"),
    (COMPLETIONS, {"prompt": ["a", [[1]]]}, "prompt", "expected a string, or a list of token ids, or a list of these"),
    (COMPLETIONS, {"prompt": ["a"] * 257}, "prompt", "expected up to 256 prompts, found 257"),
    (COMPLETIONS, {"prompt": ["a"] * 200, "n": 2}, "n", "200 prompts x 2 answers; expected up to 256 answers in all"),
    (COMPLETIONS, {"prompt": ["a", []]}, "prompt[1]", "it has no tokens"),
    (COMPLETIONS, {"prompt": [[1], [VOCAB]]}, "prompt[1]", f"token 0 is {VOCAB}"),
    (COMPLETIONS, {"prompt": [1, 2.5]}, "prompt", "expected a string, or a list of token ids"),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "expected a string, or a list of token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "it has no tokens"),
    (COMPLETIONS, {"prompt": [1, 10**4000]}, "prompt", f"token 1 is 1{199 * '0'}...; the model knows ids"),
    (COMPLETIONS, {"prompt": [1, VOCAB]}, "prompt", f"token 1 is {VOCAB}; the model knows ids 0 to {VOCAB - 1}"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "token 0 is -1"),
    (COMPLETIONS, prompt(echo=1), "echo", "expected a valid boolean"),
    (COMPLETIONS, prompt(max_tokens=-2), "max_tokens", "expected greater than or equal to 0"),
    (COMPLETIONS, prompt(best_of=2), "best_of", "not supported (only 1, as n, is)"),
    (COMPLETIONS, prompt(best_of=1, n=2), "best_of", "not supported (only 2, as n, is)"),
    (COMPLETIONS, prompt(logprobs=21), "logprobs", "expected less than or equal to 20"),
    (COMPLETIONS, {"prompt": [[7] * 4000] * 32, "echo": True, "logprobs": 1}, "logprobs", "256000 of them"),
    (COMPLETIONS, prompt(suffix="x"), "suffix", "not supported"),
]


def checked(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "\n" not in error["message"]
    assert isinstance(error["type"], str)
    return dict(error)


async def test_bad_bodies(serve: Serve) -> None:
    """One server for all of them: none of them disturbs the next, nor the model."""
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for address, body, param, message in CASES:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            error = checked(await client.post(address, content=content), 400)
            case = f"{address} {content[:100]!r}: {error}"
            assert error["param"] == param, case
            assert message in error["message"], case
            assert error["type"] == "invalid_request_error"
            assert error["code"], case
            if param is not None:
                assert error["message"].startswith(f"{param}: "), case
        assert serving.metrics.requests["invalid"] == len(CASES)
        assert serving.models.last.fed == []
        assert (await client.post(COMPLETIONS, json=prompt())).status_code == 200


async def test_unknown_addresses_and_methods(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for method, path in (("GET", "/"), ("POST", "/v1/embeddings"), ("GET", "/v1/model"), ("POST", "/v2/completions/")):
            error = checked(await client.request(method, path), 404)
            assert error["code"] == "unknown_url"
        for method, path in (("GET", CHAT), ("PUT", COMPLETIONS), ("POST", "/v1/models"), ("DELETE", "/healthz")):
            answer = await client.request(method, path)
            error = checked(answer, 405)
            assert error["message"].startswith(f"{method} {path}: the method is not allowed")
            assert "allow" in answer.headers


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_a_body_that_is_too_large(chunked: bool, serve: Serve) -> None:
    async with serve(request_bytes=100_000) as serving, httpx.AsyncClient(base_url=serving.url) as client:

        async def pieces() -> Any:
            for _ in range(30):
                yield b" " * 10_000

        content = pieces() if chunked else b" " * 300_000
        error = checked(await client.post(CHAT, content=content), 413)
        assert error["message"] == "the body is larger than 97.66KiB (server.request_bytes)"
        assert (await client.post(COMPLETIONS, json=prompt())).status_code == 200
        just = json.dumps(prompt()).encode()
        assert (await client.post(COMPLETIONS, content=just + b" " * (100_000 - len(just)))).status_code == 200


BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"


async def test_a_body_that_does_not_come(serve: Serve) -> None:
    async with serve(body_seconds=0.2) as serving:
        async with dialled(serving, BEGUN) as (reader, _), asyncio.timeout(PATIENCE):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            error = json.loads(await reader.readuntil(b"}}"))["error"]
        assert error["code"] == "request_timeout"
        assert error["message"] == "the body did not come within 200ms"


async def test_a_client_that_goes_away_in_its_body(serve: Serve) -> None:
    async with serve() as serving:
        async with dialled(serving, BEGUN):
            await asyncio.sleep(0.05)
        await serving.until(lambda: serving.metrics.requests["abandoned"] == 1)
        assert await answers(serving)


async def test_large_bodies_at_once_are_bounded_and_small_ones_come_through(serve: Serve) -> None:
    most = 100_000
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % most
    async with serve(request_bytes=most) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        async with contextlib.AsyncExitStack() as others:
            readers = [(await others.enter_async_context(dialled(serving, head + b" " * (most - 1))))[0] for _ in range(9)]
            waiting = [asyncio.create_task(reader.readuntil(b"\r\n")) for reader in readers]
            (refused,), _ = await asyncio.wait(waiting, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            assert refused.result().startswith(b"HTTP/1.1 503 ")
            assert (await client.post(COMPLETIONS, json=prompt())).status_code == 200
            error = checked(await client.post(COMPLETIONS, content=b" " * most), 503)
            assert error["code"] == "overloaded"
            for task in waiting:
                task.cancel()
        await serving.until(lambda: serving.metrics.requests["abandoned"] == 8)
        checked(await client.post(COMPLETIONS, content=b" " * most), 400)


async def answers(serving: Serving) -> bool:
    return bool((await serving.client.completions.create(model="small", prompt="x", max_tokens=2)).choices)


async def test_what_is_no_http(serve: Serve) -> None:
    async with serve() as serving:
        async with dialled(serving, b"\x00\x01\x02 hello\r\n\r\n") as (reader, _):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nx-request-id: req_" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == {
            "message": "Invalid HTTP request received.",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_http",
        }
        assert await answers(serving)


PACKED = {"content-encoding": "gzip"}


@pytest.mark.parametrize("packing", ["gzip", "x-gzip", "GZIP"])
async def test_a_packed_body(packing: str, serve: Serve) -> None:
    async with serve(request_bytes=100_000) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        body = json.dumps(prompt(max_tokens=3)).encode()
        plain = await client.post(COMPLETIONS, content=body)
        packed = await client.post(COMPLETIONS, content=gzip.compress(body), headers={"content-encoding": packing})
        assert packed.json()["choices"] == plain.json()["choices"]
        just = body + b" " * (100_000 - len(body))
        assert (await client.post(COMPLETIONS, content=gzip.compress(just), headers=PACKED)).status_code == 200


async def test_what_is_wrong_with_a_packed_body(serve: Serve) -> None:
    async with serve(request_bytes=100_000) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        whole = gzip.compress(json.dumps(prompt()).encode())
        for content, status, code, message in (
            (gzip.compress(b" " * 100_001), 413, "request_too_large", "the body is larger than 97.66KiB"),
            (gzip.compress(b" " * 80_000_000), 413, "request_too_large", "the body is larger than 97.66KiB"),
            (b'{"prompt": "hello"}', 400, "invalid_gzip", "is said to be packed by gzip, but is not"),
            (whole[:-9], 400, "invalid_gzip", "expected one whole stream, found no end"),
            (whole + b"x", 400, "invalid_gzip", "expected one whole stream, found bytes after it"),
            (b"", 400, "invalid_gzip", "found no end"),
        ):
            error = checked(await client.post(COMPLETIONS, content=content, headers=PACKED), status)
            assert error["code"] == code
            assert message in error["message"]
        answer = await client.post(COMPLETIONS, content=whole, headers={"content-encoding": "br"})
        assert checked(answer, 415)["message"] == "the body is packed by 'br'; expected gzip, or none"
        assert answer.headers["accept-encoding"] == "gzip"
        assert serving.metrics.requests == {"invalid": 7}
        assert (await client.post(COMPLETIONS, content=whole, headers=PACKED)).status_code == 200


async def test_many_packed_bodies_at_once(serve: Serve) -> None:
    """Each is given the room that it needs, not that of the largest."""
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url, timeout=PATIENCE) as client:
        body = gzip.compress(json.dumps(prompt(max_tokens=1)).encode())
        answers_ = await asyncio.gather(*(client.post(COMPLETIONS, content=body, headers=PACKED) for _ in range(40)))
        assert [answer.status_code for answer in answers_] == [200] * 40


async def test_a_packed_body_that_says_a_false_size(serve: Serve) -> None:
    async with serve(request_bytes=100_000) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for size in (0, 100, 99_999):
            lying = gzip.compress(b" " * 50_000_000)[:-4] + size.to_bytes(4, "little")
            error = checked(await client.post(COMPLETIONS, content=lying, headers=PACKED), 400)
            assert error["message"].endswith("expected one whole stream, found more than the size at its end says")


async def test_a_mark_of_the_byte_order(serve: Serve) -> None:
    """As some editors and languages write it at the head of a text."""
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        body = b"\xef\xbb\xbf" + json.dumps(prompt(max_tokens=3)).encode()
        assert (await client.post(COMPLETIONS, content=body)).status_code == 200
        assert (await client.post(COMPLETIONS, content=gzip.compress(body), headers=PACKED)).status_code == 200
