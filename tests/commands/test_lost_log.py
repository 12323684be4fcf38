"""Services whose log cannot be written: a full disk, a collector that has gone or hangs, no stderr at all.

They lose lines, and nothing else: requests are answered, root after root is served, SIGTERM ends them.
"""

import contextlib
import gzip
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from dairllm import machine
from tests.api.serving import write_model
from tests.commands.node_process import ServeProcess, WorkerProcess
from tests.patience import PATIENCE

DATA = Path(__file__).parents[1] / "data" / "dllama"
HANGUP = 'exec 2>&-; exec "$@"'
Log = tuple[int, Callable[[], None]]
"""What a process gets as its stderr, and what happens to it once the process is ready."""


def full() -> Log:
    return os.open("/dev/full", os.O_WRONLY), lambda: None


def gone() -> Log:
    reader, writer = os.pipe()
    return writer, lambda: os.close(reader)


def hanging() -> Log:
    """Nobody reads, and the pipe has room for a page."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    HELD.append(reader)
    return writer, lambda: None


HELD: list[int] = []
LOGS = {"full": full, "gone": gone, "hanging": hanging, "closed": None}


@contextlib.contextmanager
def node(log: "Callable[[], Log] | None", *command: str, **environment: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A node that logs in vain."""
    stderr, lose = (subprocess.DEVNULL, lambda: None) if log is None else log()
    arguments = [sys.executable, "-m", "dairllm", *command]
    if log is None:
        arguments = ["sh", "-c", HANGUP, "sh", *arguments]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **environment}) as process:
        try:
            if log is not None:
                os.close(stderr)
            lose()
            yield process
        finally:
            process.kill()
            for reader in HELD:
                os.close(reader)
            HELD.clear()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it has ended with {process.returncode}"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("it was never ready")


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_a_server_answers_on(log: "Callable[[], Log] | None", tmp_path: Path) -> None:
    port = free_port()
    command = ["serve", "--model", str(write_model(tmp_path)), "--port", str(port), "--max-seq-len", "64"]
    with node(log, *command, **ServeProcess.environment) as server:
        wait_until_ready(server, port)
        for _ in range(20):
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 2
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def said() -> bytes:
    """All that the root says in a recorded session."""
    raw, at, turns = gzip.decompress((DATA / "llama_q40.wire.gz").read_bytes()), 5, []
    while at < len(raw):
        direction, nbytes = struct.unpack_from("<BI", raw, at)
        if direction == 0:
            turns.append(raw[at + 5 : at + 5 + nbytes])
        at += 5 + nbytes
    return b"".join(turns)


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_a_worker_serves_root_after_root(log: "Callable[[], Log] | None") -> None:
    port, health, script, answers = free_port(), free_port(), said(), set()
    command = ["worker", "--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(health), "--log-level", "debug"]
    with node(log, *command, **WorkerProcess.environment) as worker:
        wait_until_ready(worker, health)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), 60) as root:
                root.sendall(script)
                answers.add(b"".join(iter(lambda: root.recv(1 << 20), b"")))
            wait_until_ready(worker, health)
        assert len(answers) == 1
        assert len(answers.pop()) > 1000
        metrics = httpx.get(f"http://127.0.0.1:{health}/metrics").text
        assert 'dairllm_sessions_total{outcome="finished"} 5.0' in metrics
        assert "dairllm_sessions_running 0.0" in metrics
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0


def test_a_lost_log_costs_no_descriptor_and_no_memory() -> None:
    """Of a worker whose log says something to each of 300 strangers."""
    port, health = free_port(), free_port()
    command = ["worker", "--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(health)]
    with node(full, *command, **WorkerProcess.environment) as worker:
        wait_until_ready(worker, health)
        seen = []
        for _ in range(3):
            for _ in range(100):
                with socket.create_connection(("127.0.0.1", port), 60) as stranger:
                    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    with contextlib.suppress(ConnectionError):
                        assert stranger.recv(1) == b""
            seen.append((len(os.listdir(f"/proc/{worker.pid}/fd")), machine.peak_rss_bytes(worker.pid)))
        assert seen[2][0] <= seen[0][0] + 1
        assert seen[2][1] - seen[0][1] < 8 << 20


@pytest.mark.parametrize("service", [False, True])
def test_a_terminal_that_is_closed_ends_a_service_in_good_order(service: bool, tmp_path: Path) -> None:
    if service:
        process: ServeProcess | WorkerProcess = ServeProcess(tmp_path / "log", "--model", str(write_model(tmp_path)))
    else:
        process = WorkerProcess(tmp_path / "log")
    try:
        process.wait_for("ready" if service else "listening")
        code, _ = process.stop(signal.SIGHUP)
        assert code == 0
        assert next(line for line in process.lines() if line["event"] == "shutting down")["signal"] == "SIGHUP"
    finally:
        process.end()
