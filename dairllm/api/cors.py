"""Which web pages of other sites may ask this server, and read what it says."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from dairllm.api.api_error import ApiError

__all__ = ["Cors"]


class Cors(CORSMiddleware):
    """The answers of an application, with the headers by which a browser lets pages of these origins read them.

    Args:
        origins: such as ``https://chat.example``; ``*`` for all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(app, origins, ("GET", "POST"), ("*",), allow_private_network=True, expose_headers=("x-request-id", "retry-after"))

    def preflight_response(self, request_headers: Headers) -> Response:
        """As the base class's, but a refusal has the form of all others."""
        if self.is_allowed_origin(request_headers["origin"]):
            return super().preflight_response(request_headers)
        message = f"the origin {request_headers['origin'][:100]!r} is none of those that may ask (server.cors_origins)"
        return ApiError(403, message, code="origin_not_allowed").response()
