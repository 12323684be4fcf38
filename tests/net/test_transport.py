"""Bytes arrive where they were wanted, in order and complete, however they were cut; and silence, ends and full buffers are noticed."""

import asyncio
import ipaddress
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dairllm.config import Keepalive
from dairllm.errors import LocalProtocolError, NetworkError, RemoteProtocolError
from dairllm.net.addresses import address_of, listening_socket, resolve
from dairllm.net.dial import dial
from dairllm.net.transport import Connection, Incoming
from dairllm.protocol.stream import READ_AHEAD
from tests.patience import PATIENCE, until


class Feeding(Incoming[str]):
    """tests/net/conftest.py's Feed, for the type checker."""

    kept: int

    def want(self, *views: memoryview) -> None: ...


Pair = tuple[Connection, asyncio.StreamReader, asyncio.StreamWriter]
SIZES = [1, 4, 100, 16_000, 3, READ_AHEAD + 5, 2 * READ_AHEAD, 7, 544, 544, 544]


def places(sizes: list[int]) -> tuple[bytes, list[memoryview]]:
    return random.Random(1).randbytes(sum(sizes)), [memoryview(bytearray(size)) for size in sizes]  # noqa: S311 - test data


@pytest.mark.parametrize("chunk", [1 << 30, 60_000, 997])
async def test_memory_is_filled_in_order_however_the_bytes_come(pair: Pair, feed: Feeding, chunk: int) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    data, pieces = places(SIZES)

    async def write() -> None:
        for at in range(0, len(data), chunk):
            writer.write(data[at : at + chunk])
            await writer.drain()
            await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    for part in (pieces[:5], pieces[5:]):
        feed.want(*part)
        assert await connection.next_event(feed, PATIENCE) == "full"
    await writing
    assert b"".join(pieces) == data
    assert (feed.kept, connection.bytes_received) == (0, len(data))


