"""Settings: YAML file, environment and flags -> one checked, frozen object, with the defaults and bounds of every key.

Precedence: flag, environment variable ``DAIRLLM_<SECTION>__<KEY>`` (or one of ``SHORT_NAMES``), file, default.
Each value keeps where it came from, so an error names the file and line, the variable or the flag, and the key. What every key means to an
operator stands in
``configs/worker.yaml`` and ``configs/root.yaml``; tests hold files and schemas together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dairllm import machine
from dairllm.config_addresses import DEFAULT_PORT, WorkerAddress, worker_addresses
from dairllm.config_names import host_names, origins
from dairllm.config_sources import read_settings
from dairllm.units import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "MAX_ID",
    "SHORT_NAMES",
    "Deadlines",
    "Keepalive",
    "Kernels",
    "Limits",
    "Log",
    "MemoryAmount",
    "Metrics",
    "Paging",
    "RootDeadlines",
    "RootSettings",
    "Sampling",
    "Threads",
    "Worker",
    "WorkerAddress",
    "WorkerSettings",
    "load_settings",
    "thread_count",
]

MAX_ID = 2**31 - 1
"""Token ids and positions are 32 bits wide in every file and message."""
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

    def within(self, available: int) -> "MemoryAmount":
        """This amount, or all that is available where that is less."""
        return self if self.resolve() <= available else MemoryAmount(format_size(available), nbytes=available)

    def __str__(self) -> str:
        return self.text


def _tensor_mode(value: object) -> object:
    if value == "layers":
        raise ValueError("layers is still to come; tensor is the only mode there is")
    return value


def _size(low: str, high: str) -> Callable[[object], int]:
    """A validator of sizes between two bounds; bytes."""

    def validate(value: object) -> int:
        nbytes = parse_size(value)
        if not parse_size(low) <= nbytes <= parse_size(high):
            raise ValueError(f"expected a size from {low} to {high}, found {format_size(nbytes)}")
        return nbytes

    return validate


def _duration(low: str, high: str) -> Callable[[object], float]:
    """A validator of times between two bounds."""

    def validate(value: object) -> float:
        seconds = parse_duration(value)
        if not parse_duration(low) <= seconds <= parse_duration(high):
            raise ValueError(f"expected a time from {low} to {high}, found {format_duration(seconds)}")
        return seconds

    return validate


def _auto_or_duration(low: str, high: str) -> Callable[[object], float | str]:
    duration = _duration(low, high)
    return lambda value: "auto" if value == "auto" else duration(value)


def _auto_or(low: int, high: int) -> Callable[[object], int | str]:
    def validate(value: object) -> int | str:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise ValueError(f"expected auto or a whole number from {low} to {high}, found {value!r}")

    return validate


Seconds = Annotated[float, BeforeValidator(_duration("10ms", "24h"))]
WholeSeconds = Annotated[float, BeforeValidator(_duration("1s", "1h"))]
Exchange = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_duration("10ms", "24h"))]
Port = Annotated[int, Field(ge=0, le=65535)]
Threads = Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, 1024))]
KvCache = Literal["f32", "f16", "q80"]
Kernels = Literal["auto", "portable", "avx2", "avxvnni", "avx512vnni"]
Count = Annotated[int, Field(ge=1, le=MAX_ID)]


def thread_count(setting: int | str) -> int:
    """Compute threads for a `Threads` setting: `auto` is one a processor."""
    return setting if isinstance(setting, int) else machine.processors()


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Worker(_Section):
    """Where this node listens for roots, and with what it computes."""

    host: str = Field("0.0.0.0", min_length=1)  # noqa: S104 - a worker that other machines cannot reach is of no use; the C++ worker listens so too
    port: Port = DEFAULT_PORT
    model: str | None = None
    threads: Threads = "auto"
    kernels: Kernels = "auto"
    kv_cache: KvCache = "f32"
    overlap: bool = True

    @property
    def n_threads(self) -> int:
        return thread_count(self.threads)


class Paging(_Section):
    """How weights that do not fit into memory are read from the model's file."""

    io_mode: Literal["auto", "mmap", "buffered", "direct"] = "auto"
    readers: Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, 64))] = "auto"
    threads: Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, 1024))] = "auto"
    policy: Literal["pinned", "lru"] = "pinned"


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
    exchange: Exchange = 60.0
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
    paging: Paging = Paging()
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


class Model(_Section):
    """Which files, and how much of the context is used."""

    file: str | None = None
    tokenizer: str | None = None
    name: str | None = Field(None, min_length=1)
    max_seq_len: Count | None = None


class Cluster(_Section):
    """Who else computes, and how much of it each does."""

    workers: Annotated[tuple[WorkerAddress, ...], BeforeValidator(worker_addresses)] = ()
    shares: str | None = None
    """For `dairllm.graph.slicing.parse_shares`, which knows what a share is."""
    mode: Annotated[Literal["tensor"], BeforeValidator(_tensor_mode)] = "tensor"


