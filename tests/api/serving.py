"""A server of a test, over a real model; models that can be held up, or that fail, as slow ones and lost ones do."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from openai import AsyncOpenAI

from dairllm.api.app import serve_app
from dairllm.api.connection import BoundedConnection
from dairllm.api.prompts import ServedModel
from dairllm.api.server import HttpServer
from dairllm.config import Sampling
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import DairllmError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.graph.types import FloatType
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode
from dairllm.runtime.node_status import NodeStatus
from dairllm.serving.fingerprint import Fingerprint
from dairllm.serving.service import OpenModel, Service
from dairllm.telemetry import Readiness, ServiceMetrics
from dairllm.text.tokenizer import Tokenizer
from tests.patience import PATIENCE

FINGERPRINT = Fingerprint(b"small", FloatType.Q80, FloatType.F32)
SEQ_LEN = 4096
VOCAB = 320
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}<|turn|>assistant: "
)


def write_model(folder: Path, template: str | None = TEMPLATE, eos: bool = False) -> Path:
    """A small random model with a tokenizer. Its answers end at no id unless `eos`: random ones would end soon."""
    path = folder / "small.m"
    write_random_model(path, small_spec(seq_len=SEQ_LEN, vocab_size=VOCAB))
    file = byte_vocabulary(VOCAB, template)
    eos_ids = file.eos_ids if eos else ()
    TokenizerFile(file.pieces, file.scores, file.bos_id, eos_ids, file.add_bos, template, file.max_token_length).write(folder / "small.t")
    return path


class PacedModel:
    """A real model whose passes a test can hold up, slow down or let fail.

    Attributes:
        gate: passes wait while it is not set.
        pause: seconds before each pass.
        failure: raised by the pass after so many more (`fails_in`).
        trouble: what it says of itself between requests.
        fed: positions and numbers of tokens of all passes.
    """

    def __init__(self, model: LocalNode) -> None:
        self._model = model
        self.seq_len, self.vocab_size, self.n_batches = model.seq_len, model.vocab_size, model.n_batches
        self.gate = asyncio.Event()
        self.gate.set()
        self.pause = 0.0
        self.failure: Exception | None = None
        self.fails_in = 0
        self.trouble: str | None = None
        self.paging = None
        self.kv_caches = model.kv_caches
        self.fed: list[tuple[int, int]] = []
        self.closed = False
        self.reports: tuple[NodeStatus, ...] = model.nodes

    @property
    def nodes(self) -> Sequence[NodeStatus]:
        return self.reports

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        await self.gate.wait()
        if self.pause:
            await asyncio.sleep(self.pause)
        if self.failure is not None:
            if self.fails_in == 0:
                raise self.failure
            self.fails_in -= 1
        self.fed.append((position, len(tokens)))
        return await self._model.feed(tokens, position, logits=logits)

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        await self.gate.wait()
        if self.pause:
            await asyncio.sleep(self.pause)
        self.fed.append((position, len(tokens)))
        return await self._model.feed_rows(tokens, position)

    async def close(self) -> None:
        self.closed = True
        await self._model.close()


@dataclass
class Models:
    """Opens models as a test wants it.

    Attributes:
        opened: all so far.
        refusals: raised by the next attempts, one each.
        failures: raised by the first passes of the next models, one each.
        gate: attempts wait while it is not set.
        conversations: that each model has KV caches for.
    """

    path: Path
    executor: Executor
    conversations: int = 1

    def __post_init__(self) -> None:
        self.opened: list[PacedModel] = []
        self.refusals: list[Exception] = []
        self.failures: list[Exception] = []
        self.attempts = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[Callable[[], Awaitable[OpenModel]]]:
        compute: Compute[Program] = Compute(self.executor)
        compute.open()
        with ModelFile.open(self.path) as file:

            async def opens() -> PacedModel:
                self.attempts += 1
                await self.gate.wait()
                if self.refusals:
                    raise self.refusals.pop(0)
                node = LocalNode(file, compute, n_threads=self.executor.n_threads, conversations=self.conversations)
                await node.open()
                self.opened.append(PacedModel(node))
                self.last.failure = self.failures.pop(0) if self.failures else None
                return self.opened[-1]

            yield opens
        compute.close()

    @property
    def last(self) -> PacedModel:
        return self.opened[-1]


@dataclass
class Serving:
    """A running server."""

    port: int
    service: Service
    models: Models
    readiness: Readiness
    metrics: ServiceMetrics
    tokenizer: Tokenizer
    client: AsyncOpenAI

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.002)

    async def until_ready(self) -> None:
        await self.until(lambda: self.readiness.reason is None)


@asynccontextmanager
async def dialled(
    serving: Serving, said: bytes = b"", sock: socket.socket | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for bytes of a test's own; from a connected socket, where one is given."""
    if sock is None:
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
    else:
        reader, writer = await asyncio.open_connection(sock=sock, limit=2048)
    try:
        writer.write(said)
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def serving(
    path: Path,
    executor: Executor,
    *,
    wait: bool = True,
    queue: int = 64,
    reconnect: float = 0.02,
    recovery: float = 60.0,
    patience: float = 30.0,
    shutdown: float = 10.0,
    request_bytes: int = 1 << 20,
    body_seconds: float = 10.0,
    heartbeat: float = 5.0,
    keep_alive: float = 75.0,
    hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    connections: int = 256,
    connection: type[BoundedConnection] = BoundedConnection,
    sampling: Sampling | None = None,
    refusals: Sequence[DairllmError] = (),
    held: bool = False,
    conversations: int = 1,
) -> AsyncIterator[Serving]:
    """`held`: the model does not open until the test says so."""
    models = Models(path, executor, conversations)
    models.refusals += refusals
    if held:
        models.gate.clear()
    tokenizer = Tokenizer.load(path.with_suffix(".t"))
    readiness, metrics = Readiness("connecting to nobody"), ServiceMetrics()
    async with models.ready() as opens:
        service = Service(
            opens, tokenizer, readiness, metrics, fingerprint=FINGERPRINT, queue=queue, reconnect=reconnect, recovery=recovery,
            shutdown=shutdown, patience=patience,
        )  # fmt: skip
        renderer = tokenizer.chat_renderer()
        served = ServedModel(
            path.stem, tokenizer, renderer, SEQ_LEN, VOCAB, sampling or Sampling(steps=16, temperature=1.0, seed=1), request_bytes
        )
        app = serve_app(served, service, readiness, metrics, body_seconds=body_seconds, heartbeat=heartbeat, cors_origins=cors_origins)
        http = HttpServer(app, "127.0.0.1", 0, connections=connections, connection=connection, keep_alive=keep_alive, hosts=hosts)
        port = await http.start()
        client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)
        running = Serving(port, service, models, readiness, metrics, tokenizer, client)
        await service.start()
        try:
            if wait and not held:
                await running.until_ready()
            yield running
        finally:
            models.gate.set()
            for model in models.opened:
                model.gate.set()
            await service.close()
            await client.close()
            await http.close()
            await asyncio.to_thread(renderer.close)
