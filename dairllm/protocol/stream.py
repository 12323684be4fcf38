"""Bytes in, without a socket: a generator that says what it needs, and the place where bytes land until it gets them.

A parser is a generator that yields ``Need(n, what)`` and is sent exactly n bytes; several-step messages read as straight-line code,
and the same parser reads from a stream (``Intake``) or from bytes in hand (``parse_all``).

``Intake`` hands out the memory that the next bytes of a stream go to: a small read-ahead for what must be parsed, or the
destination itself once that is known, so that bulk data (weights, pipe rows) is not copied. Only what had already been read ahead when
its destination became known is copied, at most READ_AHEAD bytes.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from dairllm.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["READ_AHEAD", "Intake", "Need", "Parser", "parse_all"]

READ_AHEAD = 64 * 1024
"""Bytes that a stream may be ahead of us; more stays with the sender (TCP's windows). Larger than any one ``Need``."""


@dataclass(frozen=True, slots=True)
class Need:
    """A parser's request for exactly `nbytes` bytes; `what` names them for people."""

    nbytes: int
    what: str


_T = TypeVar("_T")
Parser = Generator[Need, bytes, _T]


def parse_all(parser: Parser[_T], data: bytes) -> _T:
    """Run `parser` over `data`, which must hold one whole message and nothing else.

    Raises:
        RemoteProtocolError: from the parser, or since bytes are missing or left over.
    """
    offset, piece = 0, None
    while True:
        try:
            need = next(parser) if piece is None else parser.send(piece)
        except StopIteration as stop:
            if offset != len(data):
                raise RemoteProtocolError(f"byte {offset}: expected the end, found {len(data) - offset} more bytes") from None
            result: _T = stop.value
            return result
        piece = data[offset : offset + need.nbytes]
        if len(piece) < need.nbytes:
            parser.close()
            raise RemoteProtocolError(f"byte {offset}: expected {need.nbytes} bytes of {need.what}, found {len(piece)}")
        offset += need.nbytes


class Intake:
    """Where the bytes of one stream land: ``get_buffer`` gives memory, ``buffer_updated`` says how much of it was filled."""

    __slots__ = ("_ahead", "_end", "_start", "_targets", "total")

    def __init__(self, read_ahead: int = READ_AHEAD) -> None:
        self._ahead = memoryview(bytearray(read_ahead))
        self._start = self._end = 0
        self._targets: deque[memoryview] = deque()
        self.total = 0
        """Bytes received since the beginning of the stream."""

    @property
    def available(self) -> int:
        """Bytes read ahead that nobody has taken."""
        return self._end - self._start

    @property
    def consumed(self) -> int:
        """Position in the stream of the next byte that will be taken."""
        return self.total - self.available

    @property
    def filling(self) -> bool:
        """True while a destination given to ``receive_into`` is not full."""
        return bool(self._targets)

    @property
    def missing(self) -> int:
        """Bytes that the given destinations still lack."""
        return sum(map(len, self._targets))

    @property
    def has_room(self) -> bool:
        """False when nothing more can be accepted before somebody takes what is here."""
        return bool(self._targets) or self.available < len(self._ahead)

    def get_buffer(self) -> memoryview:
        """Writable memory for the next bytes; empty exactly when ``has_room`` is False."""
        if self._targets:
            return self._targets[0]
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._ahead) - self._end < self._start:  # moved down before the room behind gets small, or it is read in crumbs
            kept = bytes(self._ahead[self._start : self._end])
            self._ahead[: len(kept)] = kept
            self._start, self._end = 0, len(kept)
        return self._ahead[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """The first `nbytes` bytes of what ``get_buffer`` last gave have been written."""
        room = len(self._targets[0]) if self._targets else len(self._ahead) - self._end
        if not 0 <= nbytes <= room:
            raise LocalProtocolError(f"{nbytes} bytes were written into a buffer of {room}")
        self.total += nbytes
        if self._targets:
            self._advance(nbytes)
        else:
            self._end += nbytes

    def take(self, nbytes: int) -> bytes | None:
        """The next `nbytes` bytes, or None while they have not all come."""
        if self.available < nbytes:
            return None
        data = bytes(self._ahead[self._start : self._start + nbytes])
        self._start += nbytes
        return data

    def receive_into(self, targets: tuple[memoryview, ...]) -> None:
        """Let the next bytes of the stream fill `targets`, one after the other; what was read ahead is moved there now."""
        for target in targets:
            if len(target):
                self._targets.append(target)
        while self._targets and self._start < self._end:
            nbytes = min(self.available, len(self._targets[0]))
            self._targets[0][:nbytes] = self._ahead[self._start : self._start + nbytes]
            self._start += nbytes
            self._advance(nbytes)

    def release(self) -> None:
        """Forget destinations and bytes in hand: the stream is dead."""
        self._targets.clear()
        self._start = self._end = 0

    def _advance(self, nbytes: int) -> None:
        target = self._targets[0]
        if nbytes == len(target):
            self._targets.popleft()
        else:
            self._targets[0] = target[nbytes:]
