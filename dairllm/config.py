"""Settings: YAML file, environment and flags -> one checked, frozen object, with the defaults and bounds of every key.

Precedence: flag, environment variable ``DAIRLLM_<SECTION>__<KEY>``, file, default. Each value keeps where it came from, so an
error names the file and line, the variable or the flag, and the key. What every key means to an operator stands in
``configs/worker.yaml``; a test holds the two together.
"""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dairllm import machine
from dairllm.errors import ConfigError
from dairllm.units import format_duration, parse_duration, parse_size

__all__ = [
    "Deadlines",
    "Keepalive",
    "Kernels",
    "Limits",
    "Log",
    "MemoryAmount",
    "Metrics",
    "Threads",
    "Worker",
    "WorkerSettings",
    "load_settings",
    "thread_count",
]

ENVIRONMENT_PREFIX = "DAIRLLM_"
_METRICS_OFFSET = 1000


@dataclass(frozen=True, slots=True)
class MemoryAmount:
    """An amount of memory as it was written: a size, or a share of what this process may use."""

    text: str
    nbytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: object) -> "MemoryAmount":
        """Of ``"2GiB"`` or ``"80%"``; ValueError otherwise."""
        if isinstance(value, MemoryAmount):
            return value
        text = value.strip() if isinstance(value, str) else ""
        percent = text.removesuffix("%").strip()
        if text.endswith("%") and text.isascii() and percent.replace(".", "", 1).isdecimal() and 0 < float(percent) <= 100:
            return cls(text, share=float(percent) / 100)
        try:
            nbytes = parse_size(value)
        except ValueError:
            raise ValueError(f"expected a size such as 2GiB, or a share from 0% to 100%, found {value!r}") from None
        if nbytes == 0:
            raise ValueError("expected more than nothing, found 0 bytes")
        return cls(text, nbytes=nbytes)

    def resolve(self) -> int:
        """Bytes; a share is one of the memory of the machine or of the control group, whichever is smaller."""
        return self.nbytes if self.nbytes is not None else int(machine.memory_bytes() * (self.share or 1.0))

    def __str__(self) -> str:
        return self.text


def _duration(low: str, high: str) -> Callable[[object], float]:
    """A validator of times between two bounds."""

    def validate(value: object) -> float:
        seconds = parse_duration(value)
        if not parse_duration(low) <= seconds <= parse_duration(high):
            raise ValueError(f"expected a time from {low} to {high}, found {format_duration(seconds)}")
        return seconds

    return validate


def _auto_or(low: int, high: int) -> Callable[[object], int | str]:
    def validate(value: object) -> int | str:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise ValueError(f"expected auto or a whole number from {low} to {high}, found {value!r}")

    return validate


Seconds = Annotated[float, BeforeValidator(_duration("10ms", "24h"))]
WholeSeconds = Annotated[float, BeforeValidator(_duration("1s", "1h"))]
Port = Annotated[int, Field(ge=0, le=65535)]
Threads = Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, 1024))]
Kernels = Literal["auto", "portable", "avx2", "avxvnni", "avx512vnni"]


def thread_count(setting: int | str) -> int:
    """Compute threads for a `Threads` setting: `auto` is one a processor."""
    return setting if isinstance(setting, int) else machine.processors()


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Worker(_Section):
    """Where this node listens for roots, and with what it computes."""

    host: str = Field("0.0.0.0", min_length=1)  # noqa: S104 - a worker that other machines cannot reach is of no use; the C++ worker listens so too
    port: Port = 9990
    threads: Threads = "auto"
    kernels: Kernels = "auto"

    @property
    def n_threads(self) -> int:
        return thread_count(self.threads)


class Limits(_Section):
    """How much of this node others may take."""

    memory: Annotated[MemoryAmount, BeforeValidator(MemoryAmount.parse)] = MemoryAmount("80%", share=0.8)
    nodes: int = Field(64, ge=2, le=1024)
    strangers: int = Field(16, ge=1, le=4096)


class Deadlines(_Section):
    """Seconds that a peer may be silent, counted from the last byte that came; `shutdown`: from the signal."""

    handshake: Seconds = 10.0
    mesh: Seconds = 30.0
    configuration: Seconds = 30.0
    weights: Seconds = 60.0
    exchange: Seconds = 60.0
    shutdown: Seconds = 10.0


class Keepalive(_Section):
    """When TCP itself gives up on a peer that is gone: probes of an idle connection, seconds that sent data may go unacknowledged."""

    idle: WholeSeconds = 10.0
    interval: WholeSeconds = 5.0
    count: int = Field(4, ge=1, le=100)
    user_timeout: Seconds = 30.0


class Metrics(_Section):
    """The HTTP port of health and metrics."""

    enabled: bool = True
    host: str = Field("127.0.0.1", min_length=1)
    port: Annotated[int | Literal["auto"], BeforeValidator(_auto_or(0, 65535))] = "auto"


