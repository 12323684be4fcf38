"""Recorded sessions of the C++ root and worker, and an owner that serves a session as a worker would."""

import gzip
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from dairllm.protocol.dllama.events import Event
from dairllm.protocol.dllama.worker import WorkerSession

DATA = Path(__file__).parents[2] / "data" / "dllama"
NAMES = ("llama_q40", "llama_f32", "llama31_q40", "qwen3_q40", "qwen3_moe_q40")


@dataclass(frozen=True)
class Recording:
    """What was said in one session of two nodes; `root` and `worker` are the turns of each, in order."""

    name: str
    turns: tuple[tuple[int, bytes], ...]

    @property
    def root(self) -> list[bytes]:
        return [data for direction, data in self.turns if direction == 0]

    @property
    def worker(self) -> list[bytes]:
        return [data for direction, data in self.turns if direction == 1]

    @property
    def from_root(self) -> bytes:
        return b"".join(self.root)


@cache
def load(name: str) -> Recording:
    raw = gzip.decompress((DATA / f"{name}.wire.gz").read_bytes())
    assert raw.startswith(b"DLWT\1")
    turns, offset = [], 5
    while offset < len(raw):
        direction, nbytes = struct.unpack_from("<BI", raw, offset)
        offset += 5
        turns.append((direction, raw[offset : offset + nbytes]))
        offset += nbytes
    return Recording(name, tuple(turns))


@pytest.fixture(params=NAMES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return load(request.param)


@pytest.fixture(scope="session")
def small_recording() -> Recording:
    return load("llama_q40")


@dataclass
class Owner:
    """Does what a worker has to do, and keeps what happened.

    Args:
        piece: memory is given in views of at most so many bytes, two at a time; None gives what is due at once.
    """

    piece: int | None = None
    session: WorkerSession = field(default_factory=WorkerSession)
    events: list[Event] = field(default_factory=list)
    payload: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    views: list[memoryview] = field(default_factory=list)

    def act(self) -> None:
        """Take events, acknowledge and give memory until only bytes help."""
        while True:
            event = self.session.next_event()
            if event is not None:
                self.events.append(event)
                self.keep()
            elif self.session.ack_due:
                self.said += self.session.acknowledge()
            elif self.session.memory_due:
                self.give()
            else:
                return

    def give(self) -> None:
        due = self.session.memory_due
        sizes = [due] if self.piece is None else [min(due, self.piece)]
        if self.piece is not None and due > self.piece:
            sizes.append(min(due - self.piece, self.piece))
        self.views = [memoryview(bytearray(size)) for size in sizes]
        self.session.receive_into(*self.views)

    def keep(self) -> None:
        for view in self.views:
            self.payload += view
        self.views = []

    def hear(self, data: bytes) -> None:
        """Bytes from the root; acts as soon as the session takes no more, and at the end."""
        offset = 0
        while offset < len(data):
            accepted = self.session.receive_data(data[offset:])
            offset += accepted
            self.act()
            if not accepted and not self.session.wants_data:
                raise AssertionError(f"{self.session} neither takes data nor wants anything")

    def hear_all(self, pieces: Iterable[bytes]) -> None:
        self.act()
        for piece in pieces:
            self.hear(piece)

    def hear_until(self, recording: Recording, kind: type[Event]) -> None:
        """What the root said up to the first event of `kind`, byte by byte."""
        self.act()
        for byte in recording.from_root:
            self.hear(bytes([byte]))
            if isinstance(self.events[-1] if self.events else None, kind):
                return

    def messages(self) -> list[Event]:
        """The events without the pieces of payloads, whose number depends on how memory was given."""
        return [event for event in self.events if type(event).__name__ != "Filled"]


@pytest.fixture(scope="session")
def new_owner() -> Callable[..., Owner]:
    return Owner


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture(scope="session")
def whole(small_recording: Recording) -> Owner:
    """The small recording, heard at once."""
    owner = Owner()
    owner.hear_all([small_recording.from_root])
    return owner
