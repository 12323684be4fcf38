"""The life of one root's session in a worker that computes a slice of every layer.

The root says who there is, what to compute and with which weights; then, for each batch of rows, a control packet sets off the plan that
follows from the graph: run segments, exchange slices of a pipe, run the next. What the bytes mean is the protocol's business, moving them
the transport's, computing the engine's; here is the order of things, and which memory they share.
"""

import asyncio
import contextlib
import math
import time
from typing import TypeVar

import structlog

from dairllm.cluster.mesh import Mesh
from dairllm.cluster.own_model import OwnModel
from dairllm.cluster.tensor_pass import TensorPass
from dairllm.cluster.weight_check import CHECK_BYTES, WeightCheck
from dairllm.cluster.weight_receiver import WeightReceiver
from dairllm.config import WorkerSettings
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.program import Program
from dairllm.engine.weights import WireWeights
from dairllm.errors import DairllmError, LocalProtocolError, NetworkError, ProtocolError, RemoteProtocolError
from dairllm.graph.plan import ROOT, Exchange, Run
from dairllm.graph.references import NO_MODEL
from dairllm.graph.types import FloatType
from dairllm.net.presence import while_there
from dairllm.net.runner import in_thread
from dairllm.net.transport import Connection
from dairllm.paging.needs import PagingSettings
from dairllm.protocol.dllama.codec import Control
from dairllm.protocol.dllama.events import Event, Go, NetworkReceived, NodeReceived
from dairllm.protocol.dllama.peer import PeerLink
from dairllm.protocol.dllama.worker import Stage, WorkerSession
from dairllm.runtime.compute import Compute
from dairllm.runtime.memory_plan import plan_node, possible_limit
from dairllm.runtime.node_program import NodeProgram, open_program
from dairllm.runtime.pass_clock import PassClock
from dairllm.telemetry import WorkerMetrics
from dairllm.units import format_duration, format_size

__all__ = ["TensorSession"]

log = structlog.get_logger()
T = TypeVar("T")
STAY_SECONDS = 1.0
"""A worker stays so long when another one has gone. Longer than a root looks for who else goes, which then closes the connection."""
GONE_SECONDS = 1.0
"""A session whose root has gone ends so soon, though another worker is waited for: the next root may be there already."""


