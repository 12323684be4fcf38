"""The pager: what is asked for, and when.

A pass goes through the units in order, again and again, so what will be needed next is known: the *lookahead* of a unit is the blocks that
the units from it on read. At each unit the pager asks for what of the lookahead is missing, and gives up for it what is not in it. So reads
go on by a whole lookahead while units are computed, while nodes exchange, and between two tokens.

Pinned blocks are spread evenly over the pass: then the reads are, too, and disk and arithmetic are busy at the same time. Experts that rows
are routed to are known only when the gate has been computed: their blocks are asked for then, ahead of all others, and those that are
used often stay.
"""

from collections.abc import Iterable, Iterator, Sequence

from dairllm.paging.block_cache import BlockCache
from dairllm.paging.expert_use import ExpertUse
from dairllm.paging.mapping import FileMapping
from dairllm.paging.policy import Division
from dairllm.paging.schedule import Block, ScheduleUnit

__all__ = ["Pager"]

_CALLS = 4
"""Units are computed together up to this part of the streaming buffer."""


class Pager:
    """One task steers it, unit by unit.

    Args:
        mapping: open; stays the caller's.
        units: of one program, in the order of a pass.
        division: of the budget.
        readers: number of threads.

    Attributes:
        blocks: what is in memory.
    """

    def __init__(self, mapping: FileMapping, units: Sequence[ScheduleUnit], division: Division, readers: int) -> None:
        self.units = units
        self._use = ExpertUse(units) if division.by_use else None
        self.blocks = BlockCache(mapping, division.pinned, division.streaming, readers, None if self._use is None else self._use.order)
        self._streaming, self._length, self._call_blocks = division.streaming, division.lookahead, division.streaming // _CALLS
        self._uses = [block for unit in units for block in unit.blocks]
        self._first_use: list[int] = []
        count = 0
        for unit in units:
            self._first_use.append(count)
            count += len(unit.blocks)
        self._lookaheads: dict[int, tuple[tuple[Block, ...], frozenset[Block]]] = {}

    def look_ahead(self, unit: int) -> None:
        """Ask for what is missing of a unit's lookahead. What is not in it may go, so nothing before the unit may be in use."""
        lookahead, members = self._lookahead(unit)
        missing = [block for block in lookahead if not self.blocks.asked(block)]
        if missing:
            self.blocks.ask(missing, members)

    def experts_fit(self, unit: int, experts: Iterable[int]) -> bool:
        """Whether experts of a unit can be in memory together."""
        return sum(block not in self.blocks.pinned for block in self.needed(unit, experts)) <= self._streaming

    def demand(self, unit: int, experts: Iterable[int]) -> None:
        """Ask for experts of a unit, ahead of all else; other experts go for them, rather than what has been read ahead."""
        wanted = self.needed(unit, experts)
        missing = [block for block in wanted if not self.blocks.asked(block)]
        if missing:
            needed, (_, ahead) = frozenset(wanted), self._lookahead(unit)
            both = needed | ahead
            fits = sum(block not in self.blocks.pinned for block in both) <= self._streaming
            self.blocks.ask(missing, both if fits else needed, urgent=True)

    def computed(self, unit: int, experts: Iterable[int] = ()) -> None:
        """A unit has been computed, with these experts."""
        if self._use is not None and self.units[unit].experts:
            self._use.used(unit, experts)
        self.blocks.used(self.needed(unit, experts))

    def needed(self, unit: int, experts: Iterable[int] = ()) -> tuple[Block, ...]:
        """What a unit reads, given the experts that its rows are routed to."""
        found = self.units[unit]
        if not found.experts:
            return found.blocks
        return tuple(dict.fromkeys(block for expert in sorted(experts) for block in found.experts[expert]))

    def extent(self, unit: int, stop: int) -> int:
        """The end of those units from `unit` on that can be computed with it in one call: what they need is in memory already, and they do
        not hold back a large part of the streaming buffer, which reads could use meanwhile."""
        held: set[Block] = {block for block in self.units[unit].blocks if block not in self.blocks.pinned}
        unit += 1
        while unit < stop and not self.units[unit].experts and self.blocks.all_ready(self.units[unit].blocks):
            held.update(block for block in self.units[unit].blocks if block not in self.blocks.pinned)
            if len(held) > self._call_blocks:
                break
            unit += 1
        return unit

    def close(self) -> None:
        """End the reader threads."""
        self.blocks.close()

    def _lookahead(self, unit: int) -> tuple[tuple[Block, ...], frozenset[Block]]:
        """What the units from `unit` on read next: as much as is asked for ahead, and pinned blocks that have not been asked for yet."""
        complete = self.blocks.all_pinned_asked
        found = self._lookaheads.get(unit) if complete else None
        if found is None:
            ahead = dict.fromkeys(self._ahead(unit, complete))
            found = tuple(ahead), frozenset(ahead)
            if complete:
                self._lookaheads[unit] = found
        return found

    def _ahead(self, unit: int, complete: bool) -> Iterator[Block]:
        passing: set[Block] = set()
        start, count = self._first_use[unit], len(self._uses)
        length = max(self._length, sum(block not in self.blocks.pinned for block in self.units[unit].blocks))
        for place in range(start, start + count):
            block = self._uses[place % count]
            if block in self.blocks.pinned:
                if not complete:
                    yield block
                continue
            passing.add(block)
            if len(passing) > length:
                return
            yield block
