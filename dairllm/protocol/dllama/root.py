"""The root's end of the link to one worker: what to say next, and what the worker's bytes mean. Without a socket.

    greet > Acknowledged | go | network > Acknowledged | node > Acknowledged | (weights) | end_weights > Acknowledged |
    (control > (views | Filled) for each exchange with this worker)* | stop

What the worker says is a word for each ``> Acknowledged``, and rows of pipes after each control packet, as on a link of the mesh. The
bytes of weights are the owner's to send, between its node's acknowledgement and `end_weights`.

*Our own workers.* The network configuration bears a marker where a C++ worker does not look; a worker of ours answers it with a word of its
own (``codec.HELLO``) and the identity of the model that it has, if it has one. Such a worker may answer its node configuration with a
refusal and the reason. To such a worker the node configuration is preceded by
references to its weights, or by none where its model is another. Then both kinds go on alike.

*Leaving.* A C++ worker whose root goes away before the weights are complete ends its process. So a session that is given up is told to its
end, with nothing in it: see `farewell`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from dairllm.errors import LocalProtocolError
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


@dataclass(frozen=True, slots=True)
class _Owed:
    """An answer that the worker has not given yet."""

    to: str
    may_be_hello: bool = False
    may_be_refusal: bool = False
    is_model: bool = False
    """Whether it is what follows a HELLO."""
    reason_bytes: int = -1
    """Where it is what follows a refusal: of the reason, once that is known."""
    is_reason: bool = False


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
        self._owed: _Owed | None = None
        self._n_workers = 0
        self._alone = False
        self._model = NO_MODEL
        self._ours = False  # as far as it has told: it knows what a refusal is

    def __repr__(self) -> str:
        return f"<RootSession node {self.node}, {'dead' if self.dead else self._stage.value}, expecting {self.expecting}>"

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def answer_due(self) -> bool:
        """True while the worker owes an answer: nothing may be said before it."""
        return self._owed is not None

    @property
    def expecting(self) -> str:
        if self._owed is not None:
            return f"its ACK to {self._owed.to}"
        return super().expecting if self._stage is Stage.READY else "nothing: it is our turn"

    # What to say: bytes for the worker.

    def greet(self, greeting: Greeting) -> bytes:
        self._n_workers = greeting.n_workers
        return self._say(Stage.CONNECTED, Stage.GREETING, encode_greeting(greeting), _Owed("the greeting"))

    def go(self) -> bytes:
        """Every worker has acknowledged its greeting."""
        return self._say(Stage.GREETING, Stage.GO, encode_ack())

    def configure_network(self, network: NetworkConfig) -> bytes:
        data = encode_network(network, MARKER)
        return self._say(Stage.GO, Stage.NETWORK, data, _Owed("the network configuration", may_be_hello=True))

    def configure_node(self, node: NodeConfig, references: Sequence[WeightReference] = ()) -> bytes:
        """From the acknowledgement on, weights may be sent; none where there are `references`.

        Raises:
            LocalProtocolError: references for a worker that has told no model; or it is not our turn.
        """
        has_model = self._model != NO_MODEL
        if references and not has_model:
            raise LocalProtocolError("references to weights are for a worker that has told its model")
        data = (write_references(references) if has_model else b"") + encode_node(node)
        return self._say(Stage.NETWORK, Stage.NODE, data, _Owed("the node configuration", may_be_refusal=self._ours))

    def end_weights(self) -> bytes:
        return self._say(Stage.NODE, Stage.WEIGHTS, encode_weights_end(), _Owed("the end of the weights"))

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
        if self._owed is None:
            return self._next_filled()
        if self._owed.is_model:
            return self._next_model()
        if self._owed.is_reason:
            return self._next_refused(self._owed)
        word = self._intake.take(len(ACK))
        if word is None:
            return None
        if word == REFUSAL and self._owed.may_be_refusal:
            self._owed = _Owed("the node configuration: why it refuses", is_reason=True)
            return self._next_refused(self._owed)
        if word == HELLO and self._owed.may_be_hello:
            self._ours = True
            self._owed = _Owed("the network configuration: its model", is_model=True)
            return self._next_model()
        ours = word == HELLO_1 and self._owed.may_be_hello
        if not ours and word != ACK:
            raise self._fail(f"expected {self.expecting}, found {word!r}")
        self._owed = None
        if self._stage is Stage.WEIGHTS:
            self._stage = Stage.READY
        return Acknowledged(ours)

    def _next_model(self) -> Acknowledged | None:
        model = self._intake.take(IDENTITY_BYTES)
        if model is None:
            return None
        self._model, self._owed = model, None
        return Acknowledged(True, model)

    def _next_refused(self, owed: _Owed) -> Refused | None:
        size = owed.reason_bytes
        if size < 0:
            word = self._intake.take(U32.size)
            if word is None:
                return None
            (size,) = U32.unpack(word)
            if size > MAX_REASON_BYTES:
                raise self._fail(f"expected a reason of at most {MAX_REASON_BYTES} bytes, found one of {size}")
            self._owed = replace(owed, reason_bytes=size)
        text = self._intake.take(size)
        if text is None:
            return None
        reason = "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))
        self._fail(f"refused: {reason}")
        return Refused(reason)

    def eof(self) -> None:
        """The worker has closed the connection, which only a goodbye asks it to.

        Raises:
            RemoteProtocolError: it was not told to.
        """
        if self.dead or self._stage is Stage.STOPPED:
            return
        raise self._fail(f"closed the connection; expecting {self.expecting}")

    def _say(self, after: Stage, stage: Stage, data: bytes, owed: _Owed | None = None) -> bytes:
        self._check_turn(after)
        self._stage, self._owed = stage, owed
        return data

    def _check_turn(self, after: Stage) -> None:
        self._check_alive()
        if self._owed is not None or self._stage is not after:
            raise LocalProtocolError(f"this comes after {after.value}; here is {self._stage.value}, expecting {self.expecting}")


def _empty_network(n_nodes: int) -> NetworkConfig:
    return NetworkConfig(1, n_nodes, (Pipe("POS", Size(FloatType.F32, 1, 1, 1)),), ())
