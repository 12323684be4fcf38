"""The root's end of a link against the worker's end: two sessions that hear each other, without sockets."""

from collections.abc import Callable

import pytest

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.plan import token_plan
from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import ACK, HELLO, Control, Greeting, WeightHeader, encode_weight_header
from dairllm.protocol.dllama.events import Acknowledged, Filled, Stop, WeightReceived, WeightsEnd
from dairllm.protocol.dllama.root import RootSession, Stage
from dairllm.protocol.dllama.worker import WorkerSession

NETWORK, NODES = build_graph(small_spec(weight_type=FloatType.F32), 2, FloatType.F32)
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
    """A worker that hears a root and answers."""

    def __init__(self) -> None:
        self.wire, self.events = WorkerSession(), list[object]()

    def hear(self, data: bytes) -> bytes:
        answered, at = b"", 0
        while True:
            event = self.wire.next_event()
            if event is not None:
                self.events.append(event)
            elif self.wire.ack_due:
                answered += self.wire.acknowledge()
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
    assert worker.hear(root.configure_network(NETWORK)) == HELLO
    assert hear(root, HELLO) == Acknowledged(ours=True)
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
