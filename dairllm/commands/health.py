"""`dairllm health`: what the worker on this machine says of itself; the `HEALTHCHECK` of a container."""

import http.client
import json
from pathlib import Path

from dairllm.config import WorkerSettings, load_settings
from dairllm.errors import ConfigError, NetworkError

__all__ = ["run"]

PATIENCE_SECONDS = 3.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to be asked, not listened on


def run(config: Path | None) -> None:
    """Return when the worker is ready.

    Raises:
        ConfigError: a setting is wrong, or the settings say that there is nobody to ask.
        NetworkError: nobody answers, or the worker is not ready; says why.
    """
    settings = load_settings(WorkerSettings, config)
    host, port = _EVERYWHERE.get(settings.metrics.host, settings.metrics.host), settings.metrics_port
    if not settings.metrics.enabled or port == 0:
        raise ConfigError("metrics.enabled is false or metrics.port is 0: there is no known port to ask")
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(65536)
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NetworkError(f"no worker answers on {host} port {port}: {why}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise NetworkError(f"the worker on {host} port {port} is not ready: {_reason(body) or f'HTTP status {answer.status}'}")


def _reason(body: bytes) -> str | None:
    try:
        told = json.loads(body)
    except ValueError:
        return None
    reason = told.get("reason") if isinstance(told, dict) else None
    return reason if isinstance(reason, str) else None
