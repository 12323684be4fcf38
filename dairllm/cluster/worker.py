"""A worker: a service that listens, serves root after root, one at a time, and survives whoever else comes by.

Every connection is a stranger until it has said what it wants; strangers cost a deadline and a log line. The first that introduces itself
as a root is served (``cluster/tensor_session.py`` is its story). Meanwhile connections may only be those of other workers,
which the session's mesh recognises; all others are closed at once. Whatever goes wrong in a session ends that session alone:
its memory is freed, one log line says what was expected and what was found, and the next root is welcome.
"""

import asyncio
import contextlib

import structlog

from dairllm import machine
from dairllm.cluster.mesh import Mesh
from dairllm.cluster.own_model import OwnModel
from dairllm.cluster.tensor_session import TensorSession
from dairllm.config import WorkerSettings
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import DairllmError, NetworkError, RemoteProtocolError
from dairllm.net.addresses import listening_socket
from dairllm.net.listener import Listener
from dairllm.net.runner import in_thread
from dairllm.net.transport import Connection
from dairllm.protocol.dllama.codec import Greeting
from dairllm.protocol.dllama.limits import Limits
from dairllm.protocol.dllama.worker import WorkerSession
from dairllm.runtime.compute import Compute
from dairllm.telemetry import WorkerMetrics
from dairllm.units import format_duration

__all__ = ["Worker"]

log = structlog.get_logger()
CLOSING_SECONDS = 1.0
"""For what was said last to leave."""


class Worker:
    """From `start` to `close`.

    Args:
        executor: started, with as many threads as the settings say.
        metrics: counts what happens.
        own: the model that this node has on its disk, or None. It stays the caller's.
    """

    def __init__(self, settings: WorkerSettings, executor: Executor, metrics: WorkerMetrics, own: OwnModel | None = None) -> None:
        self._settings, self._metrics, self._own = settings, metrics, own
        self._compute: Compute[Program] = Compute(executor)
        self._limits = Limits(max_workers=settings.limits.nodes - 1)
        self._server: Listener | None = None
        self._strangers: set[asyncio.Task[None]] = set()
        self._root: Connection | None = None
        self._serving: asyncio.Task[None] | None = None
        self._mesh: Mesh | None = None
        self._session: TensorSession | None = None

    async def start(self) -> int:
        """Listen for roots; returns the port.

        Raises:
            NetworkError: the address cannot be listened on.
        """
        settings = self._settings
        self._compute.open()
        sock = listening_socket(settings.worker.host, settings.worker.port)
        self._server = Listener(sock, lambda: Connection(settings.keepalive, self._opened))
        port: int = sock.getsockname()[1]
        log.info("listening", host=settings.worker.host, port=port)
        return port

    async def close(self) -> None:
        """Accept nobody more, finish the token in hand, say goodbye."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._strangers]
        for task in tasks:
            task.cancel()
        if (serving := self._serving) is not None:
            if self._session is not None and self._session.finish():
                await asyncio.wait({serving}, timeout=self._settings.deadlines.shutdown)
            serving.cancel()
            tasks.append(serving)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        self._compute.close()

    async def ended(self) -> None:
        """Wait until it can compute nothing any more, which no root would mend.

        Raises:
            EngineError: it cannot.
        """
        await self._compute.ended()

    def _opened(self, connection: Connection) -> None:
        """Somebody is at the door."""
        if self._is_busy():
            reason = self._mesh.offer(connection) if self._mesh is not None else "another root is being served"
            if reason is not None:
                self._refuse(connection, "busy", reason)
        elif len(self._strangers) >= self._settings.limits.strangers:
            self._refuse(connection, "crowd", f"{len(self._strangers)} others have not said yet what they want (limits.strangers)")
        else:
            wire = WorkerSession(self._limits)
            connection.attach(wire)  # now, since its first bytes may come before the task runs
            task = asyncio.create_task(self._welcome(connection, wire), name=f"stranger {connection.peer}")
            self._strangers.add(task)
            task.add_done_callback(self._strangers.discard)

    def _is_busy(self) -> bool:
        """Whether a root is being served. One that has left is only being seen off: whoever restarts a root need not come twice."""
        return self._root is not None and not self._root.has_ended

    def _refuse(self, connection: Connection, kind: str, reason: str) -> None:
        connection.abort()
        self._metrics.refused[kind] += 1
        log.info("connection refused", peer=connection.peer, kind=kind, reason=reason)

    async def _welcome(self, connection: Connection, wire: WorkerSession) -> None:
        """Hear what a stranger wants; serve a root."""
        patience = self._settings.deadlines.handshake
        try:
            async with asyncio.timeout(patience):
                greeting = await connection.next_event(wire)
        except TimeoutError:
            self._refuse(connection, "silent", f"it did not introduce itself within {format_duration(patience)}")
        except (RemoteProtocolError, NetworkError) as error:
            self._refuse(connection, "stranger", str(error))
        except asyncio.CancelledError:
            connection.abort()
            raise
        else:
            while self._serving is not None and not self._is_busy():
                await asyncio.wait({self._serving})
            if self._serving is not None:
                self._refuse(connection, "busy", "another root is being served")
            elif isinstance(greeting, Greeting):
                await self._serve(connection, wire, greeting)
        finally:
            wire.close()

    async def _serve(self, root: Connection, wire: WorkerSession, greeting: Greeting) -> None:
        """One session, however it ends."""
        outcome = "bug"
        try:
            self._root, self._serving = root, (task := asyncio.current_task())
            assert task is not None  # noqa: S101 - for the type checker: we are in one
            self._strangers.discard(task)
            self._metrics.sessions_running = 1
            outcome = await self._run(root, wire, greeting)
        finally:
            self._metrics.sessions[outcome] += 1
            await self._dismiss(root, in_peace=outcome == "finished")

    async def _run(self, root: Connection, wire: WorkerSession, greeting: Greeting) -> str:
        """Returns how the session ended, for the metrics: finished, stopped, or by which kind of error."""
        try:
            log.info("root connected", peer=root.peer, node=greeting.node, nodes=greeting.n_workers + 1)
            self._mesh = await Mesh.of(greeting, self._settings.keepalive, self._settings.deadlines.mesh, self._refuse)
            self._session = TensorSession(
                root, wire, self._mesh, settings=self._settings, compute=self._compute, metrics=self._metrics, own=self._own
            )
            await self._session.run()
            log.info("session finished", peer=root.peer, rows=self._session.rows)
            return "finished"
        except asyncio.CancelledError:
            log.info("session stopped", peer=root.peer, stage=self._stage(wire))
            return "stopped"
        except (DairllmError, MemoryError) as error:
            kind = type(error).__name__
            log.warning("session failed", peer=root.peer, stage=self._stage(wire), kind=kind, error=str(error) or "out of memory")
            return kind
        except Exception:
            log.exception("session failed by a defect of this program", peer=root.peer, stage=self._stage(wire))
            return "bug"

    def _stage(self, wire: WorkerSession) -> str:
        return wire.stage.value if self._session is None else self._session.stage

    async def _dismiss(self, root: Connection, *, in_peace: bool) -> None:
        """End the connections of a session and forget it, and with it its memory. Whatever fails here, the next root is welcome."""
        try:
            if in_peace:
                root.close()
            else:
                root.abort()
            if self._mesh is not None:
                (self._mesh.close if in_peace else self._mesh.abort)()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await root.closed()
            root.abort()
        finally:
            self._mesh = self._session = None
            self._metrics.sessions_running = 0
            try:  # before the next root's plan counts what this process holds
                await in_thread("give back", machine.give_back_memory)
            finally:
                self._root = self._serving = None
