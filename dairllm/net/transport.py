"""One TCP connection: bytes go straight where they belong, and silence is noticed.

A :class:`Connection` only moves bytes. What they mean, and where the next ones go, is said by the sans-IO link that it serves
(``dairllm.protocol``): the loop reads into memory that the link hands out, the pipe's or the weight's own, and each read is followed by
the question whether it completed an event. Bulk data costs no copy and wakes no task before its last byte.

**Nothing is dropped.** What comes while nobody waits (a peer may be ahead of our own control packet) is kept by the link; when that is
full, reading pauses and TCP holds the sender back. One method pauses and resumes, `_read_or_pause`, by one rule: reading goes on
exactly while the link has room. It is called wherever that may have changed: after bytes came in, and after an event was taken.
Whoever waits for an event of a link that is full and holds none would wait for ever, and is told so.

**Writing.** :meth:`Connection.send` takes views of memory that lives on, such as pipe rows. uvloop sends what the kernel takes at once
and keeps *references* to the rest (asyncio's own loop copies it). Hence an invariant that all callers keep: memory that was sent is not
written again, by a computation or by received bytes, until :meth:`Connection.flushed` has returned.

**Lingering.** Nodes that share a pass answer each other within a fraction of a millisecond, in which falling asleep and being woken take
longer than the message. So whoever awaits an event looks for it a moment before it leaves the matter to the loop, giving the processor to
whoever else wants it. A connection that has been slow of late is not lingered for.

**Deadlines** count from the last byte that came for who reads, from the last that went for who flushes (`dairllm.net.silence`).
"""

import asyncio
import contextlib
import math
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast

from dairllm.config import Keepalive
from dairllm.errors import LocalProtocolError, NetworkError, ProtocolError, RemoteProtocolError
from dairllm.net.addresses import Address, address_of
from dairllm.net.silence import Silence
from dairllm.net.socket_options import set_options
from dairllm.units import format_duration

__all__ = ["Connection", "Incoming"]

LINGER_SECONDS = 0.0002
"""The longest that an event is looked for before the loop waits for it: some awakenings."""

EventT = TypeVar("EventT", covariant=True)


