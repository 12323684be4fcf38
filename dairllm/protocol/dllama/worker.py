"""The worker's end of the link to the root: bytes in, events out, without a socket.

Theory. The wire has no frames; position in the stream is the state. So one generator, ``_conversation``, *is* the protocol: it reads
as the exchange is told, and yields to the session what it waits for:

    Need(n)         n bytes from the root
    an event        for the owner
    _Consent        the owner must ``acknowledge()``: with ACK, or where a root of ours has shown itself, HELLO and the model that it has
                    or, once the configuration is complete, say to a root of ours why not: ``refuse()``
    _Payload(n)     n bytes whose destination the owner gives with ``receive_into()``

    Greeting > ACK | Go | NetworkReceived > ACK | NodeReceived > ACK | (WeightHeader > views | WeightReceived)* | WeightsEnd > ACK |
    (Control | (> views | Filled) for each exchange with the root)* | Stop

A lost position cannot be found again: after the first error of the root the session is dead.
"""

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum

from dairllm.errors import GraphError, LocalProtocolError, RemoteProtocolError
from dairllm.graph.plan import ROOT, token_plan
from dairllm.graph.references import NO_MODEL, WeightReference
from dairllm.graph.types import NetworkConfig
from dairllm.protocol.dllama.codec import (
    ACK,
    HELLO,
    HELLO_1,
    KIN,
    Control,
    Greeting,
    WeightHeader,
    encode_refusal,
    read_ack,
    read_control,
    read_greeting,
    read_network,
    read_node,
    read_weight_header,
)
from dairllm.protocol.dllama.events import Event, Filled, Go, NetworkReceived, NodeReceived, Stop, WeightReceived, WeightsEnd
from dairllm.protocol.dllama.limits import DEFAULT_LIMITS, Limits
from dairllm.protocol.dllama.link import IncomingRows, Link, incoming_rows
from dairllm.protocol.dllama.references import read_references
from dairllm.protocol.stream import Need

__all__ = ["Stage", "WorkerSession"]


class Stage(Enum):
    """How far the conversation is; each lasts until its last byte has come and its ACK is given."""

    GREETING = "greeting"
    GO = "go"
    NETWORK = "network configuration"
    NODE = "node configuration"
    WEIGHTS = "weights"
    CONTROL = "control packet"
    ROWS = "pipe rows"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Consent:
    to: str
    word: bytes = ACK
    may_be_refused: bool = False


@dataclass(frozen=True, slots=True)
class _Payload:
    nbytes: int
    what: str
    end_is_event: bool
    """Whether ``Filled`` tells of the last piece too: where no other event does."""


_Step = Need | _Consent | _Payload | Event


