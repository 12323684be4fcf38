"""`dairllm serve` as an operator meets it: a process, its log, its exit code, OpenAI's client."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dairllm.commands.progress import COMPILING
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from tests.api.serving import write_model
from tests.commands.node_process import IN_TIME, ServeProcess
from tests.patience import PATIENCE

Start = Callable[..., ServeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[ServeProcess] = []

    def start(*arguments: object, **environment: str) -> ServeProcess:
        made.append(ServeProcess(tmp_path / f"{len(made)}.log", *map(str, arguments), environment=environment))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


def test_a_server_from_start_to_end(model: Path, start: Start) -> None:
    server = start("--model", model, "--model-name", "tiny", "--max-seq-len", 128)
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    server.wait_for("ready")
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    with server.client() as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20)
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens"):
            client.completions.create(model="tiny", prompt="x" * 200)
    assert "dairllm_generation_tokens_total 40.0" in httpx.get(f"{server.url}/metrics").text
    code, seconds = server.stop()
    assert code == 0
    assert seconds < IN_TIME
    assert [line["event"] for line in server.lines() if line["event"] != COMPILING] == [
        "listening", "memory plan", "kernels ready", "ready", "answered", "answered", "refused", "shutting down",
    ]  # fmt: skip


def test_a_signal_in_the_middle_of_an_answer(model: Path, start: Start) -> None:
    """What has been computed is said, the stream ends with the reason, and so do those that wait."""
    server = start("--model", model)
    server.wait_for("ready")
    waited: list[BaseException] = []

    def wait_in_line() -> None:
        with server.client() as client:
            try:
                client.completions.create(model="small", prompt="two")
            except openai.OpenAIError as error:
                waited.append(error)

    with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "one", "max_tokens": 4000, "stream": True}) as answer:
        lines = answer.iter_lines()
        events = [next(lines)]
        waiting = threading.Thread(target=wait_in_line)
        waiting.start()
        while "dairllm_num_requests_waiting 1.0" not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.02)
        code, seconds = server.stop()
        events += lines
    waiting.join()
    assert code == 0
    assert seconds < IN_TIME
    *pieces, last, done = [json.loads(event[6:]) if event != "data: [DONE]" else None for event in events if event]
    assert done is None
    assert last == {"error": {"message": "shutting down", "type": "server_error", "param": None, "code": "service_unavailable"}}
    assert 1 <= len(pieces) < 4000
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)
    (error,) = waited
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 503
    assert "Traceback" not in server.text()


def test_a_signal_while_kernels_are_compiled(model: Path, start: Start, tmp_path: Path) -> None:
    server = start("--model", model, XDG_CACHE_HOME=str(tmp_path / "empty"))
    answer = httpx.get(f"{server.url}/readyz")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "compiling kernels"
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "compiling kernels"
    code, seconds = server.stop(signal.SIGINT)
    assert code == 0
    assert seconds < IN_TIME
    assert "Traceback" not in server.text()


def test_a_worker_that_is_not_there_is_named_and_waited_for(model: Path, start: Start) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        worker = f"127.0.0.1:{sock.getsockname()[1]}"
        server = start("--model", model, "--workers", worker, DAIRLLM_DEADLINES__RECONNECT="50ms")
        reason = server.wait_for("model not available")["reason"]
        assert worker in reason
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/readyz").json()["reason"] == reason
        assert [line["event"] for line in server.lines()].count("model not available") == 1, "told once"
        code, seconds = server.stop()
    assert code == 0
    assert seconds < IN_TIME
    assert "Traceback" not in server.text()


def test_memory_is_flat(model: Path, start: Start) -> None:
    """Answers, streams, refusals, mistakes and clients that go away leave nothing behind."""
    server = start("--model", model, "--queue", 4)
    server.wait_for("ready")

    def round_of_requests(client: httpx.Client) -> None:
        for number in range(25):
            body = {"prompt": f"{number} {'x' * 40 * number}", "max_tokens": 20}
            assert client.post("/v1/completions", json=body).status_code == 200
            chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "stream": True}
            assert client.post("/v1/chat/completions", json=chat).text.endswith("data: [DONE]\n\n")
            assert client.post("/v1/completions", json={"prompt": 5}).status_code == 400
            assert client.post("/v1/completions", content=b" " * 200_000).status_code == 400
            with client.stream("POST", "/v1/completions", json={"prompt": "on", "max_tokens": 3000, "stream": True}) as answer:
                next(answer.iter_lines())

    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        assert client.post("/v1/completions", json={"prompt": [7] * 4000, "max_tokens": 100}).status_code == 200
        for _ in range(2):
            round_of_requests(client)
        before = server.resident_bytes()
        for _ in range(3):
            round_of_requests(client)
        grown = server.resident_bytes() - before
    assert grown < 3 << 20
    assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no model: name its file with --model, or as model.file in the configuration"),
        (["--model", "nonesuch.m", "--tokenizer", "nonesuch.t"], 1, "nonesuch.m: expected a readable .m model file"),
        (["--model", "{model}", "--tokenizer", "nonesuch.t"], 1, "nonesuch.t"),
        (["--model", "{lone}"], 2, "no tokenizer: there is no"),
        (["--model", "{model}", "--tokenizer", "{wide}"], 2, "the tokenizer knows 400 tokens, the model 320: they do not belong together"),
        (["--model", "{model}", "--kernels", "sse"], 2, "flag --kernels: engine.kernels: expected 'auto', 'portable'"),
        (["--model", "{model}", "--shares", "2/2,2/2"], 2, "shares for 2 nodes, but there are 1"),
        (["--model", "{model}", "--shares", "3/2,1/2", "--workers", "127.0.0.1:1"], 2, "3/2"),
        (["--model", "{model}", "--workers", "a,b,c,d,e,f,g"], 1, "8 nodes"),
        (["--model", "{model}", "--port", "70000"], 2, "flag --port: server.port"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_served(
    arguments: list[str], code: int, message: str, model: Path, start: Start, tmp_path: Path
) -> None:
    lone, wide = tmp_path / "lone.m", tmp_path / "wide.t"
    write_random_model(lone, small_spec())
    byte_vocabulary(400).write(wide)
    server = start(*(word.format(model=model, lone=lone, wide=wide) for word in arguments))
    assert server.process.wait(PATIENCE) == code, server.text()
    (line,) = [line for line in server.text().splitlines() if not line.startswith("{")]
    assert line.startswith("dairllm: error: ")
    assert message in line
    assert not any(line["event"] == "listening" for line in server.lines())


def test_a_port_that_is_taken_is_one_line_and_code_1(model: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--model", model, "--port", port)
        assert server.process.wait(PATIENCE) == 1
    assert server.text() == f"dairllm: error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize("limit", ["80%", "paged"])
@pytest.mark.parametrize("damage", ["cut", "written to"])
def test_a_model_that_is_damaged_while_it_is_served_fails_requests_and_not_the_server(
    limit: str, damage: str, tmp_path: Path, start: Start
) -> None:
    path = write_model(tmp_path)
    write_random_model(path, small_spec(dim=512, n_heads=8, n_kv_heads=8, hidden_dim=8192, n_layers=6, vocab_size=320))
    if limit == "paged":
        planned = subprocess.run([sys.executable, "-m", "dairllm", "plan", path, "--json"], capture_output=True, check=True)
        (node,) = json.loads(planned.stdout)["nodes"]
        limit = f"{node['smallest_limit_bytes'] + (6 << 20)}B"
    server = start("--model", path, "--memory-limit", limit, "--max-seq-len", 256)
    server.wait_for("ready")
    plan = server.wait_for("memory plan")
    assert (plan["in_memory"] == plan["weights"]) == (limit == "80%")
    client = server.client()
    before = client.completions.create(model="small", prompt="one", max_tokens=3).choices[0].text
    assert before
    size = path.stat().st_size
    with path.open("r+b") as file:
        if damage == "cut":
            file.truncate(size - 5_000_000)
        else:
            file.seek(size // 2)
            file.write(b"changed")
    told = f"has {size - 5_000_000} now" if damage == "cut" else "has been written to since it was opened"
    with pytest.raises(openai.InternalServerError, match=told):
        client.completions.create(model="small", prompt="two", max_tokens=3)
    unready = httpx.get(f"{server.url}/readyz")
    assert unready.status_code == 503
    assert told in unready.json()["reason"]
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert server.stop()[0] == 0
