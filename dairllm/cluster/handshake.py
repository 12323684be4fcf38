"""How a root and its workers come to know each other:

    dial all > greet all > go > network, and who is of our kind > node > weights

Workers that were missing the last time are dialled first, before the root's own share is opened, and greeted first. Until they have
answered, nobody else is called: a worker that is switched off over night costs the others nothing, and the root little.

A worker of our kind says which model it has on a disk of its own. Where that is this one, it is told which parts of it are its weights, and
none is sent.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from dairllm.cluster.cluster_history import ClusterHistory
from dairllm.cluster.first_to_leave import first_to_leave
from dairllm.cluster.remote_worker import RemoteWorker
from dairllm.cluster.weight_sender import WeightSender
from dairllm.errors import ConfigError, DairllmError, NetworkError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import build_node
from dairllm.graph.model import ModelSpec
from dairllm.graph.references import NO_MODEL, weight_references
from dairllm.graph.types import FloatType, NetworkConfig
from dairllm.net.runner import in_thread
from dairllm.protocol.dllama.codec import Greeting, Peer
from dairllm.protocol.dllama.root import Stage

__all__ = ["Handshake", "Progress"]

log = structlog.get_logger()

Progress = Callable[[str, int, int], None]
"""Told what is at hand, bytes of it done, bytes in all: the model is read, where its digests are not known yet; weights are sent."""

AFTER_DIALLING = 0.05
"""Seconds in which a worker that is taken closes a new connection. Before they are over nobody has been greeted."""

_HINTS = {
    Stage.GREETING: "; it serves another root, or is no worker",
    Stage.GO: "; can the workers reach each other by the names that the root knows them by?",
    Stage.NETWORK: "; can the workers reach each other by the names that the root knows them by?",
    Stage.NODE: "; its log says why",
    Stage.WEIGHTS: "; its log says why",
}


class Handshake:
    """`find_absent`, then `lead`, each once.

    Args:
        model: open; the caller's.
        workers: in the order of their node numbers, from 1 on.
        logits_rows: outputs of each node's part of the classifier.
        history: whom earlier introductions missed; told whom this one does.
    """

    def __init__(
        self,
        model: ModelFile,
        network: NetworkConfig,
        workers: Sequence[RemoteWorker],
        logits_rows: int,
        history: ClusterHistory,
    ) -> None:
        self._model, self._network, self._workers = model, network, workers
        self._logits_rows, self._history = logits_rows, history
        self._absent = [worker for worker in workers if worker.address in history.absent]

    async def find_absent(self) -> None:
        """Dial those that were missing the last time. Raises what `Cluster.open` says of workers."""
        await self._dial(self._absent)

    async def lead(self, identity: bytes, progress: Progress | None) -> None:
        """From dialling to the last weight. Raises what `Cluster.open` says of workers.

        Args:
            identity: the model's (dairllm.formats.digest).
        """
        for some in (self._absent, [worker for worker in self._workers if worker not in self._absent]):
            await self._dial([worker for worker in some if not worker.is_connected])
            await self._greet(some)
        for worker in self._workers:
            worker.link.send([worker.wire.go()])
        await self._configure(identity)
        await self._send_weights(progress)
        self._history.complete()

    async def _dial(self, workers: Sequence[RemoteWorker]) -> None:
        """Connect to these, or to none: until all of them are there, nothing has been said to any."""
        results = await asyncio.gather(*(worker.dial() for worker in workers), return_exceptions=True)
        failed = {worker: result for worker, result in zip(workers, results, strict=True) if isinstance(result, BaseException)}
        if workers and not failed:
            await asyncio.sleep(AFTER_DIALLING)
            failed = {
                worker: NetworkError(f"{worker.name} closed the connection at once: it serves another root, or is no worker")
                for worker in workers
                if worker.link.has_ended
            }
        for error in failed.values():
            if not isinstance(error, DairllmError):
                raise error
        if failed:
            self._history.missed(worker.address for worker in failed)
            raise NetworkError("; ".join(map(str, failed.values())))

    async def _greet(self, workers: Sequence[RemoteWorker]) -> None:
        """Tell each of these of all others, and hear that it is there."""
        peers = [Peer(worker.address.host, worker.address.port) for worker in self._workers]

        async def greet(worker: RemoteWorker) -> None:
            index = worker.node - 1
            await worker.tell(worker.wire.greet(Greeting(len(peers), index, (*peers[:index], *peers[index + 1 :]))))

        await self._all(greet, workers)

    async def _configure(self, identity: bytes) -> None:
        async def network(worker: RemoteWorker) -> None:
            acknowledged = await worker.tell(worker.wire.configure_network(self._network))
            worker.kind = "dairllm" if acknowledged.ours else "dllama"
            worker.has_model = acknowledged.model == identity
            if not worker.has_model:
                has = "none" if acknowledged.model == NO_MODEL else "another"
                log.info("weights are to be sent", worker=str(worker.address), kind=worker.kind, own_model=has)

        async def node(worker: RemoteWorker) -> None:
            spec = self._model.spec
            graph = build_node(spec, self._network, worker.node, worker.share)
            references = weight_references(spec, worker.share, graph) if worker.has_model else ()
            await worker.tell(worker.wire.configure_node(graph, references))

        await self._all(network, self._workers)
        obstacle = _dllama_obstacle(self._model.spec)
        foreign = [worker for worker in self._workers if worker.kind == "dllama"]
        if obstacle and foreign:
            names = ", ".join(worker.name for worker in foreign)
            raise ConfigError(f"{names}: of distributed-llama, whose workers {obstacle}; or run `dairllm worker` there")
        await self._all(node, self._workers)

    async def _send_weights(self, progress: Progress | None) -> None:
        """Each worker at its own pace; to those that have the model, nothing but that this is all."""
        streams = {
            worker.node: await in_thread("weights", partial(WeightSender, self._model, worker.share, self._logits_rows))
            for worker in self._workers
            if not worker.has_model
        }
        total = sum(stream.nbytes for stream in streams.values())

        async def send(worker: RemoteWorker) -> None:
            stream = streams.get(worker.node)

            def tell() -> None:
                if progress is not None and stream is not None:
                    progress(f"{worker.address}, {stream.at_hand}", sum(w.weight_bytes for w in self._workers), total)

            if stream is not None:
                await worker.send_weights(stream, tell)
            await worker.tell(worker.wire.end_weights())

        await self._all(send, self._workers)

    async def _all(self, step: Callable[[RemoteWorker], Awaitable[None]], workers: Sequence[RemoteWorker]) -> None:
        """The same with these workers at once. The first that fails ends the others' waits.

        Whoever went first is named, which need not be the one that was heard of first.
        """

        async def named(worker: RemoteWorker) -> None:
            try:
                await step(worker)
            except (NetworkError, RemoteProtocolError) as error:
                raise type(error)(await self._blame(worker, error)) from None

        tasks = [asyncio.ensure_future(named(worker)) for worker in workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _blame(self, worker: RemoteWorker, error: DairllmError) -> str:
        """What to say of an error that was met with a worker."""
        culprit, problem = worker, str(error)
        if worker.ended_at < math.inf:
            culprit = await first_to_leave(self._workers, worker.node) or worker
            problem = problem if culprit is worker else culprit.link.ending or problem
        self._history.missed([culprit.address])
        stage = culprit.wire.stage
        return f"{culprit.name}, {stage.value}: {problem}{_HINTS.get(stage, '')}"


def _dllama_obstacle(spec: ModelSpec) -> str | None:
    """Why workers of distributed-llama cannot compute a model, and what to do."""
    if spec.weight_type not in (FloatType.F32, FloatType.Q40):
        known = f"know F32 and Q40 weights alone and would end, given {spec.weight_type.name.lower()}"
    elif spec.n_experts and spec.weight_type != FloatType.Q40:
        known = "know experts with Q40 weights alone and would end"
    else:
        return None
    return f"{known}: make the model again with `dairllm convert SOURCE OUT.m --weights q40`"
