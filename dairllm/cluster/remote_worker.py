"""One worker as its root knows it: dial it, tell it things and hear its answers, send it its weights, leave it alive."""

import asyncio
import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from dairllm.cluster.weight_sender import PIECE_BYTES, WeightSender
from dairllm.config import Keepalive, RootDeadlines, WorkerAddress
from dairllm.errors import NetworkError, RefusedError, RemoteProtocolError
from dairllm.graph.slicing import Share
from dairllm.net.addresses import resolve
from dairllm.net.dial import dial
from dairllm.net.runner import in_thread
from dairllm.net.transport import Connection
from dairllm.protocol.dllama.events import Acknowledged, Refused
from dairllm.protocol.dllama.root import RootSession, Stage
from dairllm.runtime.node_status import NodeStatus
from dairllm.units import format_duration

__all__ = ["FAREWELL_SECONDS", "RemoteWorker"]

FAREWELL_SECONDS = 5.0
"""For all answers of a session that is given up."""


class RemoteWorker:
    """From `dial` to `hang_up` or to the end of its `link`.

    Args:
        share: what it computes.
        wire: the protocol's side of it.
    """

    def __init__(self, address: WorkerAddress, share: Share, wire: RootSession, deadlines: RootDeadlines, keepalive: Keepalive) -> None:
        self.node, self.address, self.share, self.wire = wire.node, address, share, wire
        self._deadlines, self._keepalive = deadlines, keepalive
        self._connection: Connection | None = None
        self.kind: Literal["dairllm", "dllama"] = "dllama"
        self.has_model = False
        """Whether it has the root's model on a disk of its own."""
        self.weight_bytes = 0
        """Of weights sent so far, headers included."""
        self._weight_left = 0  # what the weight that was sent last still lacks

    @property
    def name(self) -> str:
        return f"worker {self.address} (node {self.node})"

    @property
    def description(self) -> str:
        """For the log."""
        return f"{self.address} ({self.kind}{', with the model' if self.has_model else ''})"

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.has_ended

    @property
    def ended_at(self) -> float:
        """The loop's time when it had said its last; infinite while it is there, and where it was not dialled."""
        return math.inf if self._connection is None else self._connection.ended_at

    @property
    def link(self) -> Connection:
        """Its connection.

        Raises:
            NetworkError: there is none.
        """
        if self._connection is None:
            raise NetworkError(f"{self.name} has not been dialled")
        return self._connection

    @property
    def report(self) -> NodeStatus:
        share, link = self.share, self._connection
        sent, received = (0, 0) if link is None else (link.bytes_sent - self.weight_bytes, link.bytes_received)
        sizes = share.n_heads, share.n_kv_heads, share.ffn.size
        return NodeStatus(self.node, str(self.address), self.kind, *sizes, sent, received, self.weight_bytes)

    async def dial(self) -> None:
        """Connect; nothing is said yet.

        Raises:
            NetworkError: it cannot be reached; says what to do.
        """
        patience = self._deadlines.connect
        problem = "it has no address"
        try:
            async with asyncio.timeout(patience):
                for found in await resolve(self.address.host):
                    try:
                        self._connection = await dial(found, self.address.port, self._keepalive, patience)
                    except NetworkError as error:
                        problem = str(error)
                    else:
                        self._connection.attach(self.wire)
                        return
        except TimeoutError:
            problem = f"no answer within {format_duration(patience)}"
        except NetworkError as error:
            problem = str(error)
        raise NetworkError(f"{self.name} cannot be reached: {problem}; is `dairllm worker --port {self.address.port}` running there?")

    async def tell(self, data: bytes) -> Acknowledged:
        """Say something and hear the answer.

        Raises:
            NetworkError: it is gone, or silent.
            RefusedError: it does not do its part; says why.
            RemoteProtocolError: it says something else.
        """
        self.link.send([data])
        event = await self.link.next_event(self.wire, self._deadlines.answer)
        if isinstance(event, Refused):
            raise RefusedError(f"{self.name} refuses its share: {event.reason}")
        if not isinstance(event, Acknowledged):
            raise RemoteProtocolError(f"expected an ACK, found {event}")
        return event

    async def send_weights(self, stream: WeightSender, progress: Callable[[], None]) -> None:
        """Send all weights: one piece is read while the other one leaves. `progress` is called after each.

        Raises:
            NetworkError: it is gone, or takes nothing.
        """
        silence = self._deadlines.weights
        pieces = [memoryview(bytearray(stream.piece_bytes)) for _ in range(2)]
        while True:
            filled = await in_thread("weights", partial(stream.fill, pieces[0]))
            await self.link.flushed(silence)
            if not filled:
                return
            self.link.send([pieces[0][:filled]])
            self.weight_bytes, self._weight_left = self.weight_bytes + filled, stream.left
            progress()
            pieces.reverse()

    async def wind_up(self) -> None:
        """Lead it, where that can be done, through an empty session, to where nothing but the goodbye is missing."""
        connection, wire = self._connection, self.wire
        if connection is None or connection.has_ended or wire.dead:
            return
        with contextlib.suppress(NetworkError, RemoteProtocolError):
            while self._weight_left:
                zeros = bytes(min(self._weight_left, PIECE_BYTES))
                connection.send([zeros])
                await connection.flushed(FAREWELL_SECONDS)
                self._weight_left -= len(zeros)
            while True:
                if wire.answer_due:
                    await connection.next_event(wire, FAREWELL_SECONDS)
                data = None if wire.stage is Stage.READY else wire.farewell()
                if data is None:
                    break
                connection.send([data])

    def say_goodbye(self) -> None:
        """Where `wind_up` got so far. Not before it has ended for all: who leaves a mesh that others still make is taken for a stranger."""
        if self.is_connected and not self.wire.dead and self.wire.stage is Stage.READY:
            data = self.wire.farewell()
            if data is not None:
                self.link.send([data])

    async def hang_up(self, patience: float) -> None:
        """End the connection, once all that was sent has gone out or `patience` seconds have passed."""
        if self._connection is None:
            return
        self._connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._connection.closed()
        self._connection.abort()