class TensorSession:
    """One root, from its greeting to its goodbye.

    Args:
        root: its connection; `wire` is attached to it, and has given the greeting.
        mesh: made of the greeting, still to be connected.
        own: the model that this node has on its disk, or None.
    """

    def __init__(
        self,
        root: Connection,
        wire: WorkerSession,
        mesh: Mesh,
        *,
        settings: WorkerSettings,
        compute: Compute[Program],
        metrics: WorkerMetrics,
        own: OwnModel | None = None,
    ) -> None:
        self._root, self._wire, self._mesh, self._own = root, wire, mesh, own
        self._settings, self._compute, self._metrics = settings, compute, metrics
        self._connections: dict[int, Connection] = {ROOT: root}  # by node number, as all below
        self._links: dict[int, WorkerSession | PeerLink] = {ROOT: wire}
        self._counted: dict[int, tuple[int, int]] = {}
        self._finishing = self._token_in_hand = False
        self.rows = 0
        """Computed so far."""

    async def run(self) -> None:
        """Serve the root until it says goodbye, or until `finish`.

        Raises:
            DairllmError: whoever did something wrong: RemoteProtocolError, NetworkError, LimitError, GraphError, EngineError.
        """
        try:
            await self._serve()
        except (NetworkError, RemoteProtocolError):
            if not self._wire.dead:  # another worker's fault, it seems
                await self._stay()
            raise

    async def _serve(self) -> None:
        await self._join()
        received, marker, model = await self._configure()
        try:
            weights, paging = await in_thread("prepare", lambda: self._prepare(received, marker, model))
            own = await self._open(received, weights, paging)
        except (DairllmError, MemoryError) as error:
            await self._refuse(str(error) or "out of memory")
            raise
        try:
            if own.paging is not None:
                mode = own.paging.read_mode
                rate = format_size(mode.bytes_per_second) if mode.rates else "as asked"
                log.info("paging", io_mode=mode.io_mode, readers=mode.readers, read_a_second=rate, threads=self._settings.worker.n_threads)
            self._acknowledge()
            await self._load(received, weights)
            await self._meet(received)
            self._acknowledge()
            await self._infer(own, received.plan)
        finally:
            await own.close()

    def finish(self) -> bool:
        """Serve no further token. True while one is in hand: `run` returns after it; else its task may be cancelled at once."""
        self._finishing = True
        return self._token_in_hand

    @property
    def stage(self) -> str:
        """How far the session is, for people."""
        return Stage.ROWS.value if self._token_in_hand else self._wire.stage.value

    async def _join(self) -> None:
        """The root knows that we are here, we that all others are; then the mesh."""
        self._acknowledge()
        await self._expect(Go, self._settings.deadlines.handshake)
        async with while_there(self._root, GONE_SECONDS):
            await self._mesh.connect(self._root.own_address)

    async def _configure(self) -> tuple[NodeReceived, bytes, bytes]:
        """What to compute; what the root has left in the network configuration; the identity of our own model, as it was told."""
        silence = self._settings.deadlines.configuration
        marker = (await self._expect(NetworkReceived, silence)).marker
        model = NO_MODEL if self._own is None else self._own.identity
        self._root.send([self._wire.acknowledge(model)])
        return await self._expect(NodeReceived, silence), marker, model

    def _prepare(self, received: NodeReceived, marker: bytes, model: bytes) -> tuple[WireWeights | LocatedWeights, PagingSettings | None]:
        """Weights are in our own file, or in memory that the root is to fill. Nothing is allocated before all of it is allowed.

        Those of our own file are paged where they do not fit. Takes a while: not for the event loop.
        """
        network, node = received.network, received.node
        located = None if self._own is None else self._own.weights(received, marker, model)
        weights, packed = (WireWeights(node), None) if located is None else located
        if self._own is not None:
            self._own.file.forget()  # pages of it that are in memory could go at any time, and are counted as held
        settings = self._settings
        comparing = CHECK_BYTES if located is not None and not received.references else 0
        limit, n_threads = possible_limit(settings.limits.memory), settings.worker.n_threads
        plan = plan_node(network, node, weights, limit, packed=packed, n_threads=n_threads, kv_cache=self._kv_cache, beside=comparing)
        here = "" if located is not None else ", or the model on a disk of this worker (worker.model),"
        plan.check(f"A shorter context (--max-seq-len of the root, now {{seq_len}}) or a smaller share (--shares){here} needs less")
        paging = None if plan.budget_blocks is None else PagingSettings.chosen(settings.paging, plan.budget_blocks, plan.needs.block_bytes)
        log.info("memory plan", node=node.node, nodes=network.n_nodes, **plan.summary())
        if paging is None and packed is not None:
            weights = packed
        weights.allocate()
        return weights, paging

    async def _open(self, received: NodeReceived, weights: WireWeights | LocatedWeights, paging: PagingSettings | None) -> NodeProgram:
        model = None if self._own is None or isinstance(weights, WireWeights) else self._own.file
        n_threads, kv_cache = self._settings.worker.n_threads, self._kv_cache
        return await open_program(
            received.network, received.node, weights, self._compute, n_threads=n_threads, kv_cache=kv_cache, model=model, paging=paging
        )

    @property
    def _kv_cache(self) -> FloatType:
        return FloatType[self._settings.worker.kv_cache.upper()]

    async def _load(self, received: NodeReceived, weights: WireWeights | LocatedWeights) -> None:
        """They come into the memory that the kernels will read; or they are here: named by the root, or compared with what it sends."""
        begun, silence = time.perf_counter(), self._settings.deadlines.weights
        intake = WeightReceiver(self._wire, lambda: self._next(silence))
        if self._own is None or isinstance(weights, WireWeights):
            assert isinstance(weights, WireWeights)  # noqa: S101 - for the type checker: weights are located in a model that we have
            came, done = await intake.receive(weights), "weights received"
        elif received.references:
            came, done = await intake.nothing(), "weights are in the own model"
        else:
            came, done = await intake.compare(WeightCheck(self._own.file, weights)), "weights compared with the own model"
        self._metrics.weight_bytes += came
        log.info(done, size=format_size(came), held=format_size(weights.nbytes), took=format_duration(time.perf_counter() - begun))

    async def _meet(self, received: NodeReceived) -> None:
        """Peers may speak once we have acknowledged the weights: their links are attached before, and nothing is waited for between."""
        async with while_there(self._root, GONE_SECONDS):
            settled = await self._mesh.settle()
        for node, connection in settled.items():
            self._links[node] = link = PeerLink(received.network, received.plan, node)
            self._connections[node] = connection
            connection.attach(link)

    async def _infer(self, own: NodeProgram, plan: tuple[Run | Exchange, ...]) -> None:
        exchange, program, clock = self._settings.deadlines.exchange, own.program, PassClock()
        silence = clock.silence if exchange == "auto" else lambda _: exchange
        self._metrics.pass_running = lambda: clock.running_seconds
        overlap = self._settings.worker.overlap and own.paging is None  # in two parts, paged weights would be read twice
        tensor_pass = TensorPass(
            program, plan, own.compute, self._connections, self._links, overlap=overlap, silence=silence, metric=self._metrics
        )
        self._counted = {node: (c.bytes_sent, c.bytes_received) for node, c in self._connections.items()}
        while not self._finishing:
            begun = time.perf_counter()
            event = await self._next()  # an idle chat may last for days: TCP's keep-alive tells when the root is gone
            if not isinstance(event, Control):
                return
            started = time.perf_counter()
            self._metrics.seconds["wait"] += started - begun
            if event.position + event.rows > program.seq_len:
                last = event.position + event.rows - 1
                raise RemoteProtocolError(f"the root asked for positions {event.position} to {last}; the graph has {program.seq_len}")
            self._token_in_hand = True
            for link in self._links.values():
                if isinstance(link, PeerLink):
                    link.begin(event.rows)
            async with while_there(self._root, GONE_SECONDS):
                with clock.running(event.rows):
                    await tensor_pass.run(event.position, event.rows)
            self._token_in_hand = False
            self._count(event.rows, time.perf_counter() - started)
            self._metrics.paging.follow(None if own.paging is None else own.paging.metrics)

    async def _next(self, silence: float = math.inf) -> Event:
        return await self._root.next_event(self._wire, silence)

    async def _expect(self, kind: type[T], silence: float) -> T:
        event = await self._next(silence)
        if not isinstance(event, kind):
            raise LocalProtocolError(f"expected {kind.__name__} from the protocol, found {event}")
        return event

    def _acknowledge(self) -> None:
        self._root.send([self._wire.acknowledge()])

    async def _stay(self) -> None:
        """Leave the root a moment to see who went first: who leaves at once because of another is taken for the one that failed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STAY_SECONDS):
                while not self._root.is_hung_up:  # noqa: ASYNC110 - reading may be paused, and then nothing tells
                    await asyncio.sleep(STAY_SECONDS / 50)

    async def _refuse(self, reason: str) -> None:
        """Tell a root of ours why, and stay until it leaves: the other workers would miss us in the mesh that they still make."""
        told = self._wire.refuse(reason)
        if told:
            with contextlib.suppress(NetworkError, ProtocolError):  # it may also say more than anybody will hear
                self._root.send([told])
                await self._next(self._settings.deadlines.handshake)

    def _count(self, rows: int, seconds: float) -> None:
        self.rows += rows
        metrics = self._metrics
        metrics.rows += rows
        metrics.passes += 1
        metrics.pass_seconds.observe(seconds)
        for node, connection in self._connections.items():
            kind = "root" if node == ROOT else "peer"
            sent, received = self._counted[node]
            metrics.sent[kind] += connection.bytes_sent - sent
            metrics.received[kind] += connection.bytes_received - received
            self._counted[node] = connection.bytes_sent, connection.bytes_received
