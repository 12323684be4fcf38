"""The worker's session against all that the C++ root said in five recorded sessions, however it is cut; and how its owner uses it."""

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.plan import ROOT, Exchange, token_plan
from dairllm.protocol.dllama import codec
from dairllm.protocol.dllama.codec import ACK, Control, Greeting, WeightHeader
from dairllm.protocol.dllama.events import Filled, Go, NetworkReceived, NodeReceived, Stop, WeightReceived, WeightsEnd
from dairllm.protocol.dllama.link import IncomingRows, incoming_rows
from dairllm.protocol.dllama.worker import Stage, WorkerSession

NewOwner = Callable[..., Any]

CONTROL_ACKS = 4
"""A worker says ACK to the greeting, the network, the node, the end of the weights; all else that it sends are pipe rows."""


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def names(owner: Any) -> list[str]:
    return [type(event).__name__ for event in owner.events]


# What the C++ root said


def test_the_recorded_session_as_the_root_told_it(recording: Any, new_owner: NewOwner) -> None:
    owner = new_owner()
    owner.hear_all([recording.from_root])
    greeting, go, network, node, *rest = owner.messages()
    assert greeting == Greeting(1, 0, ())
    assert go == Go()
    assert isinstance(network, NetworkReceived)
    assert network.marker == b""
    assert [pipe.name for pipe in network.network.pipes] == ["POS", "TOK", "X", "LG", "ZQ"]
    assert isinstance(node, NodeReceived)
    assert (node.network, node.node.node, node.plan) == (network.network, 1, token_plan(network.network, node.node))
    assert rest[-1] == Stop()
    end = rest.index(WeightsEnd())
    headers, received = rest[0:end:2], rest[1:end:2]
    assert received == [WeightReceived(header) for header in headers]
    assert headers[0].name == "block_matmul_q"
    assert headers[-1].name == "final_matmul_logits"
    controls = rest[end + 1 : -1]
    assert controls[0] == Control(0, 32)
    assert all(isinstance(control, Control) for control in controls)
    exchanges = [step for step in node.plan if isinstance(step, Exchange) and any(not receive.node for receive in step.receives)]
    assert names(owner).count("Filled") == len(controls) * len(exchanges)
    assert owner.session.stage is Stage.STOPPED
    assert owner.session.eof() is None


def test_our_answers_are_the_cpp_workers(recording: Any, new_owner: NewOwner) -> None:
    """Turn by turn: an ACK where the C++ worker said ACK, and nothing where it only sent rows."""
    owner, answers = new_owner(), []
    owner.act()
    for direction, turn in recording.turns:
        if direction:
            answers.append((turn, bytes(owner.said)))
            owner.said.clear()
        else:
            owner.hear(turn)
    for theirs, ours in answers[:CONTROL_ACKS]:
        assert theirs == ours == ACK
    assert not any(ours for _, ours in answers[CONTROL_ACKS:])


def test_the_codec_says_again_what_the_root_said(recording: Any, new_owner: NewOwner) -> None:
    """Events and payloads, encoded again: the root's own bytes, all of them (the position in a stop has no meaning)."""
    owner = new_owner()
    owner.hear_all([recording.from_root])
    assert codec.encode_stop()[4:] == recording.from_root[-4:]
    assert b"".join(spoken(owner)) == recording.from_root[:-8]


def spoken(owner: Any) -> Iterator[bytes]:
    """What a root says to cause an owner's events, but the stop."""
    payload, offset = bytes(owner.payload), 0

    def take(nbytes: int) -> bytes:
        nonlocal offset
        offset += nbytes
        return payload[offset - nbytes : offset]

    incoming: tuple[IncomingRows, ...] = ()
    for event in owner.messages():
        match event:
            case Greeting():
                yield codec.encode_greeting(event)
            case Go():
                yield codec.encode_ack()
            case NetworkReceived():
                yield codec.encode_network(event.network, event.marker)
            case NodeReceived():
                yield codec.encode_node(event.node)
                incoming = incoming_rows(event.network, event.plan, ROOT)
            case WeightHeader():
                yield codec.encode_weight_header(event) + take(event.nbytes)
            case WeightsEnd():
                yield codec.encode_weights_end()
            case Control():
                yield codec.encode_control(event) + take(sum(rows.row_bytes for rows in incoming) * event.rows)
    assert offset == len(payload)


def test_byte_by_byte(small_recording: Any, whole: Any, new_owner: NewOwner) -> None:
    owner = new_owner()
    owner.hear_all(bytes([byte]) for byte in small_recording.from_root)
    assert owner.events == whole.events
    assert owner.payload == whole.payload


@pytest.mark.parametrize("piece", [1000, 7])
def test_memory_given_in_pieces(piece: int, small_recording: Any, whole: Any, new_owner: NewOwner) -> None:
    owner = new_owner(piece=piece)
    owner.hear_all([small_recording.from_root])
    assert owner.messages() == whole.messages()
    assert owner.payload == whole.payload


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), largest=st.sampled_from([3, 50, 3000, 100_000]), piece=st.sampled_from([None, 512, 5000]))
def test_random_splits(seed: int, largest: int, piece: int | None, small_recording: Any, whole: Any, new_owner: NewOwner) -> None:
    splits, data, pieces, offset = random.Random(seed), small_recording.from_root, [], 0  # noqa: S311  # to cut, not to keep secrets
    while offset < len(data):
        size = splits.randint(1, largest)
        pieces.append(data[offset : offset + size])
        offset += size
    owner = new_owner(piece=piece)
    owner.hear_all(pieces)
    assert owner.messages() == whole.messages()
    assert owner.payload == whole.payload


