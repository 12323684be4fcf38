"""Health and metrics over HTTP.

=============  ====================================================================================================
``/healthz``   200 while the process serves (liveness)
``/readyz``    200 when the node can take work, else 503 with the reason (readiness); for how long the pass in hand has been running
``/health``    the same as ``/readyz``, the name that llama.cpp and vLLM gave it
``/metrics``   Prometheus' text format
=============  ====================================================================================================

A worker has them on a port of their own; `dairllm serve` beside its other routes.
"""

import math
import time

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dairllm.api.server import HttpServer
from dairllm.telemetry import Readiness, ServiceMetrics, WorkerMetrics, registry
from dairllm.units import format_duration

__all__ = ["HealthServer", "health_routes"]


def health_routes(readiness: Readiness, metrics: WorkerMetrics | ServiceMetrics) -> list[Route]:
    """The four routes, over what the node says of itself."""
    metrics_of = registry(metrics)

    async def alive(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        running = metrics.pass_running()
        at_hand = {"pass_running_seconds": round(running, 3)} if running else {}
        if readiness.reason is None:
            return JSONResponse({"status": "ok", **at_hand})
        told = {"status": "unavailable", "reason": readiness.reason, **at_hand}
        if readiness.waiting_until is not None:
            told["requests_wait"] = format_duration(max(0.0, math.ceil(readiness.waiting_until - time.monotonic())))
        return JSONResponse(told, status_code=503)

    async def exposition(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics_of), headers={"content-type": content_type})

    return [Route("/healthz", alive), Route("/readyz", ready), Route("/health", ready), Route("/metrics", exposition)]


class HealthServer(HttpServer):
    """Serves these routes alone."""

    def __init__(self, host: str, port: int, readiness: Readiness, metrics: WorkerMetrics) -> None:
        super().__init__(Starlette(routes=health_routes(readiness, metrics)), host, port)
