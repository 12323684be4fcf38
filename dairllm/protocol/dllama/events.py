"""What a root says to a worker and the worker to it, one event a message. ``Greeting``, ``WeightHeader`` and ``Control`` are the codec's
own messages."""

from dataclasses import dataclass

from dairllm.graph.plan import Exchange, Run
from dairllm.graph.references import NO_MODEL, WeightReference
from dairllm.graph.types import NetworkConfig, NodeConfig
from dairllm.protocol.dllama.codec import Control, Greeting, WeightHeader

__all__ = [
    "Acknowledged",
    "Control",
    "Event",
    "Filled",
    "Go",
    "Greeting",
    "NetworkReceived",
    "NodeReceived",
    "Refused",
    "Stop",
    "WeightHeader",
    "WeightReceived",
    "WeightsEnd",
]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A worker has answered; `ours`: with the word of a worker of ours, which only the network configuration asks for.

    `model` is then the identity of the model that it has."""

    ours: bool
    model: bytes = NO_MODEL


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker of ours does not do its part, and says why; its session is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Go:
    """Every worker has answered the root: time to build the mesh."""


@dataclass(frozen=True, slots=True)
class NetworkReceived:
    """`marker` is what stood behind the NUL of a pipe's name; a C++ root leaves none (b"")."""

    network: NetworkConfig
    marker: bytes


@dataclass(frozen=True, slots=True)
class NodeReceived:
    """The configuration is complete; `plan` is ``token_plan(network, node)``.

    `references` are what the root says in place of weights to a worker that has told its model: none where it has another one."""

    network: NetworkConfig
    node: NodeConfig
    plan: tuple[Run | Exchange, ...]
    references: tuple[WeightReference, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightReceived:
    """All bytes of `header` have come."""

    header: WeightHeader


@dataclass(frozen=True, slots=True)
class WeightsEnd:
    """No more weights come. Whether all came that the graph needs is for the owner of the memory to say."""


@dataclass(frozen=True, slots=True)
class Filled:
    """The views of the last ``receive_into`` are full."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The root has no more to say; the worker closes the connection."""


Event = Greeting | Go | NetworkReceived | NodeReceived | WeightHeader | WeightReceived | WeightsEnd | Control | Filled | Stop
