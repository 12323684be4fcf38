"""Health and metrics over HTTP, on a port of their own.

=============  ====================================================================================================
``/healthz``   200 while the process serves (liveness)
``/readyz``    200 when the node can take work, else 503 with the reason (readiness)
``/health``    the same as ``/readyz``, the name that llama.cpp and vLLM gave it
``/metrics``   Prometheus' text format
=============  ====================================================================================================

The server is uvicorn inside the node's own event loop; signals are the runner's business, not its.
"""

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dairllm.errors import NetworkError
from dairllm.net.transport import listening_socket
from dairllm.telemetry import Meters, Readiness, registry

__all__ = ["HealthServer", "health_app"]


def health_app(readiness: Readiness, meters: Meters) -> Starlette:
    """The four routes, over what the node says of itself."""
    metrics_of = registry(meters)

    async def alive(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        if readiness.reason is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": readiness.reason}, status_code=503)

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics_of), headers={"content-type": content_type})

    return Starlette(routes=[Route("/healthz", alive), Route("/readyz", ready), Route("/health", ready), Route("/metrics", metrics)])


class HealthServer:
    """Serves :func:`health_app` until it is closed."""

    def __init__(self, host: str, port: int, readiness: Readiness, meters: Meters) -> None:
        self._host, self._port = host, port
        config = uvicorn.Config(
            health_app(readiness, meters), lifespan="off", log_config=None, access_log=False, server_header=False, timeout_keep_alive=5,
            timeout_graceful_shutdown=1, limit_concurrency=64, backlog=64, ws="none",
        )  # fmt: skip
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and serve; returns the port.

        Raises:
            NetworkError: the address cannot be listened on.
        """
        sock = listening_socket(self._host, self._port)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="health server")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise NetworkError(f"the health server on {self._host} port {self._port} ended while it was starting")
            await asyncio.sleep(0.005)
        port: int = sock.getsockname()[1]
        return port

    async def close(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
