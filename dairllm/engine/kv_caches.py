"""Several sets of KV caches for one program: each keeps the K and V of another text.

A program's instructions bear the addresses of the caches that it writes and reads. To compute with another set is to write other addresses
there, some hundred words, between two runs: nothing is copied, and what is computed does not depend on the set.
"""

import ctypes
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.allocation import sparse
from dairllm.engine.area import Area
from dairllm.graph.types import FloatType, row_bytes
from dairllm.kernels.instructions import FIELDS, Kind

__all__ = ["KvCaches"]

_LINE = 64
_COPY_BYTES = 1 << 20
"""That are copied at once, in a tenth of a millisecond or two."""


class _Cache(NamedTuple):
    """One of K or of V: [heads][positions][bytes of a row], `stride` bytes from one head to the next."""

    area: Area
    heads: int
    stride: int
    row: int


class KvCaches:
    """The sets of a program; the first one is the program's own memory, the others are taken when they are first used.

    Args:
        instructions: of the program, which is not running.
        count: sets, one at least.
        owner: of the memory that the instructions address, which is to live as long.

    Attributes:
        used: the number of the set that the program computes with.
    """

    def __init__(self, instructions: NDArray[np.int64], count: int, owner: object) -> None:
        self.count, self.used = count, 0
        self._instructions, self._owner = instructions, owner
        caches, words = _found(instructions)
        self._caches = list(caches.values())
        places = {address: place for place, address in enumerate(caches)}
        self._rows = np.array([row for row, _ in words], np.intp)
        self._columns = np.array([column for _, column in words], np.intp)
        self._places = np.array([places[int(instructions[word])] for word in words], np.intp)
        self._sets: list[_Set | None] = [_Set([cache.area for cache in self._caches], None), *[None] * (count - 1)]

    def use(self, number: int) -> None:
        """Compute with a set from the next run on. Nothing is running."""
        if number != self.used:
            addresses = np.array([area.address for area in self._areas(number)], np.int64)
            self._instructions[self._rows, self._columns] = addresses[self._places]
            self.used = number

    def copy(self, source: int, target: int, positions: int) -> Iterator[None]:
        """Copy the first positions of a set to another, a piece at each step; the program is not running meanwhile."""
        for cache, begin, end in zip(self._caches, self._areas(source), self._areas(target), strict=True):
            at_once = max(1, _COPY_BYTES // cache.row)
            for head in range(cache.heads):
                for first in range(0, positions, at_once):
                    offset, nbytes = head * cache.stride + first * cache.row, min(at_once, positions - first) * cache.row
                    ctypes.memmove(end.at(offset, nbytes), begin.at(offset, nbytes), nbytes)
                    if first + at_once < positions:
                        yield
            yield

    def _areas(self, number: int) -> list[Area]:
        """Of each cache in a set."""
        found = self._sets[number]
        if found is None:
            ends = list(accumulate(-(-cache.area.nbytes // _LINE) * _LINE for cache in self._caches))
            memory = sparse(ends[-1] if ends else 0)
            whole = Area.of("the KV caches of a conversation", memory)
            areas = [whole.part("a KV cache", end, cache.area.nbytes) for cache, end in zip(self._caches, [0, *ends], strict=False)]
            found = self._sets[number] = _Set(areas, memory)
        return found.areas


class _Set(NamedTuple):
    areas: list[Area]
    memory: NDArray[np.uint8] | None
    """That they are in, where it is not the program's."""


def _found(instructions: NDArray[np.int64]) -> tuple[dict[int, _Cache], list[tuple[int, int]]]:
    """A program's caches by their addresses, and the words of its instructions (instruction, word) that have one of these."""
    caches: dict[int, _Cache] = {}
    words: list[tuple[int, int]] = []
    for number, instruction in enumerate(instructions.tolist()):
        kind = Kind(instruction[0])
        names = ("cache",) if kind == Kind.SHIFT else ("keys", "values") if kind in (Kind.ATTEND, Kind.FOLD) else ()
        words += [(number, 1 + FIELDS[kind].index(name)) for name in names]
        if kind == Kind.SHIFT:
            fields = dict(zip(FIELDS[kind], instruction[1:], strict=False))
            heads, stride = fields["n"] // fields["head_dim"], fields["head_stride"]
            row = row_bytes(FloatType(fields["cache_type"]), fields["head_dim"])
            caches[fields["cache"]] = _Cache(Area("a KV cache", fields["cache"], heads * stride), heads, stride, row)
    return caches, words
