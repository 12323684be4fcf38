"""What goes wrong with a request, and how a client is told."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from dairllm.api.api_error import RATE_LIMIT, SERVER, ApiError
from dairllm.errors import ConfigError, DairllmError
from dairllm.serving.reply import AbandonedError, StalledError
from dairllm.serving.service import QueueFullError, UnavailableError
from dairllm.text.chat_renderer import ChatTemplateError

__all__ = ["ApiError", "api_error", "exception_handlers"]

CLIENT_CLOSED_REQUEST = 499
"""nginx's number; whoever has gone away does not see it."""


def api_error(error: DairllmError) -> ApiError:
    """How an error of ours is told to a client."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="rate_limit_exceeded", kind=RATE_LIMIT, headers=_retry(error.retry_after))
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="service_unavailable", kind=SERVER, headers=_retry(error.retry_after))
    if isinstance(error, ChatTemplateError):
        return ApiError(400, str(error), code="chat_template_error", param="messages")
    if isinstance(error, AbandonedError | StalledError):
        return ApiError(CLIENT_CLOSED_REQUEST, str(error), code="request_cancelled")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, str(error), code="internal_error", kind=SERVER)


def exception_handlers() -> dict[Any, ExceptionHandler]:
    """For starlette: everything that a route may raise before it has begun to answer."""
    return {
        ApiError: _of_api_error,
        DairllmError: _of_dairllm_error,
        HTTPException: _of_http_exception,
        ClientDisconnect: _of_disconnect,
        Exception: _of_a_defect,
    }


def _retry(seconds: int) -> dict[str, str]:
    return {"retry-after": str(max(1, seconds))}


def _of_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - for the type checker, here and below: starlette chose by class
    return error.response()


def _of_dairllm_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, DairllmError)  # noqa: S101
    return api_error(error).response()


def _of_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"unknown address: {asked}", code="unknown_url").response()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{asked}: the method is not allowed; there is {allowed}"
        return ApiError(405, message, code="method_not_supported", headers=error.headers).response()
    return ApiError(error.status_code, error.detail, headers=error.headers).response()


def _of_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it


def _of_a_defect(_: Request, error: Exception) -> Response:
    """Whoever serves the application logs the traceback."""
    return ApiError(
        500, f"a defect of this program ({type(error).__name__}); its log says more", code="internal_error", kind=SERVER
    ).response()
