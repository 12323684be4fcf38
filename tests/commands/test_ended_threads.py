"""Compute threads that end, or do not come back, in a worker and a server: nobody hangs, the next is served, a signal ends the process."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import openai
import pytest

from dairllm.cluster.worker import CLOSING_SECONDS
from tests.api.serving import write_model
from tests.commands.node_process import IN_TIME, NodeProcess, ServeProcess, WorkerProcess
from tests.commands.test_worker_process import ACK, ask, said
from tests.engine.faulty_threads import RAISED
from tests.patience import PATIENCE, comes

SHUTDOWN = 1.0


class FaultyWorker(WorkerProcess):
    module: ClassVar = "tests.commands.faulty_node"
    environment: ClassVar = {"DAIRLLM_WORKER__THREADS": "2", "DAIRLLM_DEADLINES__SHUTDOWN": f"{SHUTDOWN}s"}


class FaultyServer(ServeProcess):
    module: ClassVar = "tests.commands.faulty_node"
    environment: ClassVar = {"DAIRLLM_ENGINE__THREADS": "2", "DAIRLLM_DEADLINES__SHUTDOWN": f"{SHUTDOWN}s"}


@pytest.fixture
def fault(tmp_path: Path) -> Path:
    """The file that says which fault threads have."""
    return tmp_path / "fault"


@pytest.fixture
def start(tmp_path: Path, fault: Path) -> Iterator[Callable[..., NodeProcess]]:
    made: list[NodeProcess] = []

    def start(kind: type[NodeProcess], *arguments: object, **environment: str) -> NodeProcess:
        environment["DAIRLLM_TEST_FAULT"] = str(fault)
        made.append(kind(tmp_path / f"{len(made)}.log", *map(str, arguments), environment=environment))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


def serve_root(worker: NodeProcess) -> bytes:
    """What a worker answers to a recorded root, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as root:
        root.settimeout(PATIENCE)
        root.sendall(said())
        try:
            return b"".join(iter(lambda: root.recv(1 << 20), b""))
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("number", [0, 1])
def test_a_worker_serves_the_next_root(number: int, fault: Path, start: Callable[..., FaultyWorker]) -> None:
    worker = start(FaultyWorker)
    want = serve_root(worker)
    assert want.startswith(4 * ACK)
    fault.write_text(f"{number} raise")
    for _ in range(2):
        assert len(serve_root(worker)) < len(want)
    fault.unlink()
    assert serve_root(worker) == want
    assert ask(worker.metrics_port, "/readyz")[0] == 200
    failed = [line for line in worker.lines() if line["event"] == "session failed"]
    assert len(failed) == 2
    assert all(line["kind"] == "EngineError" and RAISED in line["error"] for line in failed)
    code, seconds = worker.stop()
    assert code == 0
    assert seconds < IN_TIME


def test_a_server_answers_the_next_request(fault: Path, model: Path, start: Callable[..., FaultyServer]) -> None:
    server = start(FaultyServer, "--model", model)
    server.wait_for("ready")
    with server.client() as client:
        want = client.completions.create(model="small", prompt="one", max_tokens=5, temperature=0).choices[0].text
        fault.write_text("1 raise")
        with pytest.raises(openai.InternalServerError, match=f"{RAISED}|not available"):
            client.completions.create(model="small", prompt="one two", max_tokens=5, temperature=0)
        fault.unlink()
        assert comes(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        assert client.completions.create(model="small", prompt="one", max_tokens=5, temperature=0).choices[0].text == want
    assert any(RAISED in line.get("reason", "") for line in server.lines() if line["event"] == "model lost")
    assert server.stop()[0] == 0


def test_a_signal_ends_a_worker_whose_threads_hang(fault: Path, start: Callable[..., FaultyWorker]) -> None:
    worker = start(FaultyWorker)
    fault.write_text("1 hang")
    with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as root:
        root.sendall(said())
        worker.wait_for("root connected")
        assert ask(worker.metrics_port, "/readyz")[0] == 200
        _, seconds = worker.stop()
    assert seconds < IN_TIME + SHUTDOWN + CLOSING_SECONDS


def test_threads_that_never_come_back_end_a_worker(fault: Path, start: Callable[..., FaultyWorker]) -> None:
    worker = start(FaultyWorker, DAIRLLM_TEST_LONGEST_CALL="0.2")
    fault.write_text("1 hang")
    with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as root:
        root.sendall(said())
        assert worker.process.wait(PATIENCE) == 1
    assert "it has not ended within 200ms" in worker.text()