class WorkerSession(Link):
    """One root's session; see ``Link`` for how bytes get in, and the events for what comes out.

    Raises only RemoteProtocolError (the root's mistakes, final) and LocalProtocolError (ours); anything else is a bug.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__("root")
        self._limits = limits
        self._stage = Stage.GREETING
        self._model = NO_MODEL  # that the root has been told
        self._kin = False
        self._script = self._conversation()
        self._step: _Step | None = next(self._script)

    def close(self) -> None:
        """The owner is done with it: it gives up its memory, which it would hold itself, as a circle."""
        self._script.close()
        self._step = None
        self._intake.release()

    def __repr__(self) -> str:
        state = "dead" if self.dead else self._stage.value
        return f"<WorkerSession {state}, {self.bytes_received} bytes received, expecting {self.expecting}>"

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def ack_due(self) -> bool:
        """True while the owner owes the root an ACK."""
        return isinstance(self._step, _Consent)

    @property
    def expecting(self) -> str:
        match self._step:
            case Need(nbytes, what):
                return f"{what} ({nbytes} bytes)"
            case _Payload(_, what):
                return f"{self._payload_pending} more of {what}"
            case _Consent(to, _):
                return f"our own ACK to {to}"
            case _:  # an event is taken by the call that finds it
                return "the end of the connection"

    def acknowledge(self, model: bytes = NO_MODEL) -> bytes:
        """The bytes that consent to the last event.

        Args:
            model: identity of the model that the owner has. Told where the root asks, with its network configuration.

        Raises:
            LocalProtocolError: no ACK is due.
        """
        self._check_alive()
        step = self._step
        if not isinstance(step, _Consent):
            raise LocalProtocolError(f"no ACK is due; expecting {self.expecting}")
        word = step.word
        if word == HELLO:
            self._model = model
            word += model
        self._advance(b"")
        return word

    def refuse(self, reason: str) -> bytes:
        """The bytes that tell a root of ours why the owner does not do its part, in place of `acknowledge`; the session is over with them.
        Nothing where no such answer is due, or to a root of distributed-llama, which could not understand it.
        """
        step = self._step
        if self.dead or not isinstance(step, _Consent) or not step.may_be_refused or not self._kin:
            return b""
        self._script.close()
        self._step = None
        return encode_refusal(reason)

    def next_event(self) -> Event | None:
        """What the root said next; None while its bytes have not all come, or while the owner has to act first (ACK, memory)."""
        self._check_alive()
        while True:
            step = self._step
            if isinstance(step, Need):
                data = self._intake.take(step.nbytes)
                if data is None:
                    return None
                self._advance(data)
            elif isinstance(step, _Payload):
                if not self._take_filled():
                    return None
                last = not self._remaining
                if last:
                    self._advance(b"")
                if not last or step.end_is_event:
                    return Filled()
            elif step is None or isinstance(step, _Consent):
                return None
            else:
                self._advance(b"")
                return step

    def eof(self) -> None:
        """The root has closed the connection.

        Raises:
            RemoteProtocolError: it may not at this point; only before the first byte, after a refusal, and after Stop.
        """
        if self.dead or self._stage is Stage.STOPPED or self._step is None or not self.bytes_received:
            return
        raise self._fail(f"closed the connection; expecting {self.expecting}")

    def _advance(self, data: bytes) -> None:
        """Let the conversation go on to its next step."""
        try:
            self._step = self._script.send(data)
        except StopIteration:
            self._step = None
        except RemoteProtocolError as error:
            raise self._fail(str(error)) from error
        if isinstance(self._step, _Payload):
            self._remaining = self._step.nbytes

    # The protocol, as a story.

    def _conversation(self) -> Generator[_Step, bytes, None]:
        greeting = yield from read_greeting(self._limits)
        yield greeting
        yield _Consent("the greeting")
        self._stage = Stage.GO
        yield from read_ack('the root\'s "go"')
        yield Go()
        network, incoming = yield from self._configuration(greeting)
        yield from self._weights()
        yield from self._inference(network, incoming)
        self._stage = Stage.STOPPED
        yield Stop()

    def _configuration(self, greeting: Greeting) -> Generator[_Step, bytes, tuple[NetworkConfig, tuple[IncomingRows, ...]]]:
        """Returns the network, and what comes from the root after each control packet."""
        self._stage = Stage.NETWORK
        network, marker = yield from read_network(self._limits)
        if network.n_nodes != greeting.n_workers + 1:
            raise RemoteProtocolError(f"expected a network of {greeting.n_workers + 1} nodes, found {network.n_nodes}")
        yield NetworkReceived(network, marker)
        word = _word_for(marker)
        yield _Consent("the network configuration", word)
        self._kin = word == HELLO
        self._stage = Stage.NODE
        references: tuple[WeightReference, ...] = ()
        if self._model != NO_MODEL:
            references = yield from read_references(self._limits)
        node = yield from read_node(self._limits)
        if node.node != greeting.node:
            raise RemoteProtocolError(f"expected the configuration of node {greeting.node}, found that of node {node.node}")
        try:
            plan = token_plan(network, node)
        except GraphError as error:
            raise RemoteProtocolError(f"a graph that cannot be run: {error}") from error
        yield NodeReceived(network, node, plan, references)
        yield _Consent("the node configuration", may_be_refused=True)
        return network, incoming_rows(network, plan, ROOT)

    def _weights(self) -> Generator[_Step, bytes, None]:
        self._stage = Stage.WEIGHTS
        while (header := (yield from read_weight_header(self._limits))) is not None:
            yield header
            yield _Payload(header.nbytes, _describe(header), end_is_event=False)
            yield WeightReceived(header)
        yield WeightsEnd()
        yield _Consent("the weights")

    def _inference(self, network: NetworkConfig, incoming: tuple[IncomingRows, ...]) -> Generator[_Step, bytes, None]:
        rows, payloads = 0, list[_Payload]()  # one token after the other has the same
        while True:
            self._stage = Stage.CONTROL
            control: Control = yield from read_control(self._limits, network.n_batches)
            if not control.rows:
                return
            self._stage = Stage.ROWS
            yield control
            if control.rows != rows:
                rows = control.rows
                payloads = [_Payload(each.row_bytes * rows, each.describe(rows), end_is_event=True) for each in incoming]
            for payload in payloads:  # noqa: UP028  # a list cannot be sent what a script is sent
                yield payload


def _word_for(marker: bytes) -> bytes:
    """The answer to a network configuration. A version that we do not know is answered with the latest that we do."""
    if not marker.startswith(KIN):
        return ACK
    return HELLO_1 if marker == KIN + b"1" else HELLO


def _describe(header: WeightHeader) -> str:
    return f"{header.nbytes} bytes of weight {header.name} of layer {header.index} at offset {header.offset}"
