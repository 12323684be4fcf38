"""What both kinds of link have in common: an ``Intake``, the rule that an error is final, and the order of pipe rows within a token."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.plan import Exchange, Run
from dairllm.graph.types import NetworkConfig
from dairllm.protocol.stream import Intake

__all__ = ["IncomingRows", "Link", "incoming_rows"]

_DRAIN = 4096


@dataclass(frozen=True, slots=True)
class IncomingRows:
    """The rows of one exchange that come over one link: `row_bytes` bytes a row."""

    pipe: str
    slice: int | None
    row_bytes: int

    def describe(self, rows: int) -> str:
        part = "" if self.slice is None else f", slice {self.slice}"
        return f"{self.row_bytes * rows} bytes of pipe {self.pipe}{part}, rows 0..{rows - 1}"


def incoming_rows(network: NetworkConfig, plan: Iterable[Run | Exchange], peer: int) -> tuple[IncomingRows, ...]:
    """What node `peer` sends us after each control packet, in order."""
    known: dict[int, tuple[IncomingRows, ...]] = {}  # a plan has a handful of different exchanges, each with a transfer per node

    def rows(step: Exchange) -> tuple[IncomingRows, ...]:
        if id(step) not in known:
            name = network.pipes[step.pipe].name
            known[id(step)] = tuple(IncomingRows(name, t.slice, t.row_bytes) for t in step.receives if t.node == peer)
        return known[id(step)]

    steps = list(plan)  # which keeps them alive, and so their ids apart
    return tuple(each for step in steps if isinstance(step, Exchange) for each in rows(step))


class Link(ABC):
    """The receiving end of one connection; subclasses know what its bytes mean.

    The transport reads into ``get_buffer()`` and at once calls ``buffer_updated(n)``; when ``wants_data`` is False afterwards it stops
    reading until the owner has acted. A mistake of the peer raises RemoteProtocolError from ``next_event`` or ``eof``; from then on the
    link is dead: whatever would lead on raises the same again, and what still arrives is dropped. A mistake of the owner raises
    LocalProtocolError and changes nothing.
    """

    def __init__(self, peer_name: str) -> None:
        self._peer_name = peer_name
        self._intake = Intake()
        self._error: str | None = None
        self._remaining = 0  # bytes of the payload at hand that no view has been given for
        self._filling = False

    @property
    @abstractmethod
    def expecting(self) -> str:
        """What must come next, for people."""

    @property
    def dead(self) -> bool:
        """True after an error of the peer."""
        return self._error is not None

    @property
    def bytes_received(self) -> int:
        return self._intake.total

    @property
    def wants_data(self) -> bool:
        """False while nothing can be accepted: the read-ahead is full and the owner has to act first."""
        return self.dead or self._intake.has_room

    @property
    def memory_due(self) -> int:
        """Bytes of the payload at hand that the owner has to give memory for now (``receive_into``); 0 where it has nothing to give."""
        return 0 if self._filling else self._remaining

    def get_buffer(self) -> memoryview:
        """Where the next bytes of the connection go. Empty exactly when ``wants_data`` is False."""
        if self.dead:  # asyncio may still ask after the connection is lost
            return memoryview(bytearray(_DRAIN))
        return self._intake.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes have been written to what ``get_buffer`` gave. Says nothing of what they mean: ask ``next_event``."""
        if not self.dead:
            self._intake.buffer_updated(nbytes)

    def receive_data(self, data: bytes) -> int:
        """The slow way in: copy `data` to where it belongs. Returns how much was accepted; the rest waits until the owner has acted."""
        accepted = 0
        while accepted < len(data) and self.wants_data:
            buffer = self.get_buffer()
            piece = data[accepted : accepted + len(buffer)]
            buffer[: len(piece)] = piece
            self.buffer_updated(len(piece))
            accepted += len(piece)
        return accepted

    def receive_into(self, *views: memoryview) -> None:
        """Give the memory for the next bytes of the payload at hand; ``next_event`` says when it is full.

        `views` are writable and contiguous, of any item type, and are filled in order. Together they may hold less than the payload:
        then more are asked for after ``Filled``. Bytes that had been read ahead are moved there at once.

        Raises:
            LocalProtocolError: no payload is due, or the views are read-only or larger than it.
        """
        self._check_alive()
        if not self.memory_due:
            raise LocalProtocolError(f"no memory is wanted now; expecting {self.expecting}")
        targets = tuple(map(_as_bytes, views))
        total = sum(map(len, targets))
        if not 0 < total <= self._remaining:
            raise LocalProtocolError(f"{total} bytes of memory given for {self._remaining} bytes; expecting {self.expecting}")
        self._remaining -= total
        self._filling = True
        self._intake.receive_into(targets)

    def _take_filled(self) -> bool:
        """True once for each ``receive_into`` whose views are full."""
        if not self._filling or self._intake.filling:
            return False
        self._filling = False
        return True

    @property
    def _payload_pending(self) -> int:
        return self._remaining + self._intake.missing

    def _fail(self, problem: str) -> RemoteProtocolError:
        """Make the link dead; the caller raises what is returned."""
        self._error = f"{self._peer_name}, byte {self._intake.consumed}: {problem}"
        self._intake.release()
        return RemoteProtocolError(self._error)

    def _check_alive(self) -> None:
        if self._error is not None:
            raise RemoteProtocolError(self._error)


def _as_bytes(view: memoryview) -> memoryview:
    try:
        flat = view.cast("B")
    except (TypeError, ValueError) as error:
        raise LocalProtocolError(f"memory to receive into must be contiguous: {error}") from error
    if flat.readonly:
        raise LocalProtocolError("memory to receive into must be writable")
    return flat
