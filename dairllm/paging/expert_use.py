"""Which experts are worth their room: those that rows are often routed to.

What was used longest ago is a poor choice of what is to go. A pass goes through all layers, so where there is room for less than the
experts of one pass, each would go just before it is needed again; and routing is uneven, more so within a text.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dairllm.paging.schedule import Block, ScheduleUnit

__all__ = ["ExpertUse"]

_LONG, _LATELY = 32.0, 1.0
"""Passes after which a use counts half, of its share in each of two means."""
_WEIGHT = 0.2
"""Of the mean over the last passes: a token that follows is more often than by chance routed as the one before. Of 0, 0.2 and 0.5 the
best for all of even, uneven and clinging routing."""


class ExpertUse:
    """Told of each use, it says which blocks are to go first.

    Args:
        units: of one program.
    """

    def __init__(self, units: Sequence[ScheduleUnit]) -> None:
        self._first: dict[int, int] = {}
        """By unit: its first expert's number among all."""
        count = 0
        for number, unit in enumerate(units):
            if unit.experts:
                self._first[number], count = count, count + len(unit.experts)
        end = 1 + max((block for unit in units for blocks in (unit.blocks, *unit.experts) for block in blocks), default=0)
        self._owners = np.full((2, end), count)
        """Of each block, the experts that have a part of it, two at most; `count` is nobody."""
        for number, first in self._first.items():
            for expert, blocks in enumerate(units[number].experts):
                for block in blocks:
                    mine, other = self._owners[:, block]
                    if other == count:
                        self._owners[int(mine != count), block] = first + expert
        self._sizes = np.bincount(self._owners.ravel(), minlength=count + 1)
        self._means: NDArray[np.float64] = np.zeros((2, count))
        keep = 0.5 ** (1 / np.array([_LONG, _LATELY]))
        self._keep, self._add = keep[:, None], (1 - keep) * (1, _WEIGHT)
        self._last = -1

    def used(self, unit: int, experts: Iterable[int]) -> None:
        """Rows went through experts of a unit."""
        if unit <= self._last:  # another pass
            self._means *= self._keep
        self._last, first = unit, self._first[unit]
        self._means[:, [first + expert for expert in experts]] += self._add[:, None]

    def order(self, held: Iterable[Block]) -> list[Block]:
        """What is to go first comes first: what is no part of an expert that is held whole; experts that the next pass hardly needs."""
        blocks = np.fromiter(held, np.int64)
        owners = self._owners[:, blocks]
        worth = np.append(self._means.sum(axis=0), 0.0)
        worth[np.bincount(owners.ravel(), minlength=len(worth)) < self._sizes] = 0
        order: list[Block] = blocks[np.argsort(worth[owners].max(axis=0), kind="stable")].tolist()
        return order
