"""What a request meets before any application does: a name of its own, a check of whom it means to ask, an address set right.

A browser sends a page's requests to whatever address the page's site names, this machine's included: a site can say that its own name
stands for 127.0.0.1 (DNS rebinding), and so read what a server says that listens on this machine alone. The header Host gives it away.
"""

import ipaddress
import itertools
import re
import secrets
import socket
from collections.abc import Callable, Sequence

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dairllm.api.api_error import SERVER, ApiError

__all__ = ["REQUEST_ID", "Front", "new_request_id"]

log = structlog.get_logger()
REQUEST_ID = "request_id"
"""The key of a request's name in its scope's `state`."""
_SANE_ID = re.compile(rb"[!-~]{1,128}")
_SLASHES = re.compile("//+")
_PROCESS, _numbers = secrets.token_hex(6), itertools.count()


def new_request_id() -> str:
    """The name of a request that brings none: of this process, and its number."""
    return f"req_{_PROCESS}{next(_numbers):012x}"


class Front:
    """An application before another one.

    Args:
        app: the other one.
        crowded: whether there are more connections than there may be.
        hosts: names of this server, beside this machine's, where it listens on a loopback address.

    Attributes:
        loopback: whether it does.
    """

    def __init__(self, app: ASGIApp, crowded: Callable[[], bool], hosts: Sequence[str] = ()) -> None:
        self._app, self._crowded = app, crowded
        self._hosts = {"localhost", "127.0.0.1", "[::1]", socket.gethostname().lower(), *hosts}
        self.loopback = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = host = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given = value
            elif name == b"host":
                host = value
        request_id = given.decode() if _SANE_ID.fullmatch(given) else new_request_id()
        scope["state"][REQUEST_ID] = request_id
        path: str = scope["path"]
        if "//" in path or path.endswith("/"):
            scope["path"] = path = _SLASHES.sub("/", path).rstrip("/") or "/"

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if message["status"] >= 400 and path.startswith("/v1/"):
                    log.info("refused", request_id=request_id, status=message["status"], method=scope["method"], path=path[:200])
            await send(message)

        error = self._refusal(host.decode("latin-1"))
        try:
            await (self._app if error is None else error.response())(scope, receive, send_named)
        except Exception:
            structlog.contextvars.bind_contextvars(request_id=request_id)  # for whoever logs it
            raise

    def _refusal(self, host: str) -> ApiError | None:
        if self._crowded():
            message = "too many connections; try again later"
            return ApiError(503, message, code="overloaded", kind=SERVER, headers={"retry-after": "1", "connection": "close"})
        if self.loopback and host and not self._is_ours(host):
            message = f"the host {host[:100]!r} is no name of this server, which listens on this machine alone (server.hosts)"
            return ApiError(421, message, code="misdirected_request")
        return None

    def _is_ours(self, host: str) -> bool:
        """No address is refused: to give an address another meaning is in nobody's power."""
        name, _, after = host.rpartition(":")
        if not name or after.endswith("]"):
            name = host
        name = name.lower().removesuffix(".")
        if name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True
