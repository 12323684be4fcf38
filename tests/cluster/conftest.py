"""Real workers on real sockets, a small root made of the codec and the engine, recorded roots, and a proxy that spoils connections."""

import asyncio
import contextlib
import gzip
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from numpy.typing import NDArray

from dairllm.cluster.own_model import OwnModel
from dairllm.cluster.worker import Worker
from dairllm.config import WorkerSettings
from dairllm.engine.executor import Executor
from dairllm.engine.program import compile_program
from dairllm.engine.weights import WireWeights
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_layout import node_slice
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.plan import Run, token_plan
from dairllm.graph.references import NO_MODEL
from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import (
    ACK,
    HELLO,
    Control,
    Greeting,
    Peer,
    WeightHeader,
    encode_ack,
    encode_control,
    encode_greeting,
    encode_network,
    encode_node,
    encode_stop,
    encode_weight_header,
    encode_weights_end,
)
from dairllm.protocol.dllama.events import Event
from dairllm.protocol.dllama.worker import Stage, WorkerSession
from dairllm.telemetry import WorkerMetrics
from tests.cluster.clusters import make_cluster  # noqa: F401 - a fixture
from tests.net.conftest import accepted  # noqa: F401 - a fixture
from tests.patience import PATIENCE

DATA = Path(__file__).parents[1] / "data" / "dllama"
Log = list[dict[str, Any]]


@pytest.fixture
def logged() -> Iterator[Log]:
    """What was logged, one dictionary an event."""
    with structlog.testing.capture_logs() as events:
        yield events  # type: ignore[misc] # structlog calls them MutableMappings


# Workers


@dataclass
class Running:
    """A worker of a test."""

    worker: Worker
    port: int
    metrics: WorkerMetrics
    host: str = "127.0.0.1"

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port


MakeWorker = Callable[..., Awaitable[Running]]


@pytest.fixture
async def make_worker(executors: list[Executor]) -> AsyncIterator[MakeWorker]:
    """Starts a worker, with a model of its own where a file is given; named arguments are settings: ``deadlines={"mesh": "1s"}``. All are
    closed in the end."""
    running: list[Running] = []
    models: list[OwnModel] = []

    async def make(host: str = "127.0.0.1", own: Path | None = None, **sections: dict[str, object]) -> Running:
        values = {"worker": {"host": host, "port": 0, "threads": 1}, **sections}
        metrics = WorkerMetrics()
        if own is not None:
            models.append(OwnModel.open(own))
        worker = Worker(WorkerSettings.model_validate(values), executors[len(running)], metrics, models[-1] if own is not None else None)
        running.append(Running(worker, await worker.start(), metrics, host))
        return running[-1]

    yield make
    for one in running:
        await one.worker.close()
    for model in models:
        model.close()


@pytest.fixture
async def worker(make_worker: MakeWorker) -> Running:
    return await make_worker()


# Roots


@dataclass(frozen=True)
class Recording:
    """A recorded session of two C++ nodes: all that the root said, all that the worker answered."""

    name: str
    said: bytes
    answered: bytes

    def offset_of(self, stage: Stage, into: int = 0) -> int:
        """How many of the root's bytes lead to a stage, and `into` bytes further."""
        return _stage_offsets(self.name)[stage] + into

    def rows_answered(self) -> list[tuple[FloatType, int]]:
        """Type and bytes of each row of pipe that the worker says after its four ACKs, in order."""
        rows: list[tuple[FloatType, int]] = []
        network: Any = None
        plan: Any = ()
        for event in _events(self.said):
            if hasattr(event, "plan"):
                network, plan = event.network, event.plan
            if isinstance(event, Control):
                for step in plan:
                    if not isinstance(step, Run):
                        kind = network.pipes[step.pipe].size.float_type
                        rows += [(kind, send.row_bytes) for send in step.sends for _ in range(event.rows)]
        return rows


def _events(said: bytes) -> Iterator[Event]:
    """The events of a session, everything granted at once."""
    wire, at = WorkerSession(), 0
    while True:
        event = wire.next_event()
        if event is not None:
            yield event
        elif wire.ack_due:
            wire.acknowledge()
        elif wire.memory_due:
            wire.receive_into(memoryview(bytearray(wire.memory_due)))
        elif at == len(said):
            return
        else:
            at += wire.receive_data(said[at : at + 4096])


