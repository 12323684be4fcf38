"""Strangers, roots that contradict themselves, hostile bytes at every stage: one kind of error, and no more memory than was sent."""

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import RemoteProtocolError
from dairllm.protocol.dllama import codec
from dairllm.protocol.dllama.codec import ACK, Greeting, Peer
from dairllm.protocol.dllama.events import NetworkReceived, WeightsEnd
from dairllm.protocol.dllama.limits import Limits
from dairllm.protocol.dllama.worker import WorkerSession

NewOwner = Callable[..., Any]


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def greet(n_workers: int = 1, index: int = 0) -> bytes:
    peers = tuple(Peer(f"h{i}", 1) for i in range(n_workers - 1))
    return codec.encode_greeting(Greeting(n_workers, index, peers)) + ACK


def test_a_stranger_is_refused_at_its_first_word(owner: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=r"root, byte 4: expected the number of workers in 1\.\.256, found b'GET '"):
        owner.hear_all([b"GET "])


def test_a_dead_session_stays_dead(owner: Any) -> None:
    with pytest.raises(RemoteProtocolError) as first:
        owner.hear_all([b"GET / HTTP/1.1\r\n"])
    session = owner.session
    assert session.dead
    assert session.eof() is None
    received = session.bytes_received
    for use in (session.next_event, session.acknowledge, lambda: session.receive_into(memoryview(bytearray(4)))):
        with pytest.raises(RemoteProtocolError) as again:
            use()
        assert str(again.value) == str(first.value)
    assert session.wants_data
    assert len(session.get_buffer()) > 0
    session.buffer_updated(3)
    assert session.receive_data(bytes(100_000)) == 100_000
    assert session.bytes_received == received
    assert "dead" in repr(session)


def test_a_network_of_another_size(whole: Any, owner: Any) -> None:
    network = next(event.network for event in whole.events if isinstance(event, NetworkReceived))
    with pytest.raises(RemoteProtocolError, match="expected a network of 3 nodes, found 2"):
        owner.hear_all([greet(2) + codec.encode_network(network)])


def test_the_configuration_of_another_node(owner: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="expected the configuration of node 2, found that of node 1"):
        owner.hear_all([greet(2, 1) + ACK + words(32, 3, 0, 0) + ACK + words(1, 0, 0)])


def test_a_graph_that_cannot_be_run(owner: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="a graph that cannot be run: segment 0 syncs pipe 7; there are 0 pipes"):
        owner.hear_all([greet() + ACK + words(32, 2, 0, 0) + ACK + words(1, 0, 1, 1, 0, 7, 0)])


def test_more_rows_than_a_batch_has(small_recording: Any, owner: Any) -> None:
    owner.hear_until(small_recording, WeightsEnd)
    with pytest.raises(RemoteProtocolError, match=r"rows of a control packet in 0\.\.32, found 33"):
        owner.hear(words(0, 33))


def test_eof_before_the_first_byte_is_no_mistake(owner: Any) -> None:
    assert owner.session.eof() is None
    assert not owner.session.dead


def hostile_memory(new_owner: NewOwner, pieces: list[bytes]) -> int:
    """Peak memory of a session that hears `pieces` and gives memory in small views; it must end in an error or in waiting."""
    tracemalloc.start()
    try:
        owner = new_owner(piece=4096)
        with contextlib.suppress(RemoteProtocolError):
            owner.hear_all(pieces)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


NODE_START = greet() + ACK + words(32, 2, 0, 0) + ACK
ANNOUNCEMENTS = {
    "peers": words(256, 0),
    "a host": words(2, 0, 256),
    "pipes": greet() + ACK + words(1024, 2, 64),
    "buffers": NODE_START + words(1, 16384, 4096),
    "ops": NODE_START + words(1, 0, 4096, 8, 32768),
    "a weight": NODE_START + words(1, 0, 0, 2) + b"w\0" + words(0) + struct.pack("<QQ", 0, 1 << 44),
}


@pytest.mark.parametrize("announced", ANNOUNCEMENTS.values(), ids=ANNOUNCEMENTS)
def test_what_is_announced_is_not_allocated(announced: bytes, new_owner: NewOwner) -> None:
    assert hostile_memory(new_owner, [announced, bytes(8)]) < 500_000


def test_memory_stays_proportional_to_what_was_sent(new_owner: NewOwner) -> None:
    """The densest configuration: segments of syncs, eight bytes each, between as many nodes as there may be."""
    start = greet(256) + ACK + words(1, 257, 1) + struct.pack("<iIIIQQQ", 0, 1, 1, 257, 257, 1028, 1028) + words(2) + b"X\0" + words(0)
    message = start + ACK + words(1, 0, 2000) + 2000 * (words(8, 0) + 8 * words(0, 1))
    assert hostile_memory(new_owner, [message]) < 60 * len(message)


HARM = st.sampled_from([words(0), words(1), words(2), words(0xFFFFFFFF), ACK, bytes(40)])


@settings(max_examples=300, deadline=None)
@given(
    where=st.integers(0, 1 << 20),
    early=st.booleans(),
    harm=st.one_of(st.binary(max_size=300), st.lists(HARM, max_size=50).map(b"".join)),
    goes_on=st.sampled_from(["not", "inserted", "overwritten"]),
)
def test_hostile_bytes_at_any_stage_raise_nothing_else(
    where: int, early: bool, harm: bytes, goes_on: str, small_recording: Any, new_owner: NewOwner
) -> None:
    """A true session up to some byte, then anything, then perhaps the true session again."""
    stream = small_recording.from_root
    cut = where % (len(b"".join(small_recording.root[:3])) + 100 if early else len(stream))
    tail = {"not": b"", "inserted": stream[cut:], "overwritten": stream[cut + len(harm) :]}[goes_on]
    owner = new_owner(piece=1 << 16)
    with contextlib.suppress(RemoteProtocolError):
        owner.hear_all([stream[:cut] + harm, tail])
        owner.session.eof()


def test_a_changed_bit_anywhere_in_the_configuration_raises_nothing_else(small_recording: Any, new_owner: NewOwner) -> None:
    stream = b"".join(small_recording.root[:3])
    for position in range(0, len(stream), 7):
        changed = bytearray(stream)
        changed[position] ^= 1 << (position % 8)
        with contextlib.suppress(RemoteProtocolError):
            new_owner(piece=1 << 16).hear_all([bytes(changed)])


def test_limits_are_the_owners(new_owner: NewOwner) -> None:
    with pytest.raises(RemoteProtocolError, match=r"1\.\.2, found 3"):
        new_owner(session=WorkerSession(Limits(max_workers=2))).hear_all([words(3)])
