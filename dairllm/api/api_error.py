"""An answer that is an error, in the form that clients of OpenAI's API understand:

{"error": {"message": ..., "type": ..., "param": the field or null, "code": ...}}
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

__all__ = ["INVALID", "RATE_LIMIT", "SERVER", "ApiError"]

INVALID, SERVER, RATE_LIMIT = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP's.
        message: one line for people.
        code: a word for programs, or None.
        param: the field of the request, or None.
        kind: OpenAI's `type`.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)
