"""The receiving end of a link of the mesh: a peer sends its slices of pipe rows and nothing else."""

from dairllm.errors import LocalProtocolError
from dairllm.graph.plan import Exchange, Run
from dairllm.graph.types import NetworkConfig
from dairllm.protocol.dllama.events import Filled
from dairllm.protocol.dllama.link import Link, incoming_rows

__all__ = ["PeerLink"]


class PeerLink(Link):
    """One peer's slices; see ``Link`` for how bytes get in.

    A peer may be ahead of our own control packet by what the read-ahead holds; the rest waits with it. Between tokens (``idle``) its
    silence has no deadline.

    Args:
        network: the session's network.
        plan: our own ``token_plan``.
        peer: the node number of the peer.
    """

    def __init__(self, network: NetworkConfig, plan: tuple[Run | Exchange, ...], peer: int) -> None:
        super().__init__(f"node {peer}")
        self.node = peer
        self._per_token = incoming_rows(network, plan, peer)
        self._rows, self._position = 0, len(self._per_token)  # rows of this token, and which of its exchanges is due

    def __repr__(self) -> str:
        return f"<PeerLink node {self.node}, {'dead' if self.dead else 'idle' if self.idle else 'expecting ' + self.expecting}>"

    @property
    def idle(self) -> bool:
        """True while nothing is due before the next ``begin``."""
        return self._position == len(self._per_token)

    @property
    def awaits_peer(self) -> bool:
        """True while memory waits for the peer's bytes."""
        return self._filling

    @property
    def expecting(self) -> str:
        if self.idle:
            return "nothing before the next control packet"
        return f"{self._payload_pending} more of {self._per_token[self._position].describe(self._rows)}"

    def begin(self, rows: int) -> None:
        """A control packet of `rows` rows, one at least, has come: from here on the peer's bytes belong to it.

        Raises:
            LocalProtocolError: rows of the last one are still due.
        """
        self._check_alive()
        if not self.idle:
            raise LocalProtocolError(f"a control packet while expecting {self.expecting}")
        self._rows = rows
        self._position = -1
        self._next_payload()

    def next_event(self) -> Filled | None:
        """Filled when the views of the last ``receive_into`` are full."""
        self._check_alive()
        if not self._take_filled():
            return None
        if not self._remaining:
            self._next_payload()
        return Filled()

    def eof(self) -> None:
        """The peer has closed the connection; only between tokens may it.

        Raises:
            RemoteProtocolError: rows are due, or bytes that nobody asked for were left.
        """
        if self.dead or (self.idle and not self._intake.available):
            return
        raise self._fail(f"closed the connection; expecting {self.expecting}")

    def _next_payload(self) -> None:
        self._position += 1
        if not self.idle:
            self._remaining = self._per_token[self._position].row_bytes * self._rows