class Engine(_Section):
    """With what to compute."""

    threads: Threads = "auto"
    kernels: Kernels = "auto"
    sync: Literal["auto", "q80", "f32"] = "auto"
    kv_cache: KvCache = "f32"
    overlap: bool = True

    @property
    def n_threads(self) -> int:
        return thread_count(self.threads)


class RootLimits(_Section):
    """How much of this machine the root may take."""

    memory: Annotated[MemoryAmount, BeforeValidator(MemoryAmount.parse)] = MemoryAmount("80%", share=0.8)


class Sampling(_Section):
    """How the next token is chosen, and of how many an answer may be made: of `generate`, and of a request that says nothing."""

    steps: Count | None = None
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(0.9, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, le=MAX_ID)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None


class Server(_Section):
    """Where `serve` listens, and how much it takes on."""

    host: str = Field("127.0.0.1", min_length=1)
    port: Port = 8000
    queue: int = Field(64, ge=0, le=65536)
    """Requests that may wait for their turn."""
    request_bytes: Annotated[int, BeforeValidator(_size("1KiB", "1GiB"))] = 8 * 2**20
    heartbeat: Seconds = 5.0
    keep_alive: Seconds = 75.0
    hosts: Annotated[tuple[str, ...], BeforeValidator(host_names)] = ()
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(origins)] = ()
    conversations: Annotated[int | Literal["auto"], BeforeValidator(_auto_or(1, 64))] = "auto"

    @property
    def most_conversations(self) -> int:
        """That are to have a KV cache each, where there is memory for it."""
        return 8 if self.conversations == "auto" else self.conversations


class RootDeadlines(_Section):
    """Seconds that a worker may be silent, counted from the last byte that came or went; `reconnect`: between attempts;
    `recovery`: that requests wait for a worker that was lost; `shutdown`: from the signal."""

    connect: Seconds = 10.0
    answer: Seconds = 60.0
    weights: Seconds = 60.0
    exchange: Exchange = "auto"
    reconnect: Seconds = 5.0
    recovery: Seconds = 60.0
    shutdown: Seconds = 10.0


class RootLog(_Section):
    """As a worker's; but `auto` is info for a service, and warning for a command whose answer it would disturb."""

    format: Literal["auto", "console", "json"] = "auto"
    level: Literal["auto", "debug", "info", "warning", "error"] = "auto"

    def level_of(self, *, service: bool) -> Literal["debug", "info", "warning", "error"]:
        """What `auto` means to who asks."""
        return self.level if self.level != "auto" else "info" if service else "warning"


class RootSettings(_Section):
    """All that a file or the environment can tell a root: `dairllm generate` and `dairllm serve`."""

    model: Model = Model()
    cluster: Cluster = Cluster()
    engine: Engine = Engine()
    limits: RootLimits = RootLimits()
    paging: Paging = Paging()
    sampling: Sampling = Sampling()
    server: Server = Server()
    deadlines: RootDeadlines = RootDeadlines()
    keepalive: Keepalive = Keepalive()
    log: RootLog = RootLog()


SHORT_NAMES: Mapping[type[BaseModel], Mapping[str, str]] = {
    RootSettings: {
        "MODEL": "model.file",
        "MAX_SEQ_LEN": "model.max_seq_len",
        "WORKERS": "cluster.workers",
        "SHARES": "cluster.shares",
        "THREADS": "engine.threads",
        "KERNELS": "engine.kernels",
        "KV_CACHE": "engine.kv_cache",
        "MEMORY_LIMIT": "limits.memory",
    },
    WorkerSettings: {
        "MODEL": "worker.model",
        "THREADS": "worker.threads",
        "KERNELS": "worker.kernels",
        "KV_CACHE": "worker.kv_cache",
        "MEMORY_LIMIT": "limits.memory",
    },
}
"""What an environment variable of one word stands for, by what reads it: ``DAIRLLM_MODEL`` is ``--model``."""

_NO_SETTINGS = frozenset(f"DAIRLLM_{name}" for name in ("CONFIG", "MODELS", "PORT", "ROOT_MEMORY", "WORKER_MEMORY"))
"""`--config`'s variable, and those of docker-compose.yml, which a shell may hold as well."""

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(
    schema: type[Settings],
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> Settings:
    """Settings of a worker or a root, from all their sources. A container may hold variables of both: each takes its own.

    Args and errors as `dairllm.config_sources.read_settings`.
    """
    short = SHORT_NAMES[schema]
    theirs = frozenset(f"DAIRLLM_{name}" for names in SHORT_NAMES.values() for name in names if name not in short)
    return read_settings(
        schema,
        file,
        environment=environment,
        flags=flags,
        others={"`dairllm worker`": WorkerSettings, "a root (`dairllm generate`, `dairllm serve`)": RootSettings},
        short=short,
        no_settings=_NO_SETTINGS | theirs,
    )
