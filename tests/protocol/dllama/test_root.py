"""The root's end of a link against the worker's end: two sessions that hear each other, without sockets."""

import struct
from collections.abc import Callable

import pytest

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.plan import token_plan
from dairllm.graph.references import NO_MODEL, weight_references
from dairllm.graph.slicing import equal_shares
from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import (
    ACK,
    HELLO,
    HELLO_1,
    MARKER,
    MAX_REASON_BYTES,
    REFUSAL,
    Control,
    Greeting,
    WeightHeader,
    encode_refusal,
    encode_weight_header,
)
from dairllm.protocol.dllama.events import Acknowledged, Filled, NodeReceived, Refused, Stop, WeightReceived, WeightsEnd
from dairllm.protocol.dllama.root import RootSession, Stage
from dairllm.protocol.dllama.worker import WorkerSession

SPEC = small_spec(weight_type=FloatType.F32)
NETWORK, NODES = build_graph(SPEC, 2, FloatType.F32)
REFERENCES = weight_references(SPEC, equal_shares(SPEC, 2)[1], NODES[1])
MODEL = bytes(range(32))
PLAN = token_plan(NETWORK, NODES[0])
GREETING = Greeting(1, 0, ())


def session() -> RootSession:
    return RootSession(NETWORK, PLAN, 1)


def hear(root: RootSession, data: bytes) -> object:
    assert root.receive_data(data) == len(data)
    return root.next_event()


def configured() -> RootSession:
    """A session whose worker waits for control packets."""
    root = session()
    root.greet(GREETING)
    hear(root, ACK)
    root.go()
    root.configure_network(NETWORK)
    hear(root, ACK)
    root.configure_node(NODES[1])
    hear(root, ACK)
    root.end_weights()
    hear(root, ACK)
    return root


class Ear:
    """A worker that hears a root and answers; it has `model`."""

    def __init__(self, model: bytes = NO_MODEL) -> None:
        self.wire, self.events, self.model = WorkerSession(), list[object](), model

    def hear(self, data: bytes) -> bytes:
        answered, at = b"", 0
        while True:
            event = self.wire.next_event()
            if event is not None:
                self.events.append(event)
            elif self.wire.ack_due:
                answered += self.wire.acknowledge(self.model)
            elif self.wire.memory_due:
                self.wire.receive_into(memoryview(bytearray(self.wire.memory_due)))
            elif at == len(data):
                return answered
            else:
                at += self.wire.receive_data(data[at:])


def test_a_session_from_greeting_to_goodbye() -> None:
    root, worker = session(), Ear()
    assert worker.hear(root.greet(GREETING)) == ACK
    assert hear(root, ACK) == Acknowledged(ours=False)
    assert worker.hear(root.go()) == b""
    assert worker.hear(root.configure_network(NETWORK)) == HELLO + NO_MODEL
    assert hear(root, HELLO + NO_MODEL) == Acknowledged(ours=True)
    assert worker.hear(root.configure_node(NODES[1])) == ACK
    assert hear(root, ACK) == Acknowledged(ours=False)
    header = WeightHeader("block_norm_0", 0, 0, 4)
    assert worker.hear(encode_weight_header(header) + b"1234") == b""
    assert worker.hear(root.end_weights()) == ACK
    assert root.stage is Stage.WEIGHTS
    assert hear(root, ACK) == Acknowledged(ours=False)
    assert root.stage is Stage.READY
    assert worker.hear(root.control(Control(5, 2))) == b""
    assert worker.events[-1] == Control(5, 2)
    due = root.memory_due
    assert due == NETWORK.pipes[4].size.nbytes // NETWORK.n_batches  # two rows of half a ZQ row
    memory = bytearray(due)
    root.receive_into(memoryview(memory))
    assert hear(root, bytes(range(due % 256)) + bytes(due - due % 256)) == Filled()
    assert worker.events[4:6] == [header, WeightReceived(header)]