@cache
def _stage_offsets(name: str) -> dict[Stage, int]:
    """The byte of the root's at which each stage is first reached."""
    said, wire, offsets = load_recording(name).said, WorkerSession(), {Stage.GREETING: 0}
    for at in range(len(said)):
        wire.receive_data(said[at : at + 1])
        while True:
            if wire.next_event() is None:
                if wire.ack_due:
                    wire.acknowledge()
                elif wire.memory_due:
                    wire.receive_into(memoryview(bytearray(wire.memory_due)))
                else:
                    break
            offsets.setdefault(wire.stage, at + 1)
        if Stage.ROWS in offsets:
            break
    return offsets


@cache
def load_recording(name: str) -> Recording:
    raw = gzip.decompress((DATA / f"{name}.wire.gz").read_bytes())
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    at = 5
    while at < len(raw):
        direction, nbytes = struct.unpack_from("<BI", raw, at)
        at += 5
        sides[direction].append(raw[at : at + nbytes])
        at += nbytes
    return Recording(name, b"".join(sides[0]), b"".join(sides[1]))


@pytest.fixture
def recording() -> Recording:
    """A small one, for tests that want any root."""
    return load_recording("llama_q40")


@pytest.fixture
def recordings() -> list[Recording]:
    return [load_recording(name) for name in ("llama_f32", "llama_q40", "llama31_q40", "qwen3_q40", "qwen3_moe_q40")]


Play = Callable[..., Awaitable[bytes]]


@pytest.fixture
def play() -> Play:
    """Says what a root said to (host, port) and returns all that is answered until the connection is closed."""

    async def play(address: tuple[str, int], said: bytes, *, chunk: int = 1 << 20, hang_up: bool = False) -> bytes:
        reader, writer = await asyncio.open_connection(*address)

        async def speak() -> None:
            with contextlib.suppress(OSError):
                for at in range(0, len(said), chunk):
                    writer.write(said[at : at + chunk])
                    await writer.drain()
                if hang_up:
                    writer.write_eof()

        speaking = asyncio.create_task(speak())
        answered = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(1 << 16):
                answered += data
        speaking.cancel()
        await asyncio.wait({speaking})
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return bytes(answered)

    return play


