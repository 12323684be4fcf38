"""`dairllm health`: what the worker or the server on this machine says of itself; the `HEALTHCHECK` of a container.

A configuration file says whom to ask. Without one, the worker's port is asked, and the server's where nobody listens on that: a container
has one of them.
"""

import http.client
import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from dairllm.config import RootSettings, WorkerSettings, load_settings
from dairllm.config_document import read_document
from dairllm.errors import ConfigError, NetworkError, printable

__all__ = ["run"]

PATIENCE_SECONDS = 3.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to be asked, not listened on
_ROOT_SECTIONS, _WORKER_SECTIONS = (set(schema.model_fields) for schema in (RootSettings, WorkerSettings))


@dataclass(frozen=True, slots=True)
class _Node:
    """Somebody who may be on this machine. `port` is 0 where it cannot be known: then `why` says which setting makes it so."""

    kind: str
    host: str
    port: int
    why: str

    def __str__(self) -> str:
        return f"{self.kind} on {self.host} port {self.port}"


def run(config: Path | None) -> None:
    """Return when the node is ready.

    Args:
        config: a worker's or a root's file, which decides whom to ask; None to ask whichever is there.

    Raises:
        ConfigError: a setting is wrong, or the settings say that there is nobody to ask.
        NetworkError: nobody answers, or the node is not ready; says why.
    """
    nodes = _candidates(config)
    known = [node for node in nodes if node.port]
    if not known:
        raise ConfigError(f"{', and '.join(node.why for node in nodes)}: there is no known port to ask")
    silent = []
    for node in known:
        try:
            return _ask(node)
        except ConnectionRefusedError as error:
            silent.append(f"no {node.kind} answers on {node.host} port {node.port}: {error.strerror}")
    raise NetworkError("; ".join(silent))


def _candidates(config: Path | None) -> list[_Node]:
    if config is None:
        return [_worker(None), _server(None)]
    return [_server(config) if _is_of_a_root(config) else _worker(config)]


def _ask(node: _Node) -> None:
    """Return when `node` is ready; ConnectionRefusedError where nobody listens."""
    connection = http.client.HTTPConnection(node.host, node.port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(65536)
    except ConnectionRefusedError:
        raise
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise NetworkError(f"no {node.kind} answers on {node.host} port {node.port}: {why}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise NetworkError(f"the {node} is not ready: {_reason(body) or f'HTTP status {answer.status}'}")


def _worker(config: Path | None) -> _Node:
    settings = load_settings(WorkerSettings, config, environment=_environment("WORKER", "METRICS"))
    port = settings.metrics_port if settings.metrics.enabled else 0
    return _Node("worker", _reachable(settings.metrics.host), port, "metrics.enabled is false or metrics.port is 0")


def _server(config: Path | None) -> _Node:
    server = load_settings(RootSettings, config, environment=_environment("SERVER")).server
    return _Node("server", _reachable(server.host), server.port, "server.port is 0")


def _environment(*sections: str) -> dict[str, str]:
    """The variables that say where to ask. A mistake in another one is for the node itself to tell."""
    prefixes = tuple(f"DAIRLLM_{section}__" for section in sections)
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _reachable(host: str) -> str:
    return _EVERYWHERE.get(host, host)


def _is_of_a_root(config: Path) -> bool:
    """Whether more of a file's sections are a root's than a worker's. What is wrong with the file is told by whoever loads it."""
    try:
        root = read_document(config)
    except ConfigError:
        return False
    keys = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    sections = {key.value for key in keys if isinstance(key, yaml.ScalarNode)}
    return len(sections & _ROOT_SECTIONS) > len(sections & _WORKER_SECTIONS)


def _reason(body: bytes) -> str | None:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return None
    reason = told.get("reason") if isinstance(told, dict) else None
    return printable(reason) if isinstance(reason, str) else None
