"""A model whose chat template is hostile: its requests are told, everybody else is served, and the server ends when it is told to."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dairllm import machine
from tests.api.conftest import Serve
from tests.api.serving import TEMPLATE, write_model
from tests.patience import PATIENCE

HOSTILE = {
    "hang": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "memory": "{{ ('a\\n' * 10000000) | indent(1000) }}",
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A template that does what the first message says, in the line of that."""
    cases = "".join(f"{{% if messages[0].content == '{name}' %}}\n{text}\n{{% endif %}}" for name, text in HOSTILE.items())
    return write_model(tmp_path, f"{cases}{TEMPLATE}")


@pytest.mark.parametrize(
    ("content", "told"), [("hang", r"\(line 2\): it takes more than 2s"), ("memory", r"\(line 4\): it takes more than 64 MiB")]
)
async def test_a_request_is_told_and_the_next_one_served(hostile: Path, serve: Serve, content: str, told: str) -> None:
    async with serve(hostile) as server:

        async def ask(said: str) -> str | None:
            messages: Any = [{"role": "user", "content": said}]
            answer = await server.client.chat.completions.create(model="small", messages=messages, max_tokens=3)
            return answer.choices[0].message.content

        expected = await ask("hello")
        before = machine.rss_bytes()
        bad = asyncio.create_task(ask(content))
        plain = await server.client.completions.create(model="small", prompt="text", max_tokens=3)
        assert plain.choices[0].text, "who has no template to wait for does not"
        with pytest.raises(openai.BadRequestError, match=f"the chat template fails {told}") as error:
            await bad
        assert error.value.code == "chat_template_error"
        assert await ask("hello") == expected
        assert machine.rss_bytes() < before + (16 << 20), "the template's memory is not the server's"


async def test_the_server_answers_while_a_template_hangs(hostile: Path, serve: Serve) -> None:
    async with serve(hostile) as server, httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        hanging = asyncio.create_task(
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hang"}], "max_tokens": 1})
        )
        while not hanging.done():
            assert (await client.get("/readyz")).status_code == 200
            await asyncio.sleep(0.05)
        assert (await hanging).status_code == 400
