"""The blocks of a mapping: which are in memory, which are on their way, which are to go. Shared by the task that steers and the readers."""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from dairllm.errors import EngineError
from dairllm.paging.mapping import FileMapping
from dairllm.paging.needs import PagingMetrics
from dairllm.paging.readers import Readers
from dairllm.paging.schedule import Block

__all__ = ["BlockCache", "EvictionOrder", "runs"]

_ORDERS = 8
"""Blocks are put in order again when so large a part of them has gone: it takes longer the more there are."""

EvictionOrder = Callable[[Iterable[Block]], Iterable[Block]]
"""Blocks that are in memory or on their way, what is to go first at the begin."""

_READ_BYTES = 2 << 20
"""The longest read of neighbouring blocks."""


class BlockCache:
    """At most `streaming` blocks pass through; those of `pinned` come once and stay. What was used longest ago goes first, or what somebody
    else puts first.

    A block that is to make room is only named: whichever reader needs room first gives it up, before it reads. Until then it can be called
    back. So there are never more blocks in memory than there is room for. Neighbours that were used together, as those of an expert, go
    together: a part of them would be of no use, and they leave room that lies together.
    """

    def __init__(
        self, mapping: FileMapping, pinned: frozenset[Block], streaming: int, readers: int, order: EvictionOrder | None = None
    ) -> None:
        self.pinned, self.metrics = pinned, PagingMetrics()
        self._mapping, self._streaming = mapping, streaming
        self._longest = max(1, _READ_BYTES // mapping.block_bytes)
        self._lock = threading.Condition()
        self._pinned_asked: set[Block] = set()
        self._passing: dict[Block, None] = {}
        """In the streaming buffer or asked for, what is to go first at the begin; never more than `streaming`."""
        self._order, self._gone = order, 0
        """How blocks are put in order; how many have gone since."""
        self._to_go: dict[Block, None] = {}
        """Still in memory."""
        self._leaving: set[Block] = set()
        """Being given up at this moment."""
        self._beyond = 0
        """How many of those are more than whoever gives them up needs room for: they still are in `_occupied`."""
        self._occupied = 0
        """Places of the streaming buffer that hold something or are being filled."""
        self._ready: set[Block] = set()
        self._failed: dict[Block, EngineError] = {}
        self._awaited: set[Block] = set()
        self._notify: Callable[[], None] | None = None
        self._readers = Readers(readers)

    # ------------------------------------------------------------------------------------------------- what the steering task calls
    @property
    def all_pinned_asked(self) -> bool:
        """Whether all pinned blocks have been asked for."""
        return len(self._pinned_asked) == len(self.pinned)

    def asked(self, block: Block) -> bool:
        """Whether a block is in memory to stay there, or on its way."""
        return block in self._passing or block in self._pinned_asked

    def all_ready(self, blocks: Iterable[Block]) -> bool:
        """Whether blocks are all in memory; they stay there until `ask` is called."""
        return self._ready.issuperset(blocks)

    def ask(self, missing: Sequence[Block], protected: frozenset[Block] | set[Block], *, urgent: bool = False) -> None:
        """Ask for blocks that are not `asked`, in order, as far as there is room or what may go: what is in memory and not protected."""
        reading: list[Block] = []
        notify = None
        with self._lock:
            for block in [block for block in self._failed if block not in protected]:
                self._forget(block)
            victims = iter(self._victims(sum(block not in self.pinned for block in missing), protected))
            for block in missing:
                if block in self.pinned:
                    self._pinned_asked.add(block)
                    reading.append(block)
                    continue
                if len(self._passing) >= self._streaming:
                    victim = next(victims, None)
                    if victim is None:
                        break
                    for leaving in victim:
                        del self._passing[leaving]
                        self._ready.discard(leaving)
                        self._to_go[leaving] = None
                    self._gone += len(victim)
                self._passing[block] = None
                if block in self._to_go:  # called back
                    del self._to_go[block]
                    self._ready.add(block)
                    self._awaited.discard(block)
                else:
                    reading.append(block)
            if not self._awaited:
                notify, self._notify = self._notify, None
        if notify is not None:
            notify()
        if reading:
            self._readers.submit([partial(self._read, first, count) for first, count in runs(reading, self._longest)], urgent=urgent)

    def missing(self, blocks: Iterable[Block], notify: Callable[[], None]) -> int:
        """How many of the blocks have still to come.

        If any, `notify` is called once, by a reader thread or by `ask`: when all have come, reading one failed, or there may be room for
        one that is not asked for yet.

        Raises:
            EngineError: reading one failed; the next time it is tried again.
        """
        with self._lock:
            waited = {block for block in blocks if block not in self._ready}
            failed = [block for block in waited if block in self._failed]
            if failed:
                error = self._failed[failed[0]]
                for block in list(self._failed):
                    self._forget(block)
                raise error
            self._awaited, self._notify = waited, notify if waited else None
            return len(waited)

    def used(self, blocks: Iterable[Block]) -> None:
        """These were computed with: the last to go."""
        for block in blocks:
            if block in self._passing:
                del self._passing[block]
                self._passing[block] = None

    def call(self, work: Callable[[], None]) -> None:
        """Have a reader thread do something else, next."""
        self._readers.submit([work], urgent=True)

    @property
    def readers(self) -> int:
        """Threads that read; at most as many as there were at first."""
        return self._readers.count

    @readers.setter
    def readers(self, count: int) -> None:
        self._readers.count = count

    def count(self, nbytes: int) -> None:
        """Bytes of the file that were read beside the blocks."""
        with self._lock:
            self.metrics.bytes += nbytes

    def close(self) -> None:
        """End the reader threads."""
        self._readers.close()

    def check(self) -> None:
        """Raise EngineError unless what is known of the blocks fits together. For tests: it takes as long as there are blocks."""
        with self._lock:
            asked = self._passing.keys() | self._pinned_asked
            rules = {
                "no more blocks pass than the streaming buffer has room for": len(self._passing) <= self._streaming,
                "pinned blocks do not pass": self.pinned.isdisjoint(self._passing),
                "only pinned blocks are asked for as such": self._pinned_asked <= self.pinned,
                "what is ready was asked for": self._ready <= asked,
                "what failed was asked for, and is not ready": self._failed.keys() <= asked and self._ready.isdisjoint(self._failed),
                "what is to be evicted does not pass": self._passing.keys().isdisjoint(self._to_go),
                "what is being evicted is not ready": self._ready.isdisjoint(self._leaving)
                and self._to_go.keys().isdisjoint(self._leaving),
                "who is told waits for something": self._notify is None or bool(self._awaited),
                "places are counted": 0 <= self._beyond <= len(self._leaving) <= self._occupied,
                "what is in memory has a place": len(self._ready - self.pinned) + len(self._to_go) + len(self._leaving) <= self._occupied,
            }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise EngineError(f"the block cache contradicts itself; it should be that {'; that '.join(broken)}")

    def _victims(self, places: int, protected: frozenset[Block] | set[Block]) -> list[range]:
        """What is to make room for so many blocks more, as runs of neighbours; what cannot be had is missing."""
        lacking = len(self._passing) + places - self._streaming
        if self._order is not None and lacking > 0 and self._gone * _ORDERS >= len(self._passing):
            self._passing, self._gone = dict.fromkeys(self._order(self._passing)), 0
        found: list[range] = []
        for block in self._passing if lacking > 0 else ():
            if block in protected or block not in self._ready:
                continue
            if found and block == found[-1].stop and len(found[-1]) < self._longest:
                found[-1] = range(found[-1].start, block + 1)
            elif lacking <= 0:
                break
            else:
                found.append(range(block, block + 1))
            lacking -= 1
        return found

    def _forget(self, block: Block) -> None:
        """A block that failed may be asked for again."""
        self._passing.pop(block, None)
        self._pinned_asked.discard(block)
        del self._failed[block]

    # -------------------------------------------------------------------------------------------------------------- reader threads
    def _read(self, first: Block, count: int) -> None:
        blocks = range(first, first + count)
        places = sum(block not in self.pinned for block in blocks)
        with self._lock:
            leaving: list[Block] = []
            self._occupied += places
            while True:
                while self._occupied > self._streaming and self._to_go and len(leaving) < places:
                    leaving.append(self._leave(next(iter(self._to_go))))
                    self._occupied -= 1
                if self._occupied <= self._streaming or len(leaving) == places or not self._beyond:
                    break
                self._lock.wait()  # for what another reader is giving up
            needed = len(leaving)
            while leaving and self._longest > 1 and leaving[-1] + 1 == next(iter(self._to_go), None):
                leaving.append(self._leave(leaving[-1] + 1))
            beyond = len(leaving) - needed
            self._beyond += beyond
        nbytes, error = 0, None
        try:
            self._release(leaving, beyond)
            with self._lock:
                while not self._leaving.isdisjoint(blocks):  # another reader is giving it up: not after it has come again
                    self._lock.wait()
            nbytes = self._mapping.load(first, count)
        except EngineError as caught:
            error = caught
        except Exception as caught:  # whatever it is, someone waits for the block and must be told
            error = EngineError(f"{self._mapping.path}: reading failed: {caught!r}")
        self._came(blocks, places, nbytes, error)

    def _leave(self, block: Block) -> Block:
        del self._to_go[block]
        self._leaving.add(block)
        return block

    def _release(self, leaving: Sequence[Block], beyond: int) -> None:
        try:
            for start, length in runs(leaving, len(leaving)):
                self._mapping.release(start, length)
        finally:
            if leaving:
                with self._lock:
                    self._leaving.difference_update(leaving)
                    self._occupied -= beyond
                    self._beyond -= beyond
                    self._lock.notify_all()

    def _came(self, blocks: range, places: int, nbytes: int, error: EngineError | None) -> None:
        with self._lock:
            self.metrics.bytes += nbytes
            if error is None:
                self._ready.update(blocks)
            else:
                self._failed.update(dict.fromkeys(blocks, error))
                self._occupied -= places
            notify = None
            if self._awaited:
                self._awaited.difference_update(blocks)
                if not self._awaited or error is not None or any(not self.asked(block) for block in self._awaited):
                    self._awaited, notify, self._notify = set(), self._notify, None
        if notify is not None:
            notify()


def runs(blocks: Sequence[Block], longest: int) -> list[tuple[Block, int]]:
    """Blocks as runs of neighbours in the order given, each at most `longest`: (first, count)."""
    found: list[tuple[Block, int]] = []
    for block in blocks:
        if found and found[-1][0] + found[-1][1] == block and found[-1][1] < longest:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((block, 1))
    return found
