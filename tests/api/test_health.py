"""The four addresses that operators, containers and Prometheus ask, over a real socket."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from dairllm.api.health import HealthServer
from dairllm.errors import NetworkError
from dairllm.net.addresses import listening_socket
from dairllm.telemetry import Readiness, WorkerMetrics
from tests.patience import PATIENCE


class Served:
    def __init__(self, port: int, readiness: Readiness, metrics: WorkerMetrics) -> None:
        self.port, self.readiness, self.metrics = port, readiness, metrics

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        """Status, content type, body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)

        def ask() -> tuple[int, str, str]:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310 - our own server
                    return answer.status, answer.headers["content-type"], answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers["content-type"], error.read().decode()

        return await asyncio.to_thread(ask)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    readiness, metrics = Readiness("compiling kernels"), WorkerMetrics(kernel_form="portable")
    server = HealthServer("127.0.0.1", 0, readiness, metrics)
    yield Served(await server.start(), readiness, metrics)
    await server.close()


async def test_it_is_alive_before_it_is_ready(served: Served) -> None:
    assert (await served.get("/healthz"))[0] == 200
    for path in ("/readyz", "/health"):
        status, _, body = await served.get(path)
        assert status == 503
        assert json.loads(body) == {"status": "unavailable", "reason": "compiling kernels"}
    served.readiness.reason = None
    for path in ("/healthz", "/readyz", "/health"):
        status, kind, body = await served.get(path)
        assert (status, kind, json.loads(body)) == (200, "application/json", {"status": "ok"})


async def test_metrics_are_prometheus_text(served: Served) -> None:
    served.metrics.rows = 5
    status, kind, body = await served.get("/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert "\ndairllm_rows_computed_total 5.0\n" in body
    assert 'dairllm_kernels_info{form="portable"} 1.0' in body


async def test_metrics_speak_openmetrics_to_who_asks_for_it(served: Served) -> None:
    status, kind, body = await served.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


async def test_other_paths_are_not_there(served: Served) -> None:
    assert (await served.get("/"))[0] == 404


async def test_a_port_that_is_taken_is_named() -> None:
    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(NetworkError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            await HealthServer("127.0.0.1", port, Readiness(), WorkerMetrics()).start()


async def test_closing_frees_the_port() -> None:
    server = HealthServer("127.0.0.1", 0, Readiness(), WorkerMetrics())
    port = await server.start()
    await server.close()
    with pytest.raises(OSError, match="Connect"):
        await asyncio.open_connection("127.0.0.1", port)
    again = HealthServer("127.0.0.1", port, Readiness(), WorkerMetrics())
    assert await again.start() == port
    await again.close()


async def test_a_server_that_never_started_can_be_closed() -> None:
    await HealthServer("127.0.0.1", 0, Readiness(), WorkerMetrics()).close()
