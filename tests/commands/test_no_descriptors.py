"""Services at their limit of descriptors (`ulimit -n`): who comes waits, the log says it once, and it goes on when there is room."""

import contextlib
import gzip
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.serving import write_model
from tests.commands.node_process import NodeProcess, ServeProcess, WorkerProcess

DATA = Path(__file__).parents[1] / "data" / "dllama"
LIMIT = 64


@contextlib.contextmanager
def limited(node: NodeProcess) -> Iterator[NodeProcess]:
    """Once it has started: what it needs then is none of this."""
    try:
        node.wait_for("ready" if isinstance(node, ServeProcess) else "listening")
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        yield node
    finally:
        node.end()


def descriptors(node: NodeProcess) -> int:
    return len(os.listdir(f"/proc/{node.process.pid}/fd"))


def processor_seconds(node: NodeProcess) -> float:
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def crowd(port: int) -> Iterator[list[socket.socket]]:
    """As many as the limit, who say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(LIMIT)]


def events(node: NodeProcess) -> list[str]:
    return [line["event"] for line in node.lines() if "accepted again" in line["event"] or line["event"] == "connections wait"]


def test_a_server_goes_on_when_there_is_room(tmp_path: Path) -> None:
    server = ServeProcess(tmp_path / "log", "--model", str(write_model(tmp_path)), "--max-seq-len", "64")
    with limited(server):
        for times in (1, 2):
            with crowd(server.port):
                server.wait_for("connections wait")
                before = processor_seconds(server)
                time.sleep(1)
                assert processor_seconds(server) - before < 0.5, "it spins"
                assert descriptors(server) <= LIMIT - LIMIT // 4, "some are left to the program"
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
            assert answer.status_code == 200
            assert events(server) == ["connections wait", "connections are accepted again"] * times
        assert server.stop(signal.SIGTERM)[0] == 0


def said() -> bytes:
    """All that the root says in a recorded session."""
    raw, at, turns = gzip.decompress((DATA / "llama_q40.wire.gz").read_bytes()), 5, []
    while at < len(raw):
        direction, nbytes = struct.unpack_from("<BI", raw, at)
        if direction == 0:
            turns.append(raw[at + 5 : at + 5 + nbytes])
        at += 5 + nbytes
    return b"".join(turns)


@pytest.mark.parametrize("at", ["its own port", "its health port"])
def test_a_worker_serves_the_next_root(at: str, tmp_path: Path) -> None:
    settings = {"DAIRLLM_LIMITS__STRANGERS": "1000"}
    worker = WorkerProcess(tmp_path / "log", environment=settings)
    with limited(worker):
        with crowd(worker.port if at == "its own port" else worker.metrics_port):
            worker.wait_for("connections wait")
            assert descriptors(worker) <= LIMIT - LIMIT // 4
        with socket.create_connection(("127.0.0.1", worker.port), 60) as root:
            root.sendall(said())
            assert len(b"".join(iter(lambda: root.recv(1 << 20), b""))) > 1000
        assert httpx.get(f"http://127.0.0.1:{worker.metrics_port}/readyz", timeout=60).status_code == 200
        ports = [line["port"] for line in worker.lines() if line["event"] == "connections wait"]
        assert len(ports) == len(set(ports)), "each port says it once"
        assert worker.stop(signal.SIGTERM)[0] == 0
