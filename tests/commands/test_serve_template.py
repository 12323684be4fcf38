"""The process for a server's chat template lives as long as the server does, and no longer, however that ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.api.serving import write_model
from tests.commands.node_process import ServeProcess
from tests.patience import PATIENCE, comes

HANGING = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServeProcess]:
    process = ServeProcess(tmp_path / "log", "--model", str(write_model(tmp_path, HANGING)), "--max-seq-len", "128")
    yield process
    process.end()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def child_of(server: ServeProcess) -> int:
    """Once all else that the server starts has ended."""
    server.wait_for("ready")
    threads = Path(f"/proc/{server.process.pid}/task")
    found: list[int] = []

    def is_alone() -> bool:
        found[:] = [int(pid) for thread in threads.iterdir() for pid in (thread / "children").read_text().split()]
        return len(found) == 1

    assert comes(is_alone)
    return found[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_server(server: ServeProcess, signum: signal.Signals) -> None:
    child = child_of(server)
    code, _ = server.stop(signum)
    assert code == (0 if signum == signal.SIGTERM else -signum)
    assert comes(lambda: not is_running(child))


def test_a_signal_while_templates_hang(server: ServeProcess) -> None:
    """More requests than there are threads to wait in: the server ends at once all the same."""
    child = child_of(server)
    begun = processor_seconds(child)
    said: list[str] = []

    def ask() -> None:
        body = {"messages": [{"role": "user", "content": "x"}]}
        with suppress(httpx.HTTPError):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)
            said.append(answer.json()["error"]["message"])

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert comes(lambda: processor_seconds(child) > begun + 0.2)
    code, seconds = server.stop()
    for thread in threads:
        thread.join(PATIENCE)
    assert code == 0
    assert seconds < 20, "each of them would have hung for two seconds"
    assert comes(lambda: not is_running(child))
    assert "Traceback" not in server.text()
    assert "Exception" not in server.text()
    assert "the program is shutting down" in said, "in the form of all other answers"