def configured_network(model: bytes) -> tuple[RootSession, Ear]:
    """Both ends, after the answer to the network configuration."""
    root, worker = session(), Ear(model)
    hear(root, worker.hear(root.greet(GREETING)))
    worker.hear(root.go())
    answer = worker.hear(root.configure_network(NETWORK))
    assert answer == HELLO + model
    for end in range(len(answer)):  # it may come in pieces
        assert hear(root, answer[end : end + 1]) == (None if end + 1 < len(answer) else Acknowledged(True, model))
    return root, worker


def test_a_worker_with_the_model_hears_references() -> None:
    root, worker = configured_network(MODEL)
    said = root.configure_node(NODES[1], REFERENCES)
    assert len(said) < 16384
    assert worker.hear(said) == ACK
    event = worker.events[-1]
    assert isinstance(event, NodeReceived)
    assert event.references == REFERENCES
    assert event.node == NODES[1]
    assert hear(root, ACK) == Acknowledged(ours=False)
    assert worker.hear(root.end_weights()) == ACK


def test_a_worker_with_another_model_hears_none() -> None:
    root, worker = configured_network(MODEL)
    assert worker.hear(root.configure_node(NODES[1])) == ACK
    event = worker.events[-1]
    assert isinstance(event, NodeReceived)
    assert event.references == ()


def test_a_worker_without_a_model_is_not_told_of_references() -> None:
    root, worker = configured_network(NO_MODEL)
    with pytest.raises(LocalProtocolError, match="a worker that has told its model"):
        root.configure_node(NODES[1], REFERENCES)
    assert worker.hear(root.configure_node(NODES[1])) == ACK
    assert worker.events[-1] == NodeReceived(NETWORK, NODES[1], token_plan(NETWORK, NODES[1]))


def test_a_worker_that_has_told_its_model_can_be_led_to_the_end() -> None:
    root, worker = configured_network(MODEL)
    while (data := root.farewell()) is not None:
        answer = worker.hear(data)
        if answer:
            hear(root, answer)
    assert worker.events[-1] == Stop()


def test_the_first_version_knows_no_models() -> None:
    """A worker of version 1 answers with its word alone, and so does ours to a root of version 1."""
    root, worker = session(), Ear(MODEL)
    hear(root, worker.hear(root.greet(GREETING)))
    worker.hear(root.go())
    said = root.configure_network(NETWORK)
    assert MARKER in said
    assert worker.hear(said.replace(MARKER, b"dairllm/1")) == HELLO_1
    assert hear(root, HELLO_1) == Acknowledged(ours=True)
    assert worker.hear(root.configure_node(NODES[1])) == ACK


def test_a_later_version_is_answered_with_ours() -> None:
    root, worker = session(), Ear(MODEL)
    hear(root, worker.hear(root.greet(GREETING)))
    worker.hear(root.go())
    assert worker.hear(root.configure_network(NETWORK).replace(MARKER, b"dairllm/7")) == HELLO + MODEL


def test_after_the_goodbye_the_worker_may_leave() -> None:
    root = configured()
    root.stop()
    root.eof()
    with pytest.raises(LocalProtocolError):
        root.control(Control(0, 1))


@pytest.mark.parametrize("n_said", range(5))
def test_whatever_was_said_a_worker_can_be_led_to_the_end(n_said: int) -> None:
    """What a C++ worker lives through: each message answered, and at last the goodbye."""
    root, worker = session(), Ear()
    story: list[Callable[[], bytes]] = [
        lambda: root.greet(GREETING),
        root.go,
        lambda: root.configure_network(NETWORK),
        lambda: root.configure_node(NODES[1]),
        root.end_weights,
    ]

    def say(data: bytes) -> None:
        answer = worker.hear(data)
        if answer:
            assert isinstance(hear(root, answer), Acknowledged)
        assert not root.answer_due

    for message in story[: n_said if n_said != 1 else 2]:  # a greeted worker that is not alone waits for the others
        say(message())
    while (data := root.farewell()) is not None:
        say(data)
    assert worker.events[-1] == Stop()
    assert WeightsEnd() in worker.events
    assert root.stage is Stage.STOPPED