class Log(_Section):
    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class WorkerSettings(_Section):
    """All that `dairllm worker` can be told."""

    worker: Worker = Worker()
    limits: Limits = Limits()
    deadlines: Deadlines = Deadlines()
    keepalive: Keepalive = Keepalive()
    metrics: Metrics = Metrics()
    log: Log = Log()

    @property
    def metrics_port(self) -> int:
        """`auto` follows the worker's port, so that several workers on one machine do not collide; 0 is any free port."""
        if self.metrics.port != "auto":
            return self.metrics.port
        port = self.worker.port
        return 0 if port == 0 else port + _METRICS_OFFSET if port + _METRICS_OFFSET <= 65535 else port - _METRICS_OFFSET


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and who gave it."""

    value: object
    where: str


Settings = TypeVar("Settings", bound=BaseModel)
_Path = tuple[str, ...]


def load_settings(
    schema: type[Settings],
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> Settings:
    """Settings from all their sources.

    Args:
        file: a YAML file, or None for no file.
        environment: os.environ by default. An empty variable counts as not given.
        flags: from a key such as ``"worker.port"`` to the flag's name and value; a value of None counts as not given.

    Raises:
        ConfigError: unknown key, wrong type or out of range, with its file and line, variable or flag; a file that cannot be read.
    """
    given: dict[_Path, _Given] = {}
    if file is not None:
        given.update(_File(schema, file).values())
    given.update(_from_environment(schema, os.environ if environment is None else environment))
    for key, (name, value) in (flags or {}).items():
        if value is not None:
            given[tuple(key.split("."))] = _Given(value, f"flag {name}")
    tree: dict[str, Any] = {}
    for path, item in given.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = item.value
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("Input should "):
        message = f"expected {message.removeprefix('Input should ').removeprefix('be ')}, found {first['input']!r}"
    sources = [given[path[:n]].where for n in range(len(path), 0, -1) if path[:n] in given]
    raise ConfigError(": ".join([*sources[:1], ".".join(path), message]))


def _leaves(schema: type[BaseModel], prefix: _Path = ()) -> Iterator[_Path]:
    for name in schema.model_fields:
        section = _section(schema, name)
        if section is None:
            yield (*prefix, name)
        else:
            yield from _leaves(section, (*prefix, name))


def _section(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = schema.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _unknown(root: type[BaseModel], schema: type[BaseModel], name: str) -> str:
    """What to say about a key that is not there: the nearest of its section, else the same key of another."""
    near = difflib.get_close_matches(name, schema.model_fields, 1, 0.6)
    if not near:
        near = [".".join(path) for path in _leaves(root) if path[-1] == name]
    known = f"did you mean {near[0]}?" if near else f"there are {', '.join(schema.model_fields)}"
    return f"unknown key; {known}"


def _from_environment(schema: type[BaseModel], environment: Mapping[str, str]) -> dict[_Path, _Given]:
    given: dict[_Path, _Given] = {}
    loader = yaml.SafeLoader("")
    for variable, text in environment.items():
        path = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        if not variable.startswith(ENVIRONMENT_PREFIX) or len(path) < 2 or not text:
            continue
        where = f"environment variable {variable}"
        section: type[BaseModel] | None = schema
        for depth, name in enumerate(path):
            if section is None or name not in section.model_fields:
                raise ConfigError(f"{where}: {'.'.join(path[: depth + 1])}: {_unknown(schema, section or schema, name)}")
            section = _section(section, name)
        if section is not None:
            raise ConfigError(f"{where}: {'.'.join(path)}: a section, not a key; there are {', '.join(section.model_fields)}")
        # the types of a plain YAML scalar, without YAML's syntax: 9990 is a number, :: is text
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call] # types-PyYAML leaves it untyped
        node = yaml.ScalarNode(tag, text)
        try:
            given[path] = _Given(loader.construct_object(node), where)
        except ValueError as error:
            raise ConfigError(f"{where}: {'.'.join(path)}: {error}") from None
    return given


class _File:
    """A YAML file, walked along the schema, so that each key's line is known."""

    def __init__(self, schema: type[BaseModel], file: Path) -> None:
        self._schema, self._file = schema, file
        self._given: dict[_Path, _Given] = {}

    def values(self) -> dict[_Path, _Given]:
        try:
            self._loader = yaml.SafeLoader(self._file.read_text(encoding="utf-8"))
            root = self._loader.get_single_node()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{self._file}, line {mark.line + 1}" if mark else f"{self._file}"
            raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
        if root is not None:
            self._walk(self._schema, root, ())
        return self._given

    def _walk(self, schema: type[BaseModel], node: yaml.Node, prefix: _Path) -> None:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return  # a section with all its keys commented out
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, prefix or ("the file",), f"expected keys ({', '.join(schema.model_fields)}), found {_what(node)}")
        seen: dict[str, int] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _what(key)
            path = (*prefix, name)
            if name not in schema.model_fields:
                self._fail(key, path, _unknown(self._schema, schema, name))
            if name in seen:
                self._fail(key, path, f"given twice, first in line {seen[name]}")
            seen[name] = key.start_mark.line + 1
            section = _section(schema, name)
            if section is not None:
                self._walk(section, value, path)
                continue
            try:
                self._given[path] = _Given(self._loader.construct_object(value, deep=True), f"{self._file}, line {seen[name]}")
            except (yaml.YAMLError, ValueError) as error:
                self._fail(key, path, getattr(error, "problem", None) or str(error))

    def _fail(self, node: yaml.Node, path: _Path, message: str) -> NoReturn:
        raise ConfigError(f"{self._file}, line {node.start_mark.line + 1}: {'.'.join(path)}: {message}")


def _what(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
