"""`dairllm health`: whom it asks, and what its exit code says. The nodes are real health servers."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dairllm.api.health import HealthServer
from dairllm.telemetry import Readiness, WorkerMetrics
from tests.patience import PATIENCE


@contextlib.asynccontextmanager
async def node(reason: str | None = None) -> AsyncIterator[int]:
    """The port of a node that is ready, or says why it is not."""
    server = HealthServer("127.0.0.1", 0, Readiness(reason), WorkerMetrics())
    try:
        yield await server.start()
    finally:
        await server.close()


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port on which nobody listens, and nobody can."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


async def health(*arguments: str, worker: int, server: int, **environment: str) -> tuple[int, str]:
    """Exit code and stderr. Ports are given as a container gives them: by the environment; 0 leaves one to the defaults or the file."""
    ports = {"DAIRLLM_METRICS__PORT": worker, "DAIRLLM_SERVER__PORT": server}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dairllm", "health", *arguments,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **{name: str(port) for name, port in ports.items() if port}, **environment},
    )  # fmt: skip
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_worker_is_asked_first_and_decides(nobody: int) -> None:
    async with node() as ready, node("compiling kernels") as unready:
        assert await health(worker=ready, server=nobody) == (0, "")
        assert await health(worker=ready, server=unready) == (0, "")
        code, said = await health(worker=unready, server=ready)
    assert code == 1
    assert said == f"dairllm: error: the worker on 127.0.0.1 port {unready} is not ready: compiling kernels\n"


async def test_a_server_is_asked_where_no_worker_listens(nobody: int) -> None:
    async with node() as ready, node("worker 10.0.0.2:9990 (node 1) is gone") as unready:
        assert await health(worker=nobody, server=ready) == (0, "")
        code, said = await health(worker=nobody, server=unready)
    assert code == 1
    assert said == f"dairllm: error: the server on 127.0.0.1 port {unready} is not ready: worker 10.0.0.2:9990 (node 1) is gone\n"


async def test_nobody_at_all(nobody: int) -> None:
    code, said = await health(worker=nobody, server=nobody)
    assert code == 1
    assert said == (
        f"dairllm: error: no worker answers on 127.0.0.1 port {nobody}: Connection refused; "
        f"no server answers on 127.0.0.1 port {nobody}: Connection refused\n"
    )


async def test_a_file_decides_whom_to_ask(tmp_path: Path, nobody: int) -> None:
    of_root, of_worker = tmp_path / "root.yaml", tmp_path / "worker.yaml"
    async with node() as ready:
        of_root.write_text(f"server: {{host: 0.0.0.0, port: {ready}}}\nmodel: {{file: x.m}}\nlog: {{level: info}}\n")
        of_worker.write_text(f"worker: {{port: 1234}}\nmetrics: {{host: 0.0.0.0, port: {nobody}}}\nlog: {{level: info}}\n")
        assert await health("--config", str(of_root), worker=nobody, server=0) == (0, "")
        assert await health(worker=nobody, server=0, DAIRLLM_CONFIG=str(of_root)) == (0, "")
        code, said = await health(worker=0, server=ready, DAIRLLM_CONFIG=str(of_worker))
    assert code == 1
    assert said == f"dairllm: error: no worker answers on 127.0.0.1 port {nobody}: Connection refused\n"


async def test_the_environment_comes_before_the_file(tmp_path: Path, nobody: int) -> None:
    file = tmp_path / "root.yaml"
    file.write_text(f"server: {{port: {nobody}}}\n")
    async with node() as ready:
        assert await health("--config", str(file), worker=nobody, server=ready) == (0, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("metrics: {enabled: false}\n", "metrics.enabled is false or metrics.port is 0: there is no known port to ask"),
        ("worker: {port: 0}\n", "metrics.enabled is false or metrics.port is 0: there is no known port to ask"),
        ("server: {port: 0}\n", "server.port is 0: there is no known port to ask"),
        ("server: {port: 70000}\n", "{file}, line 1: server.port: expected less than or equal to 65535, found 70000"),
        ("serve: {port: 1}\n", "{file}, line 1: serve: unknown key; there are worker, "),
        ("{", "{file}, line 1: not YAML: "),
    ],
)
async def test_settings_that_leave_nobody_to_ask(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    code, said = await health("--config", str(file), worker=0, server=0)
    assert code == 2
    assert said.startswith(f"dairllm: error: {why.replace('{file}', str(file))}")
    assert said.count("\n") == 1


async def test_mistakes_in_other_sections_of_the_environment_are_for_the_node_to_tell() -> None:
    async with node() as ready:
        assert await health(worker=ready, server=0, DAIRLLM_LOG__LEVEL="loud") == (0, "")
