"""A worker that is killed under a server and started again: who had asked waits, and notices nothing else."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.serving import write_model
from tests.commands.node_process import NodeProcess, ServeProcess, WorkerProcess
from tests.patience import PATIENCE, comes

Start = Callable[..., Any]
LONG = {"prompt": "on", "max_tokens": 2000, "temperature": 0.7, "seed": 5}
SHORT = {"prompt": "two", "max_tokens": 5}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[NodeProcess] = []

    def start(kind: type[NodeProcess], *arguments: object, **environment: str) -> NodeProcess:
        made.append(kind(tmp_path / f"{len(made)}.log", *map(str, arguments), environment=environment))
        return made[-1]

    yield start
    for one in made:
        one.end()


def test_a_worker_that_is_killed_and_started_again(tmp_path: Path, start: Start) -> None:
    worker = start(WorkerProcess)
    address = f"127.0.0.1:{worker.port}"
    server = start(
        ServeProcess, "--model", write_model(tmp_path), "--workers", address,
        DAIRLLM_DEADLINES__RECONNECT="100ms", DAIRLLM_DEADLINES__RECOVERY="10m", DAIRLLM_SERVER__HEARTBEAT="100ms",
    )  # fmt: skip
    server.wait_for("ready")
    answers: dict[str, httpx.Response] = {}
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:

        def ask(name: str, **body: object) -> threading.Thread:
            thread = threading.Thread(target=lambda: answers.update({name: client.post("/v1/completions", json=body)}))
            thread.start()
            return thread

        def until_metric(line: str) -> None:
            assert comes(lambda: line in client.get("/metrics").text)

        ask("undisturbed", **LONG).join()
        asked = [ask("whole", **LONG)]
        until_metric("dairllm_num_requests_running 1.0")
        asked.append(ask("streamed", **SHORT, stream=True))
        until_metric("dairllm_num_requests_waiting 1.0")
        worker.stop(signal.SIGKILL)
        server.wait_for("model lost")
        unready = client.get("/readyz")
        assert unready.status_code == 503
        assert unready.json()["requests_wait"]
        assert address in unready.json()["reason"]
        asked.append(ask("late", **SHORT))
        until_metric("dairllm_num_requests_waiting 3.0")
        start(WorkerProcess, "--port", address.rpartition(":")[2])
        for thread in asked:
            thread.join(PATIENCE)
        assert client.get("/readyz").status_code == 200
    assert [answer.status_code for answer in answers.values()] == [200] * 4
    assert answers["whole"].json()["choices"] == answers["undisturbed"].json()["choices"]
    assert answers["whole"].json()["system_fingerprint"] == answers["undisturbed"].json()["system_fingerprint"]
    text = answers["streamed"].text
    assert ": waiting, position 2 (the model is being recovered)\n\n" in text
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' not in text
    assert answers["late"].json()["usage"]["completion_tokens"] == 5
    assert server.stop()[0] == 0
