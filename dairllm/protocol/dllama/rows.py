"""A link whose other end sends slices of pipe rows: which are due, in which order, within a pass."""

from dairllm.errors import LocalProtocolError
from dairllm.graph.plan import Exchange, Run
from dairllm.graph.types import NetworkConfig
from dairllm.protocol.dllama.events import Filled
from dairllm.protocol.dllama.link import Link, incoming_rows

__all__ = ["RowsLink"]


class RowsLink(Link):
    """One node's rows; see ``Link`` for how bytes get in.

    Args:
        name: of the other end, for messages.
        network: the session's network.
        plan: our own ``token_plan``.
        node: the node number of the other end.
    """

    def __init__(self, name: str, network: NetworkConfig, plan: tuple[Run | Exchange, ...], node: int) -> None:
        super().__init__(name)
        self.node = node
        self._per_token = incoming_rows(network, plan, node)
        self._rows, self._position = 0, len(self._per_token)  # rows of this token, and which of its exchanges is due

    @property
    def idle(self) -> bool:
        """True while nothing is due before the next ``begin``."""
        return self._position == len(self._per_token)

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

    def _next_filled(self) -> Filled | None:
        """Filled when the views of the last ``receive_into`` are full."""
        self._check_alive()
        if not self._take_filled():
            return None
        if not self._remaining:
            self._next_payload()
        return Filled()

    def _next_payload(self) -> None:
        self._position += 1
        if not self.idle:
            self._remaining = self._per_token[self._position].row_bytes * self._rows