def test_a_greeted_worker_that_is_not_alone_cannot_be_helped() -> None:
    root = session()
    root.greet(GREETING)
    hear(root, ACK)
    assert root.farewell() is None


def test_a_wrong_answer_is_final() -> None:
    root = session()
    root.greet(GREETING)
    with pytest.raises(RemoteProtocolError, match="expected its ACK to the greeting, found b'HTTP'"):
        hear(root, b"HTTP/1.1 400")
    with pytest.raises(RemoteProtocolError):
        root.go()


def test_hello_is_for_the_network_configuration_alone() -> None:
    root = session()
    root.greet(GREETING)
    with pytest.raises(RemoteProtocolError, match="expected its ACK"):
        hear(root, HELLO)


def test_nothing_may_be_said_before_the_answer() -> None:
    root = session()
    root.greet(GREETING)
    assert root.answer_due
    with pytest.raises(LocalProtocolError, match="expecting its ACK to the greeting"):
        root.go()
    assert hear(root, ACK[:3]) is None
    assert hear(root, ACK[3:]) == Acknowledged(ours=False)
    with pytest.raises(LocalProtocolError, match="comes after making the mesh"):
        root.configure_network(NETWORK)


def test_a_refusal_and_its_reason_may_come_in_pieces() -> None:
    root, _ = configured_network(MODEL)
    root.configure_node(NODES[1])
    said = encode_refusal("a memory limit of 1MiB\x1b[2J: 2MiB would do, süß")
    for end in range(len(said) - 1):
        assert hear(root, said[end : end + 1]) is None
    assert hear(root, said[-1:]) == Refused("a memory limit of 1MiB?[2J: 2MiB would do, süß")
    assert root.dead
    root.eof()  # nothing else can come


def test_a_worker_refuses_where_it_owes_an_answer_to_the_node_configuration() -> None:
    root, worker = configured_network(NO_MODEL)
    assert worker.wire.refuse("too early") == b""
    worker.wire.receive_data(root.configure_node(NODES[1]))
    assert isinstance(worker.wire.next_event(), NodeReceived)
    said = worker.wire.refuse("x" * 5000)
    assert hear(root, said) == Refused("x" * MAX_REASON_BYTES)
    assert worker.wire.expecting == "the end of the connection"
    worker.wire.eof()
    assert worker.wire.refuse("again") == b""


def test_a_worker_of_another_kind_cannot_refuse() -> None:
    root = session()
    root.greet(GREETING)
    hear(root, ACK)
    root.go()
    root.configure_network(NETWORK)
    hear(root, ACK)
    root.configure_node(NODES[1])
    with pytest.raises(RemoteProtocolError, match="expected its ACK to the node configuration, found b'dai"):
        hear(root, encode_refusal("no"))


def test_a_reason_is_not_long() -> None:
    root, _ = configured_network(MODEL)
    root.configure_node(NODES[1])
    with pytest.raises(RemoteProtocolError, match="expected a reason of at most 2048 bytes, found one of 1000000"):
        hear(root, REFUSAL + struct.pack("<I", 1_000_000))


def test_a_worker_may_not_speak_unasked() -> None:
    root = configured()
    root.receive_data(b"xyz")
    with pytest.raises(RemoteProtocolError, match="said 3 bytes that nobody asked for"):
        root.control(Control(0, 1))


@pytest.mark.parametrize("say", [lambda root: None, lambda root: root.control(Control(0, 1))])
def test_a_worker_may_not_leave(say: Callable[[RootSession], object]) -> None:
    root = configured()
    say(root)
    with pytest.raises(RemoteProtocolError, match="closed the connection"):
        root.eof()


def test_a_session_cannot_end_within_a_pass() -> None:
    root = configured()
    root.control(Control(0, 1))
    assert root.farewell() is None
