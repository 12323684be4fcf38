"""The root of a cluster: shares a model out to workers, of our kind or of distributed-llama's, computes a share itself, continues ids.

    checks > handshake (handshake.py) > pass after pass > goodbye

What can be known to fail is found before anybody is dialled: a worker of distributed-llama does not survive a root that goes away before it
has all its weights. Where it goes wrong nevertheless, those that can still be reached are led to the end of an empty session.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from dairllm.cluster.cluster_history import ClusterHistory
from dairllm.cluster.first_to_leave import first_to_leave
from dairllm.cluster.handshake import Handshake, Progress
from dairllm.cluster.remote_worker import FAREWELL_SECONDS, RemoteWorker
from dairllm.cluster.tensor_pass import TensorPass
from dairllm.config import Keepalive, RootDeadlines, WorkerAddress
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.program import Program
from dairllm.errors import ConfigError, DairllmError, EngineError, NetworkError, RemoteProtocolError
from dairllm.formats.digest import WORTH_KEEPING, model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_network, build_node
from dairllm.graph.plan import token_plan
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import ShareSize, deal_shares, nearly_equal_sizes
from dairllm.graph.types import FloatType
from dairllm.net.runner import in_thread
from dairllm.paging.needs import PagingSettings
from dairllm.paging.status import PagingStatus
from dairllm.protocol.dllama.codec import Control
from dairllm.protocol.dllama.root import RootSession, Stage
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import default_sync
from dairllm.runtime.node_program import NodeProgram, open_program
from dairllm.runtime.node_status import NodeStatus
from dairllm.runtime.pass_clock import PassClock
from dairllm.runtime.prepared_share import find_share
from dairllm.units import format_size

__all__ = ["Cluster"]

log = structlog.get_logger()


@dataclass(slots=True)
class _Seconds:
    """Where a root's time went."""

    seconds: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "exchange": 0.0})


