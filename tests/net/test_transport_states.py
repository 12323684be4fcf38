"""A connection driven through all its states over a transport that is not there.

The transport hands over bytes only while reading is not paused, as an event loop does; a socket pair behind it lets the
connection look past the loop, as it does for who waits. Time stands still but where the test moves it.
"""

import asyncio
import random
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dairllm.config import Keepalive
from dairllm.errors import LocalProtocolError, NetworkError, RemoteProtocolError
from dairllm.net.transport import Connection
from dairllm.protocol.stream import Intake

ROOM = 16
"""Bytes that the link reads ahead."""


class StillLoop(asyncio.SelectorEventLoop):
    """A loop whose time only moves when it is told."""

    now = 100.0

    def time(self) -> float:
        return self.now


class FakeTransport(asyncio.Transport):
    """Bytes come from a socket when `deliver` says so, and go nowhere before `drain` says so."""

    def __init__(self, sock: socket.socket, protocol: Connection) -> None:
        super().__init__()
        self._sock, self._protocol = sock, protocol
        self.paused = self.closing = False
        self.unsent = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._sock if name == "socket" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert not self.paused, "paused twice"
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused, "resumed twice"
        self.paused = False

    @property
    def readable(self) -> bool:
        """Whether something lies in the socket that an event loop would deliver."""
        return not (self.paused or self.closing) and bool(select.select([self._sock], [], [], 0)[0])

    def deliver(self) -> bool:
        """What an event loop does where the socket is readable; False where it reads nothing."""
        if not self.readable:
            return False
        buffer = self._protocol.get_buffer(-1)
        assert len(buffer), "reading goes on though there is no room"
        nbytes = self._sock.recv_into(buffer)
        if nbytes:
            self._protocol.buffer_updated(nbytes)
        else:
            self._protocol.eof_received()
        return bool(nbytes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.unsent:
            self._protocol.pause_writing()
        self.unsent += len(data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def drain(self, nbytes: int) -> None:
        self.unsent -= min(nbytes, self.unsent)
        if not self.unsent:
            self._protocol.resume_writing()

    def abort(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)


class Told:
    """A link of messages whose kinds and lengths its owner tells it: parsed a few bytes at a time, or filled into memory."""

    def __init__(self) -> None:
        self._intake = Intake(ROOM)
        self._due: deque[tuple[bool, int]] = deque()
        self._parsed, self._memory = bytearray(), memoryview(b"")

    @property
    def wants_data(self) -> bool:
        return self._intake.has_room

    @property
    def expecting(self) -> str:
        return f"{len(self._due)} messages"

    def expect(self, parsed: bool, nbytes: int) -> None:
        self._due.append((parsed, nbytes))
        if len(self._due) == 1:
            self._begin()

    def _begin(self) -> None:
        if self._due and not self._due[0][0]:
            self._memory = memoryview(bytearray(self._due[0][1]))
            self._intake.receive_into((self._memory,))

    def get_buffer(self) -> memoryview:
        return self._intake.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._intake.buffer_updated(nbytes)

    def next_event(self) -> bytes | None:
        if not self._due:
            return None
        parsed, nbytes = self._due[0]
        while parsed and len(self._parsed) < nbytes:
            piece = self._intake.take(min(3, nbytes - len(self._parsed)))
            if piece is None:
                return None
            self._parsed += piece
        if not parsed and self._intake.filling:
            return None
        event = bytes(self._parsed if parsed else self._memory)
        self._parsed.clear()
        self._due.popleft()
        self._begin()
        return event

    def eof(self) -> None:
        if self._due:
            raise RemoteProtocolError(f"the end; expecting {self.expecting}")


class States(RuleBasedStateMachine):
    """What is said, what is expected, who waits, who goes."""

    @initialize()
    def connect(self) -> None:
        self.loop = StillLoop()
        self.here, self.there = socket.socketpair()
        for sock in (self.here, self.there):
            sock.setblocking(False)
        self.link = Told()
        self.bytes = random.Random(7)  # noqa: S311 - test data
        self.said, self.heard = bytearray(), bytearray()
        self.owed = 0
        self.ended = False
        self.reader: asyncio.Task[bytes] | None = None
        self.writer: asyncio.Task[None] | None = None
        self.taken = False
        """Whether something was taken since the writer began to wait, or was last looked after."""
        self.lasts = {"reader": 0.0, "writer": 0.0}
        self.allowed = {"reader": 0.0, "writer": 0.0}

        async def connect() -> None:
            self.connection = Connection(Keepalive())
            self.transport = FakeTransport(self.here, self.connection)
            self.connection.connection_made(self.transport)
            self.connection.attach(self.link)

        self.do(connect)

    def do(self, act: Callable[[], Any]) -> None:
        """Call it on the loop, and let the loop come to rest."""

        async def rest() -> None:
            result = act()
            if asyncio.iscoroutine(result):
                await result
            for _ in range(8):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rest())

    # What the other end does.

    @precondition(lambda self: not self.ended)
    @rule(nbytes=st.integers(1, 3 * ROOM))
    def say(self, nbytes: int) -> None:
        data = self.bytes.randbytes(nbytes)
        self.there.sendall(data)
        self.said += data

    @precondition(lambda self: not self.ended)
    @rule()
    def leave(self) -> None:
        self.there.shutdown(socket.SHUT_WR)
        self.ended = True

    @rule(times=st.integers(1, 6))
    def deliver(self, times: int) -> None:
        def deliver() -> None:
            for _ in range(times):
                if self.transport.deliver():
                    self.lasts["reader"] = self.loop.now

        self.do(deliver)

    @precondition(lambda self: self.transport.unsent)
    @rule(nbytes=st.integers(1, 60))
    def drain(self, nbytes: int) -> None:
        self.taken = True
        self.do(lambda: self.transport.drain(nbytes))

    # What the owner does.

    @rule(parsed=st.booleans(), nbytes=st.integers(1, 5 * ROOM))
    def expect(self, parsed: bool, nbytes: int) -> None:
        self.owed += 1
        self.link.expect(parsed, nbytes)

    @precondition(lambda self: self.reader is None)
    @rule(silence=st.sampled_from([1.0, 5.0, 20.0]), linger=st.booleans())
    def wait(self, silence: float, linger: bool) -> None:
        def wait() -> None:
            self.connection._patience = 0.0002 if linger else 0.0
            self.reader = asyncio.create_task(self.connection.next_event(self.link, silence))
            self.lasts["reader"], self.allowed["reader"] = self.loop.now, silence

        self.do(wait)

    @precondition(lambda self: self.reader is not None and not self.reader.done())
    @rule(late=st.booleans())
    def cancel(self, late: bool) -> None:
        """`late`: when bytes have come in the same turn of the loop."""

        def cancel() -> None:
            if late:
                while self.transport.deliver():
                    pass
            assert self.reader is not None
            self.reader.cancel()

        self.do(cancel)

    @precondition(lambda self: not self.transport.closing and not self.transport.unsent)
    @rule(nbytes=st.integers(1, 100))
    def send(self, nbytes: int) -> None:
        self.do(lambda: self.connection.send([bytes(nbytes)]))

    @precondition(lambda self: self.writer is None)
    @rule(silence=st.sampled_from([1.0, 5.0, 20.0]))
    def flush(self, silence: float) -> None:
        def flush() -> None:
            self.writer = asyncio.create_task(self.connection.flushed(silence))
            self.lasts["writer"], self.allowed["writer"] = self.loop.now, silence

        self.taken = False
        self.do(flush)

    @rule(seconds=st.sampled_from([0.5, 2.0, 7.0]))
    def pass_time(self, seconds: float) -> None:
        self.loop.now += seconds
        waiting = [name for name in ("reader", "writer") if (task := getattr(self, name)) is not None and not task.done()]
        over = [name for name in waiting if self.loop.now - self.lasts[name] >= self.allowed[name]]
        if "reader" in over and self.transport.readable:
            over.remove("reader")  # what lies in the socket has come
        if "writer" in over and self.taken:
            over.remove("writer")
        self.do(lambda: None)
        if self.connection._taken_at > self.lasts["writer"]:  # it was looked after, and counts from there
            assert self.taken
            self.taken = False
            self.lasts["writer"] = self.connection._taken_at
        if self.transport.readable:
            self.lasts["reader"] = max(self.lasts["reader"], self.connection._received_at)
        assert self.transport.closing == bool(over or self.closed)
        if over:
            self.do(lambda: None)

    # What must hold.

    @property
    def closed(self) -> bool:
        return self.connection._error is not None

    @invariant()
    def settled(self) -> None:
        if not hasattr(self, "loop"):
            return
        for name in ("reader", "writer"):
            task = getattr(self, name)
            if task is not None and task.done():
                setattr(self, name, None)
                if not task.cancelled():
                    self.judge(name, task)
        if self.reader is not None:
            assert self.link.wants_data, "waited for, but full"
            assert not self.transport.paused, "waited for, but paused"
            assert not self.connection.has_ended
        if not self.link.wants_data and not self.transport.closing:
            assert self.transport.paused, "full, and still read"

    def judge(self, name: str, task: "asyncio.Task[Any]") -> None:
        error = task.exception()
        if error is None and name == "reader":
            event = task.result()
            assert self.owed > 0
            self.owed -= 1
            assert self.said[len(self.heard) : len(self.heard) + len(event)] == event, "in order, nothing lost, nothing twice"
            self.heard += event
        elif error is None:
            assert not self.transport.unsent
        elif isinstance(error, LocalProtocolError):
            assert name == "reader"
            assert not self.link.wants_data
            assert "waited for, but full" in str(error)
        else:
            assert isinstance(error, NetworkError | RemoteProtocolError)
            assert self.connection.has_ended, "nothing but the end ends a wait otherwise"

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return

        def end() -> None:
            self.transport.abort()

        self.do(end)
        for task in (self.reader, self.writer):
            if task is not None:
                assert task.done(), "the end of the connection ends every wait"
                task.cancelled() or task.exception()
        self.loop.close()
        self.here.close()
        self.there.close()


TestStates = States.TestCase
TestStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