class Incoming(Protocol[EventT]):
    """The receiving end of a sans-IO link, as `dairllm.protocol.dllama.link.Link` describes it."""

    @property
    def wants_data(self) -> bool: ...
    @property
    def expecting(self) -> str: ...
    def get_buffer(self) -> memoryview: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def next_event(self) -> EventT | None: ...
    def eof(self) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One TCP connection from its opening to its end; one task at a time reads, one writes.

    Until :meth:`attach` says whom it serves it must stay silent: see `on_early`.

    Args:
        keepalive: when TCP itself gives the peer up.
        on_open: called with the connection once it is there.
    """

    def __init__(self, keepalive: Keepalive, on_open: Callable[["Connection"], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._keepalive, self._on_open = keepalive, on_open
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming[object] | None = None
        self._error: NetworkError | None = None
        self._eof = self._paused = self._full = False
        self._reader: asyncio.Future[object] | None = None
        self._unclaimed: asyncio.Future[object] | None = None
        """What came in the very moment in which its reader was cancelled: the next one's."""
        self._writer: asyncio.Future[None] | None = None
        self._received_at, self._taken_at, self._unsent = 0.0, 0.0, 0
        self._read_silence = Silence(self._loop, self._last_received_at, self._give_up)
        self._write_silence = Silence(self._loop, self._last_taken_at, self._give_up)
        self._readable, self._fileno, self._patience = select.poll(), -1, 0.0
        self._closed = self._loop.create_future()
        self.on_early: Callable[[Connection], None] | None = None
        """Called when a connection that nobody is attached to says something, or ends."""
        self.on_end: Callable[[], None] | None = None
        """Called once, when the other end has said its last."""
        self.peer = "nobody"
        """The other end, for messages: address and port."""
        self.peer_address: Address | None = None
        self.own_address: Address | None = None
        """The address of ours that the other end knows. Both are None where the connection was gone before it could be asked."""
        self.bytes_received = self.bytes_sent = 0
        self.ended_at = math.inf
        """The loop's time when the other end had said its last: where it was given up for its silence, when that began."""

    def __repr__(self) -> str:
        state = "open" if not self.has_ended else str(self._error or "the other end has said all")
        return f"<Connection {self.peer}: {state}, {self.bytes_received} bytes received, {self.bytes_sent} sent>"

    @property
    def has_ended(self) -> bool:
        """Whether the other end will say no more."""
        return self._eof or self._error is not None

    @property
    def ending(self) -> str | None:
        """How it ended, for people; None while it has not."""
        return str(self._error) if self._error is not None else f"{self.peer} closed the connection" if self._eof else None

    @property
    def is_hung_up(self) -> bool:
        """Whether the other end has gone, as the system knows it: true also where nobody reads, so that its end has not come up yet."""
        if self.has_ended or self._transport is None:
            return self.has_ended
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    # For those who use it.

    def attach(self, incoming: Incoming[object]) -> None:
        """From now on, what comes is for `incoming`."""
        self._incoming = incoming
        self._read_or_pause()

    async def next_event(self, incoming: Incoming[EventT], silence: float = math.inf) -> EventT:
        """The next event of the link attached, which is `incoming` (named for its type).

        Args:
            silence: seconds without a byte after which the peer is given up and the connection closed.

        Raises:
            RemoteProtocolError: the peer broke the protocol, or ended in the middle of it.
            NetworkError: it is gone, was silent, or closed the connection where it may.
            LocalProtocolError: the link is full and holds no event: its owner has to act first.
        """
        if self._unclaimed is not None:
            unclaimed, self._unclaimed = self._unclaimed, None
            return cast(EventT, unclaimed.result())
        event = incoming.next_event()
        if self._paused:  # what was taken may have made room
            self._read_or_pause()
        if event is not None:
            return event
        if self.has_ended:
            raise self._end_of(incoming)
        begun = time.perf_counter()
        event = self._look_for(incoming, begun + self._patience)
        if event is not None:
            self._patience = LINGER_SECONDS
            return event
        if not incoming.wants_data:
            raise self._stuck(incoming)
        self._reader = reader = self._loop.create_future()
        self._read_silence.begin(silence)
        try:
            return cast(EventT, await reader)
        except asyncio.CancelledError:
            if reader.done() and not reader.cancelled():
                self._unclaimed = reader
                reader.exception()  # it is known, whether or not somebody comes for it
            raise
        finally:
            self._reader = None
            self._read_silence.end()
            soon = time.perf_counter() - begun < LINGER_SECONDS
            self._patience = LINGER_SECONDS if soon else self._patience / 2
            del reader  # it knows the error, which knows this frame, which would keep all that its callers hold

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Begin to send; what the kernel does not take at once is still *referred to* until `flushed`.

        Raises:
            NetworkError: the connection has ended.
        """
        if self._error is not None or self._transport is None:
            raise self._end_of(self._incoming)
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        else:
            self._transport.writelines(pieces)
        self.bytes_sent += sum(map(len, pieces))

    async def flushed(self, silence: float = math.inf, sent: int | None = None) -> None:
        """Wait until the kernel has taken what was sent, and its memory may be used again.

        Args:
            silence: seconds without progress after which the peer is given up.
            sent: all that was sent when `bytes_sent` was this; all of it if None.

        Raises:
            NetworkError: the connection ended first, or the other end took nothing for `silence` seconds.
        """
        if self._error is not None:
            raise self._end_of(self._incoming)
        if not self._full or self._transport is None:
            return
        self._unsent = self._transport.get_write_buffer_size()
        if sent is not None and self.bytes_sent - self._unsent >= sent:
            return
        self._writer = self._loop.create_future()
        self._write_silence.begin(silence)
        try:
            await self._writer
        finally:
            self._writer = None
            self._write_silence.end()

    def close(self) -> None:
        """End the connection once all that was sent has gone out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    async def closed(self) -> None:
        """Wait for the end of one that was told to close."""
        await asyncio.shield(self._closed)

    # For the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which derives from none of asyncio's
        transport.set_write_buffer_limits(high=0)  # so `pause_writing` says that something is unsent, `resume_writing` that nothing is
        with contextlib.suppress(OSError):  # it may be gone already; the first use will tell
            sock = transport.get_extra_info("socket")
            self._fileno = sock.fileno()
            self._readable.register(self._fileno, select.POLLIN)
            set_options(sock, self._keepalive)
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if peer and own:
            self.peer_address, self.own_address = address_of(peer[0]), address_of(own[0])
            self.peer = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        if self._on_open is not None:
            self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer = self._incoming.get_buffer() if self._incoming is not None else None
        # Nobody is attached: what a stranger says is not kept. Python 3.11 also asks once more after the end, when there may be no room.
        return buffer or memoryview(bytearray(64))

    def buffer_updated(self, nbytes: int) -> None:
        self._received_at = self._loop.time()
        self.bytes_received += nbytes
        if self._incoming is None:
            self._notice_early()
            return
        self._incoming.buffer_updated(nbytes)
        if self._reader is not None and not self._reader.done():
            self._serve_reader(self._reader, self._incoming)
        self._read_or_pause()

    def eof_received(self) -> bool:
        self._eof = True
        self._end_at(self._loop.time())
        self._settle_reader()
        self._notice_early()
        return True  # we may still have something to say

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(NetworkError(f"{self.peer}: the connection was {'closed' if exc is None else f'lost ({exc})'}"))
        if not self._closed.done():
            self._closed.set_result(None)
        self._notice_early()

    # Within.

    def _look_for(self, incoming: Incoming[EventT], until: float) -> EventT | None:
        """Read what is there, and what comes until then, past the loop. The end of the stream is left to the loop."""
        if self._transport is None or self._transport.is_closing() or not incoming.wants_data:
            return None
        try:
            while True:
                if self._readable.poll(0):
                    nbytes = os.readv(self._fileno, [incoming.get_buffer()])
                    if not nbytes:
                        return None
                    self.bytes_received += nbytes
                    incoming.buffer_updated(nbytes)
                    event = incoming.next_event()
                    self._read_or_pause()
                    if event is not None or self._paused:
                        return event
                else:
                    os.sched_yield()
                if time.perf_counter() >= until:  # also where a large event keeps coming: the loop has other things to do
                    return None
        except BlockingIOError:  # something was there, and was not for us
            return None
        except OSError as error:
            self._fail(NetworkError(f"{self.peer}: the connection was lost ({error})"))
            self.abort()
            raise self._end_of(incoming) from None

    def _read_or_pause(self) -> None:
        """Read while the link has room, pause while it has none. Nobody else pauses or resumes."""
        full = self._incoming is not None and not self._incoming.wants_data
        if full == self._paused or self._transport is None or self._transport.is_closing():
            return
        self._paused = full
        (self._transport.pause_reading if full else self._transport.resume_reading)()

    def _serve_reader(self, reader: asyncio.Future[object], incoming: Incoming[object]) -> None:
        """Bytes have come: hand over the event that they complete, if they do."""
        try:
            event = incoming.next_event()
            if event is None and not incoming.wants_data:
                raise self._stuck(incoming)
        except ProtocolError as error:
            reader.set_exception(error)
        else:
            if event is not None:
                reader.set_result(event)
        finally:
            del reader  # as in `next_event`

    def _stuck(self, incoming: Incoming[object]) -> LocalProtocolError:
        return LocalProtocolError(f"{self.peer}: waited for, but full, and its owner has to act first; expecting {incoming.expecting}")

    def _end_at(self, moment: float) -> None:
        if self.ended_at == math.inf:
            self.ended_at = moment
            if self.on_end is not None:
                self.on_end()

    def _notice_early(self) -> None:
        if self._incoming is None and self.on_early is not None:
            self.on_early(self)

    def _end_of(self, incoming: Incoming[object] | None) -> NetworkError | RemoteProtocolError:
        """What to raise for the end of the connection at this point of the conversation."""
        if self._error is None and incoming is not None:
            try:
                incoming.eof()
            except RemoteProtocolError as error:
                return error
            return NetworkError(f"{self.peer} closed the connection")
        problem = self._error or f"{self.peer}: not connected"
        return NetworkError(f"{problem}; expecting {incoming.expecting}" if incoming is not None else str(problem))

    def _settle_reader(self) -> None:
        if self._reader is not None and not self._reader.done() and self._incoming is not None:
            self._reader.set_exception(self._end_of(self._incoming))

    def _last_received_at(self) -> float:
        """The loop's time at which something came. What lies in the socket has come: a loop that was kept busy finds a deadline
        passed before it finds the bytes that kept it."""
        if not self._paused and any(what & select.POLLIN for _, what in self._readable.poll(0)):
            self._received_at = self._loop.time()
        return self._received_at

    def _last_taken_at(self) -> float:
        """The loop's time at which the kernel was last seen to have taken something of what was sent."""
        unsent = 0 if self._transport is None else self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._taken_at = unsent, self._loop.time()
        return self._taken_at

    def _give_up(self, silence: float) -> None:
        self._end_at(self._loop.time() - silence)
        self._fail(NetworkError(f"{self.peer} was silent for {format_duration(silence)}"))
        self.abort()

    def _fail(self, error: NetworkError) -> None:
        self._error = self._error or error
        self._end_at(self._loop.time())
        self._settle_reader()
        if self._writer is not None and not self._writer.done():
            self._writer.set_exception(self._end_of(self._incoming))
        self._read_silence.cancel()
        self._write_silence.cancel()
