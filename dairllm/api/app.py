"""The addresses of `dairllm serve`.

=================================================  ================================================================
``POST /v1/chat/completions``                      an answer in a conversation
``POST /v1/completions``                           the continuation of a text
``GET /v1/models``, ``GET /v1/models/{name}``      who answers
``/healthz``, ``/readyz``, ``/health``             ``dairllm.api.health``
``/metrics``                                       Prometheus' text format
=================================================  ================================================================

No other site's page may read what we say unless `dairllm.api.cors` lets it.
"""

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dairllm.api.bodies import BODY_SECONDS, Bodies
from dairllm.api.completions import Completions
from dairllm.api.cors import Cors
from dairllm.api.errors import exception_handlers
from dairllm.api.health import health_routes
from dairllm.api.prompts import ServedModel
from dairllm.api.schema import ChatRequest, CompletionRequest
from dairllm.serving.service import Service
from dairllm.telemetry import Readiness, ServiceMetrics

__all__ = ["serve_app"]

HEARTBEAT_SECONDS = 5.0


def serve_app(
    served: ServedModel,
    service: Service,
    readiness: Readiness,
    metrics: ServiceMetrics,
    *,
    body_seconds: float = BODY_SECONDS,
    heartbeat: float = HEARTBEAT_SECONDS,
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
    """The application over a service, which somebody else starts and closes.

    Args:
        body_seconds: that a client may take to send its request.
        heartbeat: seconds between signs of life in a stream that has not begun.
        cors_origins: of pages that may ask and read.
    """
    description: dict[str, Any] = {"id": served.name, "object": "model", "created": served.created, "owned_by": "dairllm"}

    bodies = Bodies(served.request_bytes, body_seconds)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [description]})

    async def model(request: Request) -> Response:
        served.check_name(request.path_params["name"])
        return JSONResponse(description)

    def completions(schema: type[ChatRequest] | type[CompletionRequest]) -> Completions:
        return Completions(schema, served, service, metrics, bodies, heartbeat)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", completions(ChatRequest), methods=["POST"]),
            Route("/v1/completions", completions(CompletionRequest), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            *health_routes(readiness, metrics),
        ],
        exception_handlers=exception_handlers(),
    )
    app.router.redirect_slashes = False  # `dairllm.api.front` has set the address right
    return Cors(app, cors_origins) if cors_origins else app
