"""Links of the mesh: rows in plan order, a peer that is ahead, one that goes away."""

import pytest

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.plan import Exchange, Run, token_plan
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig, Pipe, Segment, Size, Sync, SyncType
from dairllm.protocol.dllama.events import Filled
from dairllm.protocol.dllama.peer import PeerLink

PIPES = (Pipe("A", Size(FloatType.F32, 1, 4, 6)), Pipe("B", Size(FloatType.Q80, 1, 4, 96)))
NETWORK = NetworkConfig(4, 3, PIPES, ())
A_SLICE, B_SLICE = 8, 34


@pytest.fixture
def plan() -> tuple[Run | Exchange, ...]:
    """Node 1 of three; from node 2 come slice 2 of A, and slice 2 of B."""
    syncs = (Sync(0, SyncType.WITH_ROOT), Sync(0, SyncType.NODE_SLICES)), (Sync(1, SyncType.NODE_SLICES),)
    return token_plan(NETWORK, NodeConfig(1, (), tuple(Segment((), each) for each in syncs)))


@pytest.fixture
def link(plan: tuple[Run | Exchange, ...]) -> PeerLink:
    return PeerLink(NETWORK, plan, 2)


def receive(link: PeerLink, *sizes: int) -> list[bytearray]:
    targets = [bytearray(size) for size in sizes]
    link.receive_into(*map(memoryview, targets))
    return targets


def receive_more(link: PeerLink, size: int) -> list[bytearray]:
    """The rest of a payload of which some memory was given."""
    assert link.next_event() == Filled()
    assert link.memory_due == size
    targets = receive(link, size)
    assert link.next_event() == Filled()
    return targets


def test_rows_of_a_token_in_plan_order(link: PeerLink) -> None:
    assert link.idle
    link.begin(2)
    assert not link.idle
    assert link.memory_due == 2 * A_SLICE
    assert link.expecting == "16 more of 16 bytes of pipe A, slice 2, rows 0..1"
    first, second = receive(link, A_SLICE, A_SLICE)
    assert link.receive_data(b"a" * 12) == 12
    assert link.next_event() is None
    assert link.receive_data(b"b" * 4 + b"c" * 10) == 14
    assert link.next_event() == Filled()
    assert (first, second) == (b"a" * 8, b"a" * 4 + b"b" * 4)
    assert link.memory_due == 2 * B_SLICE
    (whole,) = receive(link, 2 * B_SLICE)
    link.receive_data(b"d" * 58)
    assert link.next_event() == Filled()
    assert whole == b"c" * 10 + b"d" * 58
    assert link.idle
    assert link.next_event() is None
    assert "idle" in repr(link)


def test_a_peer_may_be_ahead_of_our_control_packet(link: PeerLink) -> None:
    ahead = bytes(range(A_SLICE)) + bytes(B_SLICE)
    assert link.receive_data(ahead) == len(ahead)
    assert link.idle
    assert link.memory_due == 0
    assert link.bytes_received == len(ahead)
    link.begin(1)
    (first,) = receive(link, A_SLICE)
    assert link.next_event() == Filled()
    assert first == bytes(range(A_SLICE))
    receive(link, B_SLICE)
    assert link.next_event() == Filled()


def test_a_peer_far_ahead_has_to_wait(link: PeerLink) -> None:
    accepted = link.receive_data(bytes(1 << 20))
    assert 0 < accepted < 1 << 20
    assert not link.wants_data
    assert len(link.get_buffer()) == 0
    link.begin(4)
    receive(link, 4 * A_SLICE)
    assert link.next_event() == Filled()
    assert link.wants_data
    first, second = receive(link, B_SLICE), receive_more(link, 3 * B_SLICE)
    assert link.idle
    assert {len(view) for view in (*first, *second)} == {B_SLICE, 3 * B_SLICE}


def test_our_own_mistakes(link: PeerLink) -> None:
    with pytest.raises(LocalProtocolError, match="no memory is wanted now; expecting nothing before the next control packet"):
        receive(link, 1)
    link.begin(1)
    with pytest.raises(LocalProtocolError, match="a control packet while expecting 8 more of 8 bytes of pipe A"):
        link.begin(1)
    with pytest.raises(LocalProtocolError, match="9 bytes of memory given for 8"):
        receive(link, 9)
    assert not link.dead


def test_nothing_is_due_from_a_peer_that_sends_nothing(plan: tuple[Run | Exchange, ...]) -> None:
    link = PeerLink(NETWORK, plan, 1)  # ourselves: no transfers
    link.begin(3)
    assert link.idle


def test_a_peer_may_leave_between_tokens_only(link: PeerLink) -> None:
    assert link.eof() is None
    link.begin(1)
    receive(link, A_SLICE)
    link.receive_data(b"abc")
    with pytest.raises(RemoteProtocolError, match=r"node 2, byte 3: closed the connection; expecting 5 more of 8 bytes of pipe A, slice 2"):
        link.eof()
    assert link.dead
    for use in (link.next_event, lambda: link.begin(1), lambda: receive(link, 1)):
        with pytest.raises(RemoteProtocolError, match="closed the connection"):
            use()
    assert "dead" in repr(link)


def test_leaving_with_rows_that_nobody_asked_for(link: PeerLink) -> None:
    link.receive_data(b"abc")
    with pytest.raises(RemoteProtocolError, match="closed the connection; expecting nothing before the next control packet"):
        link.eof()