@dataclass
class Root:
    """Node 0, as simple as can be: the codec, the engine, streams."""

    model: ModelFile
    workers: list[tuple[str, int]]
    executor: Executor
    sync: FloatType = FloatType.F32
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def greet(self) -> None:
        for index, (host, port) in enumerate(self.workers):
            self.streams.append(await asyncio.open_connection(host, port))
            others = tuple(Peer(*other) for other in self.workers[:index] + self.workers[index + 1 :])
            self.say(index, encode_greeting(Greeting(len(self.workers), index, others)))
            await self.hear_ack(index)

    async def go(self) -> None:
        for index in range(len(self.workers)):
            self.say(index, encode_ack())

    async def configure(self) -> None:
        spec, n_nodes = self.model.spec, len(self.workers) + 1
        self.network, nodes = build_graph(spec, n_nodes, self.sync)
        for index, node in enumerate(nodes[1:]):
            for message in (encode_network(self.network), encode_node(node)):
                self.say(index, message)
                await self.hear_ack(index)
        self.plan = token_plan(self.network, nodes[0])
        weights = WireWeights(nodes[0])
        weights.allocate()
        self.program = compile_program(self.network, nodes[0], weights, n_threads=self.executor.n_threads)
        self.weights = weights

    def weight_messages(self, node: int) -> Iterator[tuple[WeightHeader, bytes]]:
        spec, n_nodes = self.model.spec, len(self.workers) + 1
        for tensor in self.model.tensors:
            if tensor.name == "embedding" and node:
                continue
            part = node_slice(tensor, spec, node, n_nodes)
            raw = self.model.raw
            data = b"".join(
                raw[at : at + part.slice_row_bytes].tobytes()
                for at in range(part.offset, part.offset + part.n_rows * part.stride, part.stride)
            )
            yield WeightHeader(tensor.name, tensor.layer, tensor.expert * len(data), len(data)), data

    async def load(self) -> None:
        for header, data in self.weight_messages(0):
            self.weights.into(header.name, header.index, header.offset, header.nbytes)[:] = data
        for index, (_, writer) in enumerate(self.streams):
            for header, data in self.weight_messages(index + 1):
                self.say(index, encode_weight_header(header) + data)
                await writer.drain()
        for index in range(len(self.workers)):
            self.say(index, encode_weights_end())
            await self.hear_ack(index)

    async def begin(self) -> None:
        """All that comes before the first token."""
        await self.greet()
        await self.go()
        await self.configure()
        await self.load()

    async def feed(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        """Logits [rows, vocab] of a batch."""
        rows = len(tokens)
        for index in range(len(self.workers)):
            self.say(index, encode_control(Control(position, rows)))
        self.program.values(TOKEN_PIPE)[:rows, 0] = tokens
        for step in self.plan:
            if isinstance(step, Run):
                self.executor.run(self.program, step.first, step.stop, position, rows)
                continue
            for send in step.sends:
                for piece in self.program.region(step.pipe, send.slice, rows):
                    self.say(send.node - 1, bytes(piece))
            for receive in step.receives:
                for piece in self.program.region(step.pipe, receive.slice, rows):
                    piece[:] = await self.streams[receive.node - 1][0].readexactly(len(piece))
        width = self.network.pipes[LOGITS_PIPE].size.x // self.network.n_nodes
        slices = [
            np.frombuffer(b"".join(self.program.region(LOGITS_PIPE, node, rows)), np.float32).reshape(rows, width)
            for node in range(self.network.n_nodes)
        ]
        return np.concatenate(slices, axis=1)

    async def stop(self) -> None:
        """Say goodbye; returns when every worker has closed."""
        for index, (reader, _) in enumerate(self.streams):
            self.say(index, encode_stop())
            assert await reader.read() == b""

    def say(self, index: int, data: bytes) -> None:
        self.streams[index][1].write(data)

    async def hear_ack(self, index: int) -> None:
        async with asyncio.timeout(PATIENCE):
            assert await self.streams[index][0].readexactly(4) == encode_ack()

    async def close(self) -> None:
        for _, writer in self.streams:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self.streams.clear()


MakeRoot = Callable[..., Root]


@pytest.fixture
async def make_root(executors: list[Executor]) -> AsyncIterator[MakeRoot]:
    """A root over a model file and its workers."""
    made: list[tuple[Root, ModelFile]] = []

    def make(path: Path, workers: list[Running], sync: FloatType = FloatType.F32) -> Root:
        model = ModelFile.open(path)
        made.append((Root(model, [one.address for one in workers], executors[-1], sync), model))
        return made[-1][0]

    yield make
    for root, model in made:
        await root.close()
        model.close()


# Faults


@dataclass
class Proxy:
    """Stands between a root and a worker and spoils what the root says."""

    target: tuple[str, int]
    chunk: int = 1 << 16
    """Bytes passed on at a time."""
    pause: float = 0.0
    """Seconds before each chunk."""
    cut_after: int | None = None
    """Bytes after which the root seems to have closed its connection."""
    reset_after: int | None = None
    """Bytes after which both connections are broken off."""
    stall_after: int | None = None
    """Bytes after which nothing more is passed on, and nothing is closed."""
    disguise: bool = False
    """Whether the worker is to look like one of distributed-llama: its answer to the marker becomes an ACK."""
    port: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream_reader, upstream = await asyncio.open_connection(*self.target)
        back = asyncio.create_task(self._pass_back(upstream_reader, writer))
        try:
            await self._pass_on(reader, upstream, writer)
            await back
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            back.cancel()
            upstream.close()
            writer.close()
            self._tasks.discard(task)
            await asyncio.wait({back})
            for end in (upstream, writer):
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while data := await reader.read(self.chunk):
            if self.stall_after is not None and passed + len(data) > self.stall_after:
                upstream.write(data[: self.stall_after - passed])
                await asyncio.sleep(3600)
            if self.cut_after is not None and passed + len(data) > self.cut_after:
                upstream.write(data[: self.cut_after - passed])
                upstream.write_eof()
                return
            if self.reset_after is not None and passed + len(data) > self.reset_after:
                upstream.write(data[: self.reset_after - passed])
                await upstream.drain()
                upstream.transport.abort()
                writer.transport.abort()
                return
            if self.pause:
                await asyncio.sleep(self.pause)
            upstream.write(data)
            await upstream.drain()
            passed += len(data)

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop's word for writing to what is closed
            while data := await reader.read(1 << 16):
                writer.write(data.replace(HELLO + NO_MODEL, ACK) if self.disguise else data)
                await writer.drain()
            writer.write_eof()


MakeProxy = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def make_proxy() -> AsyncIterator[MakeProxy]:
    made: list[Proxy] = []

    async def make(target: tuple[str, int], **faults: Any) -> Proxy:
        proxy = Proxy(target, **faults)
        made.append(proxy)
        await proxy.start()
        return proxy

    yield make
    for proxy in made:
        await proxy.close()