def test_truncated_anywhere_is_only_a_lack_of_data(small_recording: Any, whole: Any, new_owner: NewOwner) -> None:
    data = small_recording.from_root
    configuration = len(b"".join(small_recording.root[:3]))
    for length in [*range(0, configuration, 7), *range(configuration, len(data), 2503), len(data) - 1]:
        owner = new_owner()
        owner.hear_all([data[:length]])
        assert not owner.session.ack_due
        assert owner.events == whole.events[: len(owner.events)]
        if length:
            with pytest.raises(RemoteProtocolError, match=r"root, byte \d+: closed the connection; expecting "):
                owner.session.eof()
            assert owner.session.dead


# How a session is used


def test_weights_go_straight_to_their_place(small_recording: Any, owner: Any) -> None:
    owner.hear_until(small_recording, NodeReceived)
    session, header, payload = owner.session, WeightHeader("w", 0, 0, 100_000), bytes(range(250)) * 400
    assert session.receive_data(codec.encode_weight_header(header)) == len(codec.encode_weight_header(header))
    assert session.next_event() == header
    assert session.memory_due == len(payload)
    target = bytearray(len(payload))
    session.receive_into(memoryview(target))
    assert session.memory_due == 0
    buffer = session.get_buffer()
    assert len(buffer) == len(payload)
    buffer[:] = payload
    assert target == payload
    session.buffer_updated(len(payload))
    assert session.next_event() == WeightReceived(header)


def test_a_session_says_what_it_expects(small_recording: Any, owner: Any) -> None:
    session = owner.session
    assert session.expecting == "the number of workers (4 bytes)"
    owner.hear_until(small_recording, WeightsEnd)
    assert session.stage is Stage.CONTROL
    assert session.expecting == "a control packet (8 bytes)"
    session.receive_data(words(5, 2) + bytes(100))
    assert session.next_event() == Control(5, 2)
    assert session.expecting == "512 more of 512 bytes of pipe X, rows 0..1"
    assert session.memory_due == 512
    session.receive_into(memoryview(bytearray(512)))
    assert session.expecting == "412 more of 512 bytes of pipe X, rows 0..1"
    assert not session.memory_due
    session.receive_data(bytes(412))
    assert session.next_event() == Filled()
    assert session.expecting == "136 more of 136 bytes of pipe ZQ, slice 0, rows 0..1"
    assert "pipe rows" in repr(session)


def test_views_of_any_item_type_and_shape(small_recording: Any, owner: Any) -> None:
    owner.hear_until(small_recording, WeightsEnd)
    session = owner.session
    session.receive_data(words(0, 1) + struct.pack("<64f", *range(64)))
    assert session.next_event() == Control(0, 1)
    target = bytearray(256)
    session.receive_into(memoryview(target).cast("f", (8, 8)))
    assert session.next_event() == Filled()
    assert struct.unpack("<64f", target) == tuple(range(64))


def test_a_root_that_is_ahead_waits(small_recording: Any) -> None:
    """A root may send all it has without waiting for an ACK: the read-ahead takes some of it, the connection keeps the rest."""
    session = WorkerSession()
    accepted = session.receive_data(small_recording.from_root)
    assert accepted < len(small_recording.from_root)
    assert not session.wants_data
    assert len(session.get_buffer()) == 0
    assert session.next_event() == Greeting(1, 0, ())
    assert session.next_event() is None
    assert session.ack_due
    assert session.expecting == "our own ACK to the greeting"
    assert session.acknowledge() == ACK
    assert session.next_event() == Go()
    assert session.wants_data


def test_a_mistake_of_ours_changes_nothing(small_recording: Any, owner: Any) -> None:
    session = owner.session
    with pytest.raises(LocalProtocolError, match="no ACK is due; expecting the number of workers"):
        session.acknowledge()
    with pytest.raises(LocalProtocolError, match="no memory is wanted now"):
        session.receive_into(memoryview(bytearray(4)))
    owner.hear_until(small_recording, WeightsEnd)
    session.receive_data(words(0, 1))
    session.next_event()
    for view, problem in (
        (memoryview(bytearray(257)), "257 bytes of memory given for 256 bytes"),
        (memoryview(bytearray(0)), "0 bytes of memory given"),
        (memoryview(bytes(256)), "must be writable"),
        (memoryview(bytearray(512))[::2], "must be contiguous"),
    ):
        with pytest.raises(LocalProtocolError, match=problem):
            session.receive_into(view)
    session.receive_into(memoryview(bytearray(256)))
    with pytest.raises(LocalProtocolError, match="no memory is wanted now; expecting 256 more of 256 bytes of pipe X"):
        session.receive_into(memoryview(bytearray(256)))
    assert not session.dead
    session.receive_data(bytes(256))
    assert session.next_event() == Filled()


def test_an_empty_session_ends_well(owner: Any) -> None:
    """What a root does to leave a worker that it cannot use (and what kills no C++ worker)."""
    owner.hear_all([codec.encode_greeting(Greeting(1, 0, ())), ACK])
    owner.hear(ACK + words(32, 2, 0) + words(0))
    owner.hear(ACK + words(1, 0, 0))
    owner.hear(codec.encode_weights_end() + codec.encode_stop())
    assert names(owner) == ["Greeting", "Go", "NetworkReceived", "NodeReceived", "WeightsEnd", "Stop"]
    assert bytes(owner.said) == 4 * ACK
    assert owner.session.expecting == "the end of the connection"


def test_the_marker_of_our_own_root_is_seen(whole: Any, owner: Any) -> None:
    network = next(event.network for event in whole.events if isinstance(event, NetworkReceived))
    owner.hear_all([codec.encode_greeting(Greeting(1, 0, ())), ACK, codec.encode_network(network, b"dairllm/1")])
    assert owner.events[-1] == NetworkReceived(network, b"dairllm/1")
