"""The root's end of the link to one worker: what to say next, and what the worker's bytes mean. Without a socket.

    greet > Acknowledged | go | network > Acknowledged | node > Acknowledged | (weights) | end_weights > Acknowledged |
    (control > (views | Filled) for each exchange with this worker)* | stop

What the worker says is a word for each ``> Acknowledged``, and rows of pipes after each control packet, as on a link of the
mesh. The bytes of weights are the owner's to send, between its node's acknowledgement and `end_weights`. One generator,
``_conversation``, tells it up to the first control packet: it yields the bytes that the worker owes, the events that they
make, and in between the turns in which it is ours to speak.

*Our own workers.* The network configuration bears a marker where a C++ worker does not look; a worker of ours answers it with a word of its
own (``codec.HELLO``) and the identity of the model that it has, if it has one. Such a worker may answer its node configuration with a
refusal and the reason. To such a worker the node configuration is preceded by
references to its weights, or by none where its model is another. Then both kinds go on alike.

*Leaving.* A C++ worker whose root goes away before the weights are complete ends its process. So a session that is given up is told to its
end, with nothing in it: see `farewell`.
"""

from collections.abc import Generator, Sequence
from enum import Enum

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.plan import Exchange, Run
from dairllm.graph.references import IDENTITY_BYTES, NO_MODEL, WeightReference
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig, Pipe, Size
from dairllm.protocol.dllama.codec import (
    ACK,
    HELLO,
    HELLO_1,
    MARKER,
    MAX_REASON_BYTES,
    REFUSAL,
    Control,
    Greeting,
    encode_ack,
    encode_control,
    encode_greeting,
    encode_network,
    encode_node,
    encode_stop,
    encode_weights_end,
)
from dairllm.protocol.dllama.events import Acknowledged, Filled, Refused
from dairllm.protocol.dllama.fields import U32
from dairllm.protocol.dllama.references import write_references
from dairllm.protocol.dllama.rows import RowsLink
from dairllm.protocol.stream import Need

__all__ = ["RootSession", "Stage"]


class Stage(Enum):
    """What was said last."""

    CONNECTED = "connection"
    GREETING = "greeting"
    GO = "making the mesh"
    NETWORK = "network configuration"
    NODE = "node configuration"
    WEIGHTS = "weights"
    READY = "inference"
    STOPPED = "goodbye"


class _OurTurn:
    """Nothing is owed: the owner says what comes next."""


_Step = Need | _OurTurn | Acknowledged | Refused
_OUR_TURN = _OurTurn()