class Cluster:
    """A model over several nodes: `open` it, `feed` it, `close` it. After an error of `open` or `feed` it can only be closed.

    Args:
        model: open; it stays the caller's and must stay open.
        workers: in the order of their node numbers, from 1 on.
        compute: open; the caller's.
        n_threads: of its executor.
        sizes: of each node's share, the root's first; nearly equal ones if None.
        sync: what crosses the wire; `default_sync` if None.
        kv_cache: F32, F16 or Q80; the root's own choice.
        paging: room for part of the root's weights; all are used in place if None.
        overlap: compute large batches in two parts, one on the wire while the other is computed. Not where weights are paged: they would be
            read twice.
        clock: of its passes, for who wants to know how long the one in hand has been running.
        history: what earlier openings of the same cluster found out.

    Raises:
        ConfigError: no workers, or another number of sizes than of nodes.
        GraphError: the model cannot be shared so; names the nearest way.
    """

    def __init__(
        self,
        model: ModelFile,
        workers: Sequence[WorkerAddress],
        compute: Compute[Program],
        *,
        n_threads: int,
        sizes: Sequence[ShareSize] | None = None,
        sync: FloatType | None = None,
        kv_cache: FloatType = FloatType.F32,
        paging: PagingSettings | None = None,
        overlap: bool = True,
        deadlines: RootDeadlines | None = None,
        keepalive: Keepalive | None = None,
        clock: PassClock | None = None,
        history: ClusterHistory | None = None,
    ) -> None:
        n_nodes = len(workers) + 1
        if n_nodes < 2:
            raise ConfigError("a cluster needs one worker at least")
        if sizes is not None and len(sizes) != n_nodes:
            raise ConfigError(f"expected {n_nodes} shares, one for the root and one for each worker, found {len(sizes)}")
        spec = model.spec
        self.seq_len, self.vocab_size = spec.seq_len, spec.vocab_size
        self._model, self._compute, self._n_threads, self._overlap = model, compute, n_threads, overlap
        self._kv_cache, self._paging = kv_cache, paging
        self._own: NodeProgram | None = None
        self._deadlines, self._keepalive = deadlines or RootDeadlines(), keepalive or Keepalive()
        self._clock, self._history = clock or PassClock(), history or ClusterHistory()
        shares = deal_shares(spec, nearly_equal_sizes(spec, n_nodes) if sizes is None else sizes)
        self._network = build_network(spec, shares, default_sync(spec.weight_type) if sync is None else sync)
        self._node = build_node(spec, self._network, 0, shares[0])
        self._plan = token_plan(self._network, self._node)
        self._share = shares[0]
        self._logits_rows = self._network.pipes[LOGITS_PIPE].size.x // n_nodes
        self.n_batches = self._network.n_batches
        self._workers = [
            RemoteWorker(address, shares[node], RootSession(self._network, self._plan, node), self._deadlines, self._keepalive)
            for node, address in enumerate(workers, 1)
        ]
        self._metric = _Seconds()
        self._passes: tuple[TensorPass, NDArray[np.float32]] | None = None
        """What makes them, and the pipe of their tokens."""
        self._in_hand: asyncio.Task[None] | None = None
        self._usable = False

    @property
    def nodes(self) -> tuple[NodeStatus, ...]:
        """What each node has, and what was exchanged with it."""
        reports = [worker.report for worker in self._workers]
        sums = [sum(getattr(report, name) for report in reports) for name in ("bytes_sent", "bytes_received", "weight_bytes_sent")]
        own = self._share
        return (NodeStatus(0, "", "dairllm", own.n_heads, own.n_kv_heads, own.ffn.size, *sums), *reports)

    @property
    def kv_caches(self) -> None:
        """Nodes of a cluster have KV caches for one conversation each."""
        return None

    @property
    def paging(self) -> PagingStatus | None:
        """None where nothing is paged."""
        return None if self._own is None else self._own.paging

    @property
    def trouble(self) -> str | None:
        """Why the cluster cannot be used any more, as far as that shows between two passes; None while it can."""
        gone = [worker.name for worker in self._workers if worker.link.is_hung_up]
        return f"{', '.join(gone)}: the connection was closed between two passes" if gone else None

    async def open(self, progress: Progress | None = None) -> None:
        """Connect, configure, send the weights. Where that fails, nothing of it is held any more.

        Raises:
            NetworkError: a worker cannot be reached, or went away; names it and the stage.
            RemoteProtocolError: a worker said something that no worker says.
            RefusedError: a worker has no room for its share, or cannot compute it; says what would do.
            ConfigError: a worker of distributed-llama cannot compute this model; says how to convert it.
            EngineError: the root's own share cannot be computed.
        """
        handshake = Handshake(self._model, self._network, self._workers, self._logits_rows, self._history)
        try:
            await self._open(handshake, progress)
        except BaseException:
            try:
                await self._leave()
            finally:
                await self._release()
            raise
        self._usable = True
        log.info("cluster ready", nodes=len(self._workers) + 1, workers=[worker.description for worker in self._workers])

    async def _open(self, handshake: Handshake, progress: Progress | None) -> None:
        n_threads, kv_cache, model = self._n_threads, self._kv_cache, self._model
        await handshake.find_absent()
        self._identity = await in_thread("digests", lambda: self._identify(progress))
        weights = await in_thread("weights", self._locate)
        self._own = own = await open_program(
            self._network, self._node, weights, self._compute, n_threads=n_threads, kv_cache=kv_cache, model=model, paging=self._paging
        )
        await handshake.lead(self._identity, progress)
        connections = {worker.node: worker.link for worker in self._workers}
        links = {worker.node: worker.wire for worker in self._workers}
        overlap = self._overlap and self._paging is None
        exchange = self._deadlines.exchange
        silence = self._clock.silence if exchange == "auto" else lambda _: exchange
        self._clock.forget()
        program, compute = own.program, own.compute
        tensor_pass = TensorPass(program, self._plan, compute, connections, links, overlap=overlap, silence=silence, metric=self._metric)
        self._passes = tensor_pass, program.values(TOKEN_PIPE)

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        """Compute up to `n_batches` tokens at position, position + 1, ...; the logits after the last of them, float32 [vocab], valid until
        the next call, if asked for.

        A call that is cancelled leaves the pass to go on; `close` waits for its end.

        Raises:
            EngineError: tokens or positions that the model does not have, or an earlier call failed.
            NetworkError: a worker is gone; names it.
            RemoteProtocolError: a worker said something wrong.
        """
        program = await self._feed(tokens, position, len(tokens) - 1 if logits else len(tokens))
        return self._logits(program, len(tokens) - 1) if logits else None

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        """The logits after each of the tokens, each valid until the next is taken. Raises as `feed`."""
        program = await self._feed(tokens, position, 0)
        return (self._logits(program, row) for row in range(len(tokens)))

    def _logits(self, program: Program, row: int) -> NDArray[np.float32]:
        return program.row(LOGITS_PIPE, row)[: self.vocab_size]

    async def _feed(self, tokens: Sequence[int], position: int, first_final: int) -> Program:
        """Compute a batch; its logits from row `first_final` on are in the program's pipe."""
        rows = len(tokens)
        if not 1 <= rows <= self.n_batches or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise EngineError(f"expected 1 to {self.n_batches} token ids in 0..{self.vocab_size - 1}")
        if position < 0 or position + rows > self.seq_len:
            raise EngineError(f"positions {position} to {position + rows - 1}: the context has room for {self.seq_len}")
        if self._passes is None or not self._usable or self._in_hand is not None:
            raise EngineError("the cluster is computing something else" if self._usable and self._passes else "the cluster is not open")
        tensor_pass, pipe = self._passes
        pipe[:rows, 0] = tokens
        self._in_hand = asyncio.ensure_future(self._run(tensor_pass, position, rows, first_final))
        self._in_hand.add_done_callback(self._put_down)
        await asyncio.shield(self._in_hand)
        return tensor_pass.program

    async def close(self) -> None:
        """Finish the pass in hand, say goodbye, end the connections."""
        if self._in_hand is not None:
            await asyncio.wait({self._in_hand}, timeout=self._deadlines.shutdown)
            if self._in_hand is not None:
                self._in_hand.cancel()
                await asyncio.wait({self._in_hand})
                self._usable = False
        for worker in self._workers:
            if self._usable and worker.is_connected:
                worker.link.send([worker.wire.stop()])
        try:
            await self._hang_up()
        finally:
            await self._release()

    # The stages of `open`.

    def _identify(self, progress: Progress | None) -> bytes:
        """Which model it is: known from its digests, or found out by reading it. Before anybody waits for us."""

        def tell(label: str, done: int, total: int) -> None:
            if not done and total >= WORTH_KEEPING:
                log.info("reading the model, to know which it is", model=str(self._model.path), size=format_size(total))
            if progress is not None:
                progress(f"reading {label}", done, total)

        return model_digests(self._model, tell).identity

    def _locate(self) -> LocatedWeights:
        """The root's own share."""
        references = weight_references(self._model.spec, self._share, self._node)
        prepared = find_share(self._model, references, lambda: self._identity, self._history.told)
        weights = LocatedWeights(self._model, self._node, references, prepared, packed=self._paging is None)
        weights.allocate()
        return weights

    # Passes.

    async def _run(self, tensor_pass: TensorPass, position: int, rows: int, first_final: int) -> None:
        self._usable = False
        control = Control(position, rows)
        try:
            with self._clock.running(rows):
                for worker in self._workers:
                    worker.link.send([worker.wire.control(control)])
                await tensor_pass.run(position, rows, first_final)
        except (NetworkError, RemoteProtocolError) as error:
            raise type(error)(await self._blame(error, tensor_pass.awaited, position)) from None
        self._usable = True

    async def _blame(self, error: DairllmError, awaited: int | None, position: int) -> str:
        """What to say of a pass that failed: a worker that lost another one goes too."""
        culprit = await first_to_leave(self._workers, awaited)
        problem = str(error)
        if culprit is None:  # all are there still: it said something wrong
            culprit = next(worker for worker in self._workers if worker.node == awaited)
        elif culprit.node != awaited:
            problem = culprit.link.ending or problem
        self._history.missed([culprit.address])
        return f"{culprit.name}, {Stage.READY.value}, position {position}: {problem}"

    def _put_down(self, task: asyncio.Task[None]) -> None:
        self._in_hand = None
        if not task.cancelled():
            task.exception()  # who waits is told; where nobody does, `close` finds the cluster unusable

    # Within.

    async def _leave(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await asyncio.gather(*(worker.wind_up() for worker in self._workers))
        for worker in self._workers:
            worker.say_goodbye()
        await self._hang_up()

    async def _release(self) -> None:
        """Give back what the root holds for its own share. Nothing is being computed."""
        own, self._own, self._passes = self._own, None, None
        if own is not None:
            await own.close()

    async def _hang_up(self) -> None:
        self._usable = False
        await asyncio.gather(*(worker.hang_up(FAREWELL_SECONDS) for worker in self._workers))
