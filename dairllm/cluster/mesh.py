"""The connections that workers make among themselves for one session.

A worker dials the peers that come after it in the root's list and is dialled by those before it (facts of the protocol: nobody says who
he is on these connections, and nothing may be said on them before the weights are complete). So a dialler is known by its source
address; among equal addresses, as on one machine, arrival order decides, which is the only rule that distributed-llama's worker has.

*Strangers.* Whoever comes from no address of the list is refused. Whoever speaks, or leaves, before this worker has acknowledged the end
of its weights is no peer either: its place is open again. Since a stranger may hold a place that a peer then asks for, a few more
connections than there are places are kept until `settle`, and only there is it decided who is who.

*Order of arrival.* Each worker first waits for all before it, then dials the last of the list first. So when a worker hears from one, all
that come before that one have reached every listener: arrival order is the list's order. A C++ worker dials the first first, so it may
still be on its way to another listener when we hear from it: hence a moment's pause.
"""

import asyncio
from collections.abc import Callable

from dairllm.config import Keepalive
from dairllm.errors import NetworkError
from dairllm.net.addresses import Address, resolve
from dairllm.net.dial import dial
from dairllm.net.transport import Connection
from dairllm.protocol.dllama.codec import Greeting
from dairllm.units import format_duration

__all__ = ["Mesh", "Refuse"]

SPARES = 8
"""Connections kept beyond the places there are."""

HEAD_START = 0.05
"""Seconds left to the workers before us to reach the workers after us."""

Refuse = Callable[[Connection, str, str], None]
"""Closes a connection, counts it under a kind (the second argument), says why in the log (the third)."""


class Mesh:
    """Made when the root has named the workers, before it is answered: from then on peers may come.

    Args:
        greeting: the root's list.
        addresses: those of each peer of the list, in its order.
        keepalive: for the connections that are dialled.
        patience: seconds that a peer may take to connect or to answer.
        refuse: ends a connection that is no peer's.
    """

    def __init__(
        self, greeting: Greeting, addresses: tuple[tuple[Address, ...], ...], keepalive: Keepalive, patience: float, refuse: Refuse
    ) -> None:
        self._greeting, self._addresses = greeting, addresses
        self._keepalive, self._patience, self._refuse = keepalive, patience, refuse
        self._before = range(greeting.index)  # positions in the list of peers, which leaves this worker out
        self._after = range(greeting.index, greeting.n_workers - 1)
        self._candidates: list[Connection] = []
        self._dialled: dict[int, Connection] = {}
        self._changed = asyncio.Event()
        self._settled = False

    @classmethod
    async def of(cls, greeting: Greeting, keepalive: Keepalive, patience: float, refuse: Refuse) -> "Mesh":
        """Resolve the names of the list.

        Raises:
            NetworkError: a name has no address, or resolving takes too long.
        """
        try:
            async with asyncio.timeout(patience):
                addresses = [await resolve(peer.host) for peer in greeting.peers]
        except TimeoutError:
            raise NetworkError(f"the names of the other workers could not be resolved within {format_duration(patience)}") from None
        return cls(greeting, tuple(addresses), keepalive, patience, refuse)

    def offer(self, connection: Connection) -> str | None:
        """Take a new connection as a possible peer's, or say why it is none."""
        if self._settled or not self._before:
            return "another root is being served, and no worker is expected to connect"
        if not any(connection.peer_address in self._addresses[k] for k in self._before):
            return "another root is being served, and no worker of its list has this address"
        if len(self._candidates) >= len(self._before) + SPARES:
            return "all workers have connected"
        self._candidates.append(connection)
        connection.on_early = self._dismiss
        self._changed.set()
        return None

    async def connect(self, own_address: Address | None) -> None:
        """Build the mesh: wait for the workers before this one, dial those after it.

        Args:
            own_address: the address of ours that the root dialled; peers know us by it, so we dial from it.

        Raises:
            NetworkError: a worker does not come or does not answer.
        """
        await self._complete()
        if self._before and self._after:
            await asyncio.sleep(HEAD_START)
        for k in reversed(self._after):
            self._dialled[k] = connection = await self._dial(k, own_address)
            connection.on_early = self._break

    async def settle(self) -> dict[int, Connection]:
        """Decide who is who; from here on peers may speak, so whoever calls attaches their links before it waits for anything.

        Returns:
            connections by node number.

        Raises:
            NetworkError: a worker is not there (any more).
        """
        await self._complete()
        for k, connection in self._dialled.items():
            if connection.has_ended or connection.bytes_received:
                raise NetworkError(f"{self._name(k)} spoke or left before its time")
        self._settled = True
        found = {**self._places(), **self._dialled}
        for connection in [*self._candidates, *found.values()]:
            connection.on_early = None
            if connection not in found.values():
                self._refuse(connection, "no_peer", "all workers have connected")
        return {self._node(k): connection for k, connection in found.items()}

    def close(self) -> None:
        """End all connections, those to peers once all that was sent has gone out."""
        for connection in (*self._candidates, *self._dialled.values()):
            connection.on_early = None
            if self._settled:
                connection.close()
            else:
                connection.abort()

    def abort(self) -> None:
        """End all connections now."""
        self._settled = False
        self.close()

    async def _complete(self) -> None:
        try:
            async with asyncio.timeout(self._patience):
                while len(self._places()) < len(self._before):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            places = self._places()
            missing = ", ".join(self._name(k) for k in self._before if k not in places)
            raise NetworkError(f"{missing} did not connect within {format_duration(self._patience)}") from None

    def _places(self) -> dict[int, Connection]:
        """Who has which place, as things stand. A peer with fewer addresses chooses first, so that one with more leaves it its own."""
        free = list(self._candidates)
        places: dict[int, Connection] = {}
        for k in sorted(self._before, key=lambda k: (len(self._addresses[k]), k)):
            connection = next((c for c in free if c.peer_address in self._addresses[k]), None)
            if connection is not None:
                free.remove(connection)
                places[k] = connection
        return places

    def _dismiss(self, connection: Connection) -> None:
        self._candidates.remove(connection)
        connection.on_early = None
        what = "spoke" if connection.bytes_received else "left"
        self._refuse(connection, "no_peer", f"it {what} before its time: no worker")
        self._changed.set()

    def _break(self, connection: Connection) -> None:
        connection.on_early = None
        connection.abort()

    async def _dial(self, k: int, own: Address | None) -> Connection:
        problem = "it has no address"
        for address in self._addresses[k]:
            # An address of another version or of loopback cannot reach it; the kernel then chooses one that can.
            fits = own is not None and (address.version, address.is_loopback) == (own.version, own.is_loopback)
            try:
                return await dial(address, self._greeting.peers[k].port, self._keepalive, self._patience, own if fits else None)
            except NetworkError as error:
                problem = str(error)
        raise NetworkError(f"{self._name(k)}: {problem}")

    def _node(self, k: int) -> int:
        """Node number of position k: the root is node 0, and this worker is left out of the list."""
        return k + 1 if k < self._greeting.index else k + 2

    def _name(self, k: int) -> str:
        peer = self._greeting.peers[k]
        return f"node {self._node(k)} ({peer.host}:{peer.port})"