class RootSession(RowsLink):
    """One worker's session; see ``Link`` for how its bytes get in.

    Args:
        network: of the graph.
        plan: the root's own ``token_plan``.
        node: the worker's node number.

    Raises only RemoteProtocolError (the worker's mistakes, final) and LocalProtocolError (ours); anything else is a bug.
    """

    def __init__(self, network: NetworkConfig, plan: tuple[Run | Exchange, ...], node: int) -> None:
        super().__init__("worker", network, plan, node)
        self._stage = Stage.CONNECTED
        self._script = _conversation()
        self._step: _Step = next(self._script)
        self._n_workers = 0
        self._alone = False
        self._model = NO_MODEL

    def __repr__(self) -> str:
        return f"<RootSession node {self.node}, {'dead' if self.dead else self._stage.value}, expecting {self.expecting}>"

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def answer_due(self) -> bool:
        """True while the worker owes an answer: nothing may be said before it."""
        return isinstance(self._step, Need)

    @property
    def expecting(self) -> str:
        if isinstance(self._step, Need):
            return f"its ACK to {self._step.what}"
        return super().expecting if self._stage is Stage.READY else "nothing: it is our turn"

    # What to say: bytes for the worker.

    def greet(self, greeting: Greeting) -> bytes:
        self._n_workers = greeting.n_workers
        return self._say(Stage.CONNECTED, Stage.GREETING, encode_greeting(greeting))

    def go(self) -> bytes:
        """Every worker has acknowledged its greeting."""
        return self._say(Stage.GREETING, Stage.GO, encode_ack())

    def configure_network(self, network: NetworkConfig) -> bytes:
        return self._say(Stage.GO, Stage.NETWORK, encode_network(network, MARKER))

    def configure_node(self, node: NodeConfig, references: Sequence[WeightReference] = ()) -> bytes:
        """From the acknowledgement on, weights may be sent; none where there are `references`.

        Raises:
            LocalProtocolError: references for a worker that has told no model; or it is not our turn.
        """
        has_model = self._model != NO_MODEL
        if references and not has_model:
            raise LocalProtocolError("references to weights are for a worker that has told its model")
        data = (write_references(references) if has_model else b"") + encode_node(node)
        return self._say(Stage.NETWORK, Stage.NODE, data)

    def end_weights(self) -> bytes:
        return self._say(Stage.NODE, Stage.WEIGHTS, encode_weights_end())

    def control(self, control: Control) -> bytes:
        """Set off a pass; from here on the worker's bytes belong to it.

        Raises:
            LocalProtocolError: it is not our turn, or rows of the last pass are still due.
            RemoteProtocolError: the worker said something that nobody asked for.
        """
        self._check_turn(Stage.READY)
        if self._intake.available:
            raise self._fail(f"said {self._intake.available} bytes that nobody asked for")
        self.begin(control.rows)
        return encode_control(control)

    def stop(self) -> bytes:
        self._check_turn(Stage.READY)
        self._stage = Stage.STOPPED
        return encode_stop()

    def farewell(self) -> bytes | None:
        """What to say next to end a session early and in good order, once what is owed has been answered; None where there is nothing.

        A connected worker is told that it is the only one; one that waits for the others ("go") cannot be helped: without them its mesh
        never comes to be. The owner has finished the weight that it was sending.
        """
        match self._stage:
            case Stage.CONNECTED:
                self._alone = True
                return self.greet(Greeting(1, 0, ()))
            case Stage.GREETING if self._alone:
                return self.go() + self.configure_network(_empty_network(2))
            case Stage.GO:
                return self.configure_network(_empty_network(self._n_workers + 1))
            case Stage.NETWORK:
                return self.configure_node(NodeConfig(1 if self._alone else self.node, (), ()))
            case Stage.NODE:
                return self.end_weights()
            case Stage.WEIGHTS | Stage.READY if self.idle:
                self._stage = Stage.READY
                return self.stop()
        return None

    # What comes.

    def next_event(self) -> Acknowledged | Refused | Filled | None:
        self._check_alive()
        while isinstance(self._step, Need):
            data = self._intake.take(self._step.nbytes)
            if data is None:
                return None
            self._advance(data)
        if isinstance(self._step, _OurTurn):
            return self._next_filled()
        event = self._step
        if isinstance(event, Refused):
            self._fail(f"refused: {event.reason}")
            return event
        self._advance(b"")
        if event.ours:
            self._model = event.model
        if self._stage is Stage.WEIGHTS:
            self._stage = Stage.READY
        return event

    def eof(self) -> None:
        """The worker has closed the connection, which only a goodbye asks it to.

        Raises:
            RemoteProtocolError: it was not told to.
        """
        if self.dead or self._stage is Stage.STOPPED:
            return
        raise self._fail(f"closed the connection; expecting {self.expecting}")

    def _say(self, after: Stage, stage: Stage, data: bytes) -> bytes:
        self._check_turn(after)
        self._stage = stage
        self._advance(b"")
        return data

    def _advance(self, data: bytes) -> None:
        """Let the conversation go on to its next step."""
        try:
            self._step = self._script.send(data)
        except RemoteProtocolError as error:
            raise self._fail(str(error)) from error

    def _check_turn(self, after: Stage) -> None:
        self._check_alive()
        if self.answer_due or self._stage is not after:
            raise LocalProtocolError(f"this comes after {after.value}; here is {self._stage.value}, expecting {self.expecting}")


def _empty_network(n_nodes: int) -> NetworkConfig:
    return NetworkConfig(1, n_nodes, (Pipe("POS", Size(FloatType.F32, 1, 1, 1)),), ())


def _conversation() -> Generator[_Step, bytes, None]:
    """The protocol up to the first control packet, as a story. It knows no session, so that it keeps none alive."""
    yield _OUR_TURN  # the greeting
    yield from _answer("the greeting")
    yield _OUR_TURN  # go
    yield _OUR_TURN  # the network configuration
    ours = yield from _hello("the network configuration")
    yield _OUR_TURN  # the node configuration
    yield from _answer("the node configuration", may_refuse=ours)
    yield _OUR_TURN  # weights, and their end
    yield from _answer("the end of the weights")
    yield _OUR_TURN  # pass after pass


def _answer(to: str, *, may_refuse: bool = False) -> Generator[_Step, bytes, None]:
    word = yield Need(len(ACK), to)
    if word == REFUSAL and may_refuse:
        why = f"{to}: why it refuses"
        (size,) = U32.unpack((yield Need(U32.size, why)))
        if size > MAX_REASON_BYTES:
            raise RemoteProtocolError(f"expected a reason of at most {MAX_REASON_BYTES} bytes, found one of {size}")
        text = (yield Need(size, why)).decode("utf-8", "replace")
        yield Refused("".join(c if c.isprintable() else "?" for c in text))
    if word != ACK:
        raise _unexpected(to, word)
    yield Acknowledged(False)


def _hello(to: str) -> Generator[_Step, bytes, bool]:
    """Returns whether it is a worker of ours that knows models and refusals."""
    word = yield Need(len(ACK), to)
    if word == HELLO:
        model = yield Need(IDENTITY_BYTES, f"{to}: its model")
        yield Acknowledged(True, model)
        return True
    if word not in (ACK, HELLO_1):
        raise _unexpected(to, word)
    yield Acknowledged(word == HELLO_1)
    return False


def _unexpected(to: str, word: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"expected its ACK to {to}, found {word!r}")
