"""Memory for blocks that are smaller than a huge page: *slots*, parts of huge pages, moved to where a block is wanted and back.

A disk brings a MiB several times as fast into memory that lies together as into 256 pages from anywhere: each of those is a piece of the
request by itself. The pages of a mapping lie anywhere unless they are huge, and a huge one would hold several blocks. So huge pages are
cut into slots. What moves is entries of the page table: nothing is copied, faulted in or cleared.
"""

import contextlib
import threading
from collections.abc import Sequence

from dairllm.engine import system

__all__ = ["Slots"]

_MOST = 12_000
"""A slot in use takes up to four mappings of the process, and it may have 65530. Blocks beyond lie in ordinary pages."""


class Slots:
    """For one mapping. Any thread brings and takes back, each block one at a time.

    Args:
        slot_bytes: of a block: a power of two, from a page to half a huge page.
        most: there will never be more blocks.

    Raises:
        OSError: there are not so many addresses.
    """

    def __init__(self, slot_bytes: int, most: int) -> None:
        self._bytes, self._most = slot_bytes, min(most, _MOST)
        self._pool, *region = system.reserve(self._most * slot_bytes)
        self._region = region[0], region[1]
        self._lock = threading.Lock()
        self._count = 0
        """Slots that there are so far."""
        self._free: dict[int, int] = {}
        """First slot and length of each extent that is free; what came back last, and may still be in a cache, at the end."""
        self._taken: dict[int, int] = {}
        """The slot of an address."""

    def bring(self, address: int, count: int) -> None:
        """Memory for `count` blocks from `address` on, of any content, as far as there are slots."""
        with self._lock:
            for slot, length in self._take(count):
                moved = self._move(self._pool + slot * self._bytes, address, length)
                for number, there in enumerate(moved):
                    if there:
                        self._taken[address + number * self._bytes] = slot + number
                    else:  # what it has would be missing elsewhere
                        system.advise(self._pool + (slot + number) * self._bytes, self._bytes, "dontneed")
                        self._give(slot + number, 1)
                address += length * self._bytes

    def take_back(self, address: int, count: int) -> None:
        """The memory of `count` blocks from `address` on, from slots or not: these addresses have none when this returns."""
        with self._lock:
            slots = [self._taken.pop(address + number * self._bytes, -1) for number in range(count)]
            place = 0
            for slot, length in _extents(slots):
                if slot >= 0:  # where it cannot be moved, the slot gets other memory when it is used again
                    self._move(address + place * self._bytes, self._pool + slot * self._bytes, length)
                    self._give(slot, length)
                place += length
            system.renew(address, count * self._bytes)

    def close(self) -> None:
        """Give up what is not in use; what is, goes with the mapping's addresses."""
        system.unmap(*self._region)

    def _move(self, source: int, destination: int, count: int) -> Sequence[bool]:
        """Which of `count` slots have been moved. They go together, unless the system has come to keep them as several mappings."""
        with contextlib.suppress(OSError):
            system.move(source, count * self._bytes, destination)
            return [True] * count
        moved = []
        for offset in range(0, count * self._bytes, self._bytes):
            moved.append(False)
            with contextlib.suppress(OSError):  # there are too many mappings
                system.move(source + offset, self._bytes, destination + offset)
                moved[-1] = True
        return moved

    def _take(self, count: int) -> list[tuple[int, int]]:
        """Free slots as (first, length), in few extents."""
        free = sum(self._free.values())
        if free < count:
            self._grow(count - free)
        taken: list[tuple[int, int]] = []
        while count and self._free:
            first = next((first for first in reversed(self._free) if self._free[first] >= count), None)
            if first is None:
                first = max(self._free, key=self._free.__getitem__)
            length = self._free.pop(first)
            if length > count:
                self._free[first + count] = length - count
                length = count
            taken.append((first, length))
            count -= length
        return taken

    def _give(self, first: int, count: int) -> None:
        for other, length in list(self._free.items()):
            if other + length == first:
                first, count = other, length + count
            elif first + count == other:
                count += length
            else:
                continue
            del self._free[other]
        self._free[first] = count

    def _grow(self, count: int) -> None:
        """At least `count` slots more, in whole huge pages, if there may be so many."""
        whole = system.HUGE_PAGE // self._bytes
        count = min(-(-count // whole) * whole, self._most - self._count)
        if not count:
            return
        address, nbytes = self._pool + self._count * self._bytes, count * self._bytes
        for advice in ("hugepage", "populate_write", "nohugepage"):  # the last: what has been moved away is not to be filled up
            with contextlib.suppress(OSError):  # a system without huge pages: ordinary ones will do
                system.advise(address, nbytes, advice)
        self._give(self._count, count)
        self._count += count


def _extents(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Slots as extents that follow each other, (first, length); -1 is none, and those follow each other too."""
    found: list[tuple[int, int]] = []
    for slot in slots:
        first, length = found[-1] if found else (-2, 0)
        if (slot == first == -1) or (slot == first + length and first >= 0):
            found[-1] = first, length + 1
        else:
            found.append((slot, 1))
    return found
