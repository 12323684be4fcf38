"""`dairllm worker` and `dairllm health` as an operator meets them: a process, its log, its exit code."""

import contextlib
import gzip
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dairllm.commands.progress import COMPILING
from dairllm.formats.digest import compute_digests
from dairllm.formats.model_file import ModelFile
from dairllm.units import parse_size
from tests.commands.node_process import IN_TIME, WorkerProcess
from tests.patience import PATIENCE

DATA = Path(__file__).parents[1] / "data" / "dllama"
ACK = b"\xaa\xaag\x01"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    made: list[WorkerProcess] = []

    def start(*arguments: str, **environment: str) -> WorkerProcess:
        made.append(WorkerProcess(tmp_path / f"{len(made)}.log", *arguments, environment=environment))
        return made[-1]

    yield start
    for one in made:
        one.end()


def said() -> bytes:
    """All that the root says in a recorded session."""
    raw, at, turns = gzip.decompress((DATA / "llama_q40.wire.gz").read_bytes()), 5, []
    while at < len(raw):
        direction, nbytes = struct.unpack_from("<BI", raw, at)
        if direction == 0:
            turns.append(raw[at + 5 : at + 5 + nbytes])
        at += 5 + nbytes
    return b"".join(turns)


def health(**environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dairllm", "health"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=PATIENCE,
        check=False,
    )


def ask(port: int, path: str) -> tuple[int, str]:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    return int(answer.split()[1]), answer


def test_a_worker_from_start_to_end(start: Any) -> None:
    worker = start()
    assert ask(worker.metrics_port, "/healthz")[0] == 200
    port = worker.port
    assert health(DAIRLLM_METRICS__PORT=str(worker.metrics_port)).returncode == 0
    with socket.create_connection(("127.0.0.1", port)) as root:
        root.sendall(said())
        answered = b"".join(iter(lambda: root.recv(1 << 20), b""))
    assert answered.startswith(4 * ACK)
    status, metrics = ask(worker.metrics_port, "/metrics")
    assert status == 200
    assert 'dairllm_sessions_total{outcome="finished"} 1.0' in metrics
    assert "dairllm_rows_computed_total 64.0" in metrics
    assert worker.wait_for("memory plan")["weights"] == worker.wait_for("weights received")["held"] != "0B"
    code, seconds = worker.stop()
    assert code == 0
    assert seconds < IN_TIME
    assert {"listening", "root connected", "memory plan", "weights received", "session finished", "shutting down"} <= {
        line["event"] for line in worker.lines()
    }
    assert "Traceback" not in worker.text()


def test_a_worker_with_a_model_of_its_own(start: Any, tmp_path: Path) -> None:
    """It finds out which model it has before it listens; what a root of distributed-llama sends is compared with it."""
    own = DATA / "llama_q40.m"
    worker = start("--model", str(own))
    with socket.create_connection(("127.0.0.1", worker.port)) as root:
        root.sendall(said())
        answered = b"".join(iter(lambda: root.recv(1 << 20), b""))
    assert answered.startswith(4 * ACK)
    with ModelFile.open(own) as model:
        assert worker.wait_for("model found")["identity"] == compute_digests(model).identity.hex()
    compared = worker.wait_for("weights compared with the own model")
    assert parse_size(compared["held"]) < parse_size(compared["size"]) / 2, "columns alone are copied together"
    assert worker.stop()[0] == 0


def test_a_model_that_is_none_is_told_in_a_line(start: Any, tmp_path: Path) -> None:
    (tmp_path / "m.m").write_bytes(bytes(100))
    worker = start("--model", str(tmp_path / "m.m"))
    assert worker.process.wait(PATIENCE) == 1
    assert worker.text().splitlines()[-1].startswith(f"dairllm: error: {tmp_path / 'm.m'}, byte 0: expected ")


STAGES = {"waiting for a root": 0, "in the greeting": 4, "before the go": 8, "in the configuration": 500, "in the weights": 12_000}


def test_a_signal_at_any_stage_ends_it_in_time_with_0(start: Any) -> None:
    """One process for each stage, started together."""
    workers = {stage: start("--log-level", "debug") for stage in STAGES}
    script, roots = said(), []
    for stage, worker in workers.items():
        upto = STAGES[stage]
        root = socket.create_connection(("127.0.0.1", worker.port))
        roots.append(root)
        if upto > 0:
            root.sendall(script[:upto])
            if upto >= 8:
                assert root.recv(4) == ACK
    time.sleep(0.2)
    for number, (stage, worker) in enumerate(workers.items()):
        code, seconds = worker.stop(signal.SIGINT if number % 2 else signal.SIGTERM)
        assert code == 0, stage
        assert seconds < IN_TIME, stage
        assert "Traceback" not in worker.text()
    for root in roots:
        root.close()


def test_a_signal_in_the_middle_of_a_token_waits_for_it_in_vain_no_longer_than_told(start: Any) -> None:
    worker = start(DAIRLLM_DEADLINES__SHUTDOWN="300ms")
    script = said()
    # The first control packet asks for 32 rows; the rows of pipe X never come.
    at = script.index(struct.pack("<II", 0, 32), 20_000) + 8
    with socket.create_connection(("127.0.0.1", worker.port)) as root:
        root.sendall(script[:at])
        heard = b""
        while len(heard) < 16:
            heard += root.recv(16)
        time.sleep(0.2)
        code, seconds = worker.stop()
    assert code == 0
    assert 0.25 < seconds < IN_TIME
    assert [line["stage"] for line in worker.lines() if line["event"] == "session stopped"] == ["pipe rows"]


def test_a_signal_while_kernels_are_compiled_ends_it_at_once(start: Any, tmp_path: Path) -> None:
    worker = start(XDG_CACHE_HOME=str(tmp_path / "empty"))  # so they must be compiled
    port = worker.metrics_port
    status, answer = ask(port, "/readyz")
    assert status == 503
    assert '"reason":"compiling kernels"' in answer
    unready = health(DAIRLLM_METRICS__PORT=str(port))
    assert unready.returncode == 1
    assert unready.stderr == f"dairllm: error: the worker on 127.0.0.1 port {port} is not ready: compiling kernels\n"
    assert worker.wait_for(COMPILING)["seconds"] >= 2, "the log shows that it lives"
    code, seconds = worker.stop()
    assert code == 0
    assert seconds < IN_TIME


def test_who_answers_something_else_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        port = server.getsockname()[1]
        asking = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "dairllm", "health"],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "DAIRLLM_METRICS__PORT": str(port)},
            )
        )
        server.settimeout(30)
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-x\r\n\r\n")
        connection.close()
        assert asking.wait(PATIENCE) == 1
        assert asking.stderr is not None
        assert asking.stderr.read().startswith(f"dairllm: error: no worker answers on 127.0.0.1 port {port}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "flag --port: worker.port: expected less than or equal to 65535, found 70000"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (
            ["--kernels", "sse"],
            "flag --kernels: worker.kernels: expected 'auto', 'portable', 'avx2', 'avxvnni' or 'avx512vnni', found 'sse'",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(start: Any, arguments: list[str], message: str) -> None:
    worker = start(*arguments)
    assert worker.process.wait(PATIENCE) == 2
    assert worker.text() == f"dairllm: error: {message}\n"


def test_a_port_that_is_taken_is_one_line_and_code_1(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = start("--metrics-port", str(port))
        assert worker.process.wait(PATIENCE) == 1
    told = f"cannot listen on 127.0.0.1 port {port}: Address already in use; another worker may have it (--port, --metrics-port)"
    assert worker.text() == f"dairllm: error: health and metrics of the worker on port 0: {told}\n"
