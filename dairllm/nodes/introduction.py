"""How a root and its workers come to know each other:

    dial all > greet all > go > network, and who is of our kind > node > weights

A worker of our kind says which model it has on a disk of its own. Where that is this one, it is told which parts of it are its weights, and
none is sent.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from dairllm.errors import ConfigError, DairllmError, NetworkError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import build_node
from dairllm.graph.model import ModelSpec
from dairllm.graph.references import NO_MODEL, weight_references
from dairllm.graph.types import FloatType, NetworkConfig
from dairllm.net.runner import in_thread
from dairllm.nodes.remote_worker import RemoteWorker
from dairllm.nodes.weight_stream import WeightStream
from dairllm.protocol.dllama.codec import Greeting, Peer
from dairllm.protocol.dllama.root import Stage

__all__ = ["Introduction", "Progress"]

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


class Introduction:
    """`lead` it once.

    Args:
        model: open; the caller's.
        workers: in the order of their node numbers, from 1 on.
        identity: the model's (dairllm.formats.digest).
        logits_rows: outputs of each node's part of the classifier.
    """

    def __init__(
        self, model: ModelFile, network: NetworkConfig, workers: Sequence[RemoteWorker], identity: bytes, logits_rows: int
    ) -> None:
        self._model, self._network, self._workers = model, network, workers
        self._identity, self._logits_rows = identity, logits_rows

    async def lead(self, progress: Progress | None) -> None:
        """From dialling to the last weight. Raises what `Cluster.open` says of workers."""
        await self._dial()
        await self._greet()
        await self._configure()
        await self._send_weights(progress)

    async def _dial(self) -> None:
        """Connect to all, or to none: until all are there, nothing has been said to anybody."""
        results = await asyncio.gather(*(worker.dial() for worker in self._workers), return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        if not failed:
            await asyncio.sleep(AFTER_DIALLING)
            failed = [
                NetworkError(f"{worker.name} closed the connection at once: it serves another root, or is no worker")
                for worker in self._workers
                if worker.link.has_ended
            ]
        for error in failed:
            if not isinstance(error, DairllmError):
                raise error
        if failed:
            raise NetworkError("; ".join(map(str, failed)))

    async def _greet(self) -> None:
        """Tell each worker of the others, and when all have answered, all to make their mesh."""
        peers = [Peer(worker.address.host, worker.address.port) for worker in self._workers]

        async def greet(worker: RemoteWorker) -> None:
            index = worker.node - 1
            await worker.tell(worker.wire.greet(Greeting(len(peers), index, (*peers[:index], *peers[index + 1 :]))))

        await self._all(greet)
        for worker in self._workers:
            worker.link.send([worker.wire.go()])

    async def _configure(self) -> None:
        async def network(worker: RemoteWorker) -> None:
            acknowledged = await worker.tell(worker.wire.configure_network(self._network))
            worker.kind = "dairllm" if acknowledged.ours else "dllama"
            worker.has_model = acknowledged.model == self._identity
            if not worker.has_model:
                has = "none" if acknowledged.model == NO_MODEL else "another"
                log.info("weights are to be sent", worker=str(worker.address), kind=worker.kind, own_model=has)

        async def node(worker: RemoteWorker) -> None:
            spec = self._model.spec
            graph = build_node(spec, self._network, worker.node, worker.share)
            references = weight_references(spec, worker.share, graph) if worker.has_model else ()
            await worker.tell(worker.wire.configure_node(graph, references))

        await self._all(network)
        obstacle = _dllama_obstacle(self._model.spec)
        foreign = [worker for worker in self._workers if worker.kind == "dllama"]
        if obstacle and foreign:
            names = ", ".join(worker.name for worker in foreign)
            raise ConfigError(f"{names}: of distributed-llama, whose workers {obstacle}; or run `dairllm worker` there")
        await self._all(node)

    async def _send_weights(self, progress: Progress | None) -> None:
        """Each worker at its own pace; to those that have the model, nothing but that this is all."""
        streams = {
            worker.node: await in_thread("weights", partial(WeightStream, self._model, worker.share, self._logits_rows))
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

        await self._all(send)

    async def _all(self, step: Callable[[RemoteWorker], Awaitable[None]]) -> None:
        """The same with every worker at once. The first that fails ends the others' waits, and is named."""

        async def named(worker: RemoteWorker) -> None:
            try:
                await step(worker)
            except (NetworkError, RemoteProtocolError) as error:
                hint = _HINTS.get(worker.wire.stage, "")
                raise type(error)(f"{worker.name}, {worker.wire.stage.value}: {error}{hint}") from None

        tasks = [asyncio.ensure_future(named(worker)) for worker in self._workers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _dllama_obstacle(spec: ModelSpec) -> str | None:
    """Why workers of distributed-llama cannot compute a model, and what to do."""
    if spec.weight_type not in (FloatType.F32, FloatType.Q40):
        known = f"know F32 and Q40 weights alone and would end, given {spec.weight_type.name.lower()}"
    elif spec.n_experts and spec.weight_type != FloatType.Q40:
        known = "know experts with Q40 weights alone and would end"
    else:
        return None
    return f"{known}: make the model again with `dairllm convert SOURCE OUT.m --weights q40`"
