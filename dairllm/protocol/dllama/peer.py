"""The receiving end of a link of the mesh: a peer sends its slices of pipe rows and nothing else."""

from dairllm.graph.plan import Exchange, Run
from dairllm.graph.types import NetworkConfig
from dairllm.protocol.dllama.events import Filled
from dairllm.protocol.dllama.rows import RowsLink

__all__ = ["PeerLink"]


class PeerLink(RowsLink):
    """One peer's slices; see ``Link`` for how bytes get in.

    A peer may be ahead of our own control packet by what the read-ahead holds; the rest waits with it. Between tokens (``idle``) its
    silence has no deadline.

    Args:
        network: the session's network.
        plan: our own ``token_plan``.
        peer: the node number of the peer.
    """

    def __init__(self, network: NetworkConfig, plan: tuple[Run | Exchange, ...], peer: int) -> None:
        super().__init__(f"node {peer}", network, plan, peer)

    def __repr__(self) -> str:
        return f"<PeerLink node {self.node}, {'dead' if self.dead else 'idle' if self.idle else 'expecting ' + self.expecting}>"

    def next_event(self) -> Filled | None:
        """Filled when the views of the last ``receive_into`` are full."""
        return self._next_filled()

    def eof(self) -> None:
        """The peer has closed the connection; only between tokens may it.

        Raises:
            RemoteProtocolError: rows are due, or bytes that nobody asked for were left.
        """
        if self.dead or (self.idle and not self._intake.available):
            return
        raise self._fail(f"closed the connection; expecting {self.expecting}")