async def test_bytes_that_nobody_wants_yet_are_kept_and_hold_the_sender_back(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    data, pieces = places([8, 4_000_000, 5])
    writer.write(data)
    await until(lambda: feed.kept == READ_AHEAD)
    await asyncio.sleep(0.05)  # in which more would come, if reading went on
    assert feed.kept == connection.bytes_received == READ_AHEAD
    for piece in pieces:
        feed.want(piece)
        await connection.next_event(feed, PATIENCE)
    assert b"".join(pieces) == data


async def test_what_comes_between_two_requests_is_not_lost(pair: Pair, feed: Feeding) -> None:
    """The read-ahead fills up while the reader has been served but has not run yet."""
    connection, _, writer = pair
    connection.attach(feed)
    data, pieces = places([1000] * 300)
    writer.write(data)
    for piece in pieces:
        feed.want(piece)
        await connection.next_event(feed, PATIENCE)
    assert b"".join(pieces) == data


async def test_what_comes_without_a_pause_does_not_hold_up_the_loop(pair: Pair, feed: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection has just been quick, and is looked at past the loop."""
    connection, _, writer = pair
    connection.attach(feed)
    data, (first, large) = places([8, 300_000])
    feed.want(first)
    writer.write(data[:8])
    await connection.next_event(feed, PATIENCE)
    whole = feed.get_buffer
    monkeypatch.setattr(feed, "get_buffer", lambda: whole()[:8])  # so that it takes long
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    feed.want(large)
    writer.write(data[8:])
    counting = asyncio.create_task(count())
    await connection.next_event(feed, PATIENCE)
    counting.cancel()
    assert turns > 5
    assert bytes(large) == data[8:]


async def test_silence_ends_the_wait_and_the_connection(pair: Pair, feed: Feeding) -> None:
    connection, reader, writer = pair
    connection.attach(feed)
    feed.want(memoryview(bytearray(4)))
    writer.write(b"x")
    start = time.monotonic()
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:\d+ was silent for 100ms; expecting 3 more bytes"):
        await connection.next_event(feed, 0.1)
    assert time.monotonic() - start > 0.09
    assert await reader.read() == b""
    with pytest.raises(NetworkError, match="was silent"):
        await connection.next_event(feed)


async def test_who_reads_and_who_writes_have_each_their_own_patience(pair: Pair, feed: Feeding) -> None:
    """What comes does not excuse a peer that takes nothing."""
    connection, _, writer = pair
    connection.attach(feed)
    connection.send([memoryview(bytearray(20_000_000))])
    flushing = asyncio.create_task(connection.flushed(0.3))
    await asyncio.sleep(0)
    feed.want(memoryview(bytearray(1_000_000)))
    reading = asyncio.create_task(connection.next_event(feed, 60))
    async with asyncio.timeout(30):
        while not flushing.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
    for waiting in (flushing, reading):
        with pytest.raises(NetworkError, match="was silent for 300ms"):
            await waiting


async def test_an_event_that_comes_as_its_reader_is_cancelled_is_kept(pair: Pair, feed: Feeding) -> None:
    connection, _, _ = pair
    connection.attach(feed)
    piece = memoryview(bytearray(4))
    feed.want(piece)
    waiting = asyncio.create_task(connection.next_event(feed, 5))
    await asyncio.sleep(0.01)
    connection.get_buffer(-1)[:4] = b"here"
    connection.buffer_updated(4)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await connection.next_event(feed, 5) == "full"
    assert bytes(piece) == b"here"


async def test_who_waits_for_an_event_of_a_full_link_is_told(pair: Pair, feed: Feeding) -> None:
    """Before its bytes come and after: nobody but the owner of the link can go on."""
    connection, _, writer = pair
    connection.attach(feed)
    waiting = asyncio.create_task(connection.next_event(feed, 60))
    await asyncio.sleep(0)
    writer.write(bytes(2 * READ_AHEAD))
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="waited for, but full"):
            await waiting
        waiting = asyncio.create_task(connection.next_event(feed, 60))
    waiting.cancel()
    piece = memoryview(bytearray(2 * READ_AHEAD))
    feed.want(piece)
    assert await connection.next_event(feed, 5) == "full"


async def test_a_slow_peer_is_not_a_silent_one(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    piece = memoryview(bytearray(8))
    feed.want(piece)
    reading = asyncio.create_task(connection.next_event(feed, 1.0))
    for byte in b"slowly..":
        writer.write(bytes([byte]))
        await asyncio.sleep(0.15)
    await reading
    assert bytes(piece) == b"slowly.."


async def test_a_loop_that_was_kept_busy_takes_nobody_for_silent(pair: Pair, feed: Feeding) -> None:
    """The deadline has passed before the loop looks; the bytes came in time all the same."""
    connection, _, writer = pair
    connection.attach(feed)
    piece = memoryview(bytearray(4))
    feed.want(piece)
    waiting = asyncio.create_task(connection.next_event(feed, 0.05))
    await asyncio.sleep(0)
    os.write(writer.get_extra_info("socket").fileno(), b"here")
    time.sleep(0.2)  # noqa: ASYNC251 - as something does that keeps the loop busy
    await waiting
    assert bytes(piece) == b"here"


async def test_a_later_shorter_deadline_counts(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    feed.want(memoryview(bytearray(1)))
    writer.write(b"1")
    await connection.next_event(feed, 10 * PATIENCE)
    with pytest.raises(NetworkError, match="silent for 50ms"):
        async with asyncio.timeout(PATIENCE):
            await connection.next_event(feed, 0.05)


async def test_after_a_half_close_what_came_can_be_read_and_answered(pair: Pair, feed: Feeding) -> None:
    connection, reader, writer = pair
    connection.attach(feed)
    writer.write(b"question")
    writer.write_eof()
    await until(lambda: connection.has_ended)
    piece = memoryview(bytearray(8))
    feed.want(piece)
    await connection.next_event(feed)
    assert bytes(piece) == b"question"
    connection.send([b"answer"])
    assert await reader.readexactly(6) == b"answer"
    with pytest.raises(NetworkError, match="closed the connection"):
        await connection.next_event(feed, PATIENCE)
    feed.want(piece)
    with pytest.raises(RemoteProtocolError, match="the end; expecting 8 more bytes"):
        await connection.next_event(feed, PATIENCE)


async def test_the_end_wakes_who_waits(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    feed.want(memoryview(bytearray(9)))
    waiting = asyncio.create_task(connection.next_event(feed, PATIENCE))
    writer.write(b"only")
    await asyncio.sleep(0.01)
    writer.close()
    with pytest.raises(RemoteProtocolError, match="the end; expecting 5 more bytes"):
        await waiting


async def test_a_reset_wakes_who_waits(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    waiting = asyncio.create_task(connection.next_event(feed, PATIENCE))
    await asyncio.sleep(0.01)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    with pytest.raises(NetworkError, match=r"the connection was lost|closed the connection"):
        await waiting


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_that_the_other_end_has_gone_shows_though_nobody_reads(pair: Pair, feed: Feeding, reset: bool) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    writer.write(bytes(READ_AHEAD))
    async with asyncio.timeout(PATIENCE):
        while feed.wants_data:  # noqa: ASYNC110 - until its room is full, and reading pauses
            await asyncio.sleep(0.01)
    assert not connection.is_hung_up
    if reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        while not connection.is_hung_up:  # noqa: ASYNC110 - it is a question, not an event
            await asyncio.sleep(0.01)
    assert not connection.has_ended


async def test_after_the_end_sending_fails(pair: Pair) -> None:
    connection, _, _ = pair
    connection.abort()
    await connection.closed()
    with pytest.raises(NetworkError, match="closed"):
        connection.send([b"x"])
    with pytest.raises(NetworkError, match="closed"):
        await connection.flushed()


async def test_nothing_can_be_sent_before_there_is_a_connection() -> None:
    connection = Connection(Keepalive())
    with pytest.raises(NetworkError, match="not connected"):
        connection.send([b"x"])
    assert connection.peer_address is None


async def test_sent_memory_may_be_written_again_once_flushed(pair: Pair) -> None:
    connection, reader, _ = pair
    memory = bytearray(b"a" * 8_000_000)
    connection.send([memoryview(memory)])
    flushing = asyncio.create_task(connection.flushed(PATIENCE))
    await asyncio.sleep(0.05)
    assert not flushing.done()
    received = bytearray()
    while not flushing.done():
        received += await reader.read(100_000)
    await flushing
    memory[:] = b"b" * len(memory)
    while len(received) < len(memory):
        received += await reader.read(1_000_000)
    assert received == b"a" * 8_000_000


async def test_a_peer_that_takes_nothing_is_silent(pair: Pair) -> None:
    connection, _, _ = pair
    connection.send([memoryview(bytearray(20_000_000))])
    with pytest.raises(NetworkError, match="was silent for 100ms"):
        await connection.flushed(0.1)


async def test_a_peer_that_takes_slowly_is_not_silent(pair: Pair) -> None:
    connection, reader, _ = pair
    connection.send([memoryview(bytearray(12_000_000))])
    flushing = asyncio.create_task(connection.flushed(1.0))
    while not flushing.done():
        await reader.read(1_000_000)
        await asyncio.sleep(0.1)
    await flushing


async def test_flushing_notices_the_end(pair: Pair) -> None:
    connection, _, writer = pair
    connection.send([memoryview(bytearray(20_000_000))])
    flushing = asyncio.create_task(connection.flushed(PATIENCE))
    await asyncio.sleep(0.01)
    writer.transport.abort()
    with pytest.raises(NetworkError):
        await flushing


async def test_several_pieces_go_out_in_order(pair: Pair) -> None:
    connection, reader, _ = pair
    connection.send([b"one ", memoryview(b"two "), memoryview(bytearray(b"three"))])
    await connection.flushed(PATIENCE)
    assert await reader.readexactly(13) == b"one two three"
    assert connection.bytes_sent == 13


async def test_who_speaks_before_anybody_listens_is_noticed(pair: Pair) -> None:
    connection, _, writer = pair
    heard: list[tuple[int, bool]] = []
    connection.on_early = lambda connection: heard.append((connection.bytes_received, connection.has_ended))
    writer.write(b"GET")
    await until(lambda: heard)
    assert heard == [(3, False)]
    writer.write_eof()
    await until(lambda: len(heard) > 1)
    assert heard[1:] == [(3, True)]


async def test_a_cancelled_wait_leaves_the_connection_usable(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    piece = memoryview(bytearray(4))
    feed.want(piece)
    waiting = asyncio.create_task(connection.next_event(feed, PATIENCE))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    writer.write(b"next")
    await connection.next_event(feed, PATIENCE)
    assert bytes(piece) == b"next"


async def test_connections_do_not_wait_to_fill_packets_and_notice_dead_peers(pair: Pair) -> None:
    connection, _, _ = pair
    assert connection._transport is not None
    sock = connection._transport.get_extra_info("socket")
    for option, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == value
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


async def test_repr_tells_the_state(pair: Pair, feed: Feeding) -> None:
    connection, _, writer = pair
    connection.attach(feed)
    writer.write(b"abc")
    await until(lambda: connection.bytes_received == 3)
    assert repr(connection) == f"<Connection {connection.peer}: open, 3 bytes received, 0 sent>"
    connection.abort()
    await connection.closed()
    assert "closed" in repr(connection)


async def test_dialling_comes_from_the_address_it_was_given(accepted: tuple[int, "asyncio.Queue[Connection]"]) -> None:
    port, queue = accepted
    connection = await dial(ipaddress.ip_address("127.0.0.1"), port, Keepalive(), PATIENCE, ipaddress.ip_address("127.0.0.9"))
    other = await queue.get()
    assert str(other.peer_address) == str(connection.own_address) == "127.0.0.9"
    connection.abort()
    await connection.closed()


async def test_dialling_a_closed_port_says_so() -> None:
    with listening_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(NetworkError, match=rf"127\.0\.0\.1 port {port} cannot be reached: "):
        await dial(ipaddress.ip_address("127.0.0.1"), port, Keepalive(), 5)


@asynccontextmanager
async def full_backlog() -> AsyncIterator[int]:
    """A port whose kernel takes no more connections, so that one more gets no answer."""
    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen(0)
        port = sock.getsockname()[1]
        held = [socket.socket() for _ in range(3)]
        for one in held:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        yield port
        for one in held:
            one.close()


async def test_dialling_who_does_not_answer_ends_in_time() -> None:
    async with full_backlog() as port:
        with pytest.raises(NetworkError, match="did not answer within 100ms"):
            await dial(ipaddress.ip_address("127.0.0.1"), port, Keepalive(), 0.1)


async def test_names_are_resolved() -> None:
    assert ipaddress.ip_address("127.0.0.1") in await resolve("localhost")
    assert await resolve("10.1.2.3") == (ipaddress.ip_address("10.1.2.3"),)
    for name in ("no-such-host.invalid", "a..b", "x" * 300):
        with pytest.raises(NetworkError, match="has no address"):
            await resolve(name)


def test_an_address_of_version_4_is_one_whatever_its_clothes() -> None:
    assert address_of("::ffff:10.0.0.1") == address_of("10.0.0.1")
    assert address_of("fe80::1%eth0") == address_of("fe80::1")


def test_a_port_that_is_taken_is_named() -> None:
    with listening_socket("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(NetworkError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: Address already in use"):
            listening_socket("127.0.0.1", port)
    with pytest.raises(NetworkError, match=r"cannot listen on 192\.0\.2\.1 port 0: "):
        listening_socket("192.0.2.1", 0)
