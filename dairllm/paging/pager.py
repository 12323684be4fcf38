"""The pager: what is asked for, and when.

A pass goes through the steps in order, again and again, so what will be needed next is known: the *outlook* of a step is the blocks that
the steps from it on read. At each step the pager asks for what of the outlook is missing, and gives up for it what is not in it. So reads
go on a whole outlook ahead while steps are computed, while nodes exchange, and between two tokens.

Kept blocks are spread evenly over the pass: then the reads are, too, and disk and arithmetic are busy at the same time. Experts that rows
are routed to are known only when the gate has been computed: their blocks are asked for then, ahead of all others, and those that are
used often stay.
"""

from collections.abc import Iterable, Iterator, Sequence

from dairllm.paging.block_cache import Blocks
from dairllm.paging.expert_use import ExpertUse
from dairllm.paging.mapping import FileMapping
from dairllm.paging.policy import Division
from dairllm.paging.schedule import Block, Step

__all__ = ["Pager"]

_CALLS = 4
"""Steps are computed together up to this part of the ring."""


class Pager:
    """One task steers it, step by step.

    Args:
        mapping: open; stays the caller's.
        steps: of one program, in the order of a pass.
        division: of the room.
        readers: number of threads.

    Attributes:
        blocks: what is in memory.
    """

    def __init__(self, mapping: FileMapping, steps: Sequence[Step], division: Division, readers: int) -> None:
        self.steps = steps
        self._use = ExpertUse(steps) if division.by_use else None
        self.blocks = Blocks(mapping, division.kept, division.ring, readers, None if self._use is None else self._use.order)
        self._ring, self._length, self._call_blocks = division.ring, division.outlook, division.ring // _CALLS
        self._uses = [block for step in steps for block in step.blocks]
        self._first_use: list[int] = []
        count = 0
        for step in steps:
            self._first_use.append(count)
            count += len(step.blocks)
        self._outlooks: dict[int, tuple[tuple[Block, ...], frozenset[Block]]] = {}

    def look_ahead(self, step: int) -> None:
        """Ask for what is missing of a step's outlook. What is not in it may go, so nothing before the step may be in use."""
        outlook, members = self._outlook(step)
        missing = [block for block in outlook if not self.blocks.asked(block)]
        if missing:
            self.blocks.ask(missing, members)

    def experts_fit(self, step: int, experts: Iterable[int]) -> bool:
        """Whether experts of a step can be in memory together."""
        return sum(block not in self.blocks.kept for block in self.needed(step, experts)) <= self._ring

    def demand(self, step: int, experts: Iterable[int]) -> None:
        """Ask for experts of a step, ahead of all else; other experts go for them, rather than what has been read ahead."""
        wanted = self.needed(step, experts)
        missing = [block for block in wanted if not self.blocks.asked(block)]
        if missing:
            needed, (_, ahead) = frozenset(wanted), self._outlook(step)
            both = needed | ahead
            fits = sum(block not in self.blocks.kept for block in both) <= self._ring
            self.blocks.ask(missing, both if fits else needed, urgent=True)

    def computed(self, step: int, experts: Iterable[int] = ()) -> None:
        """A step has been computed, with these experts."""
        if self._use is not None and self.steps[step].experts:
            self._use.used(step, experts)
        self.blocks.used(self.needed(step, experts))

    def needed(self, step: int, experts: Iterable[int] = ()) -> tuple[Block, ...]:
        """What a step reads, given the experts that its rows are routed to."""
        found = self.steps[step]
        if not found.experts:
            return found.blocks
        return tuple(dict.fromkeys(block for expert in sorted(experts) for block in found.experts[expert]))

    def extent(self, step: int, stop: int) -> int:
        """The end of those steps from `step` on that can be computed with it in one call: what they need is in memory already, and they do
        not hold back a large part of the ring, which reads could use meanwhile."""
        held: set[Block] = {block for block in self.steps[step].blocks if block not in self.blocks.kept}
        step += 1
        while step < stop and not self.steps[step].experts and self.blocks.all_ready(self.steps[step].blocks):
            held.update(block for block in self.steps[step].blocks if block not in self.blocks.kept)
            if len(held) > self._call_blocks:
                break
            step += 1
        return step

    def close(self) -> None:
        """End the reader threads."""
        self.blocks.close()

    def _outlook(self, step: int) -> tuple[tuple[Block, ...], frozenset[Block]]:
        """What the steps from `step` on read next: as much as is asked for ahead, and kept blocks that have not been asked for yet."""
        complete = self.blocks.kept_all
        found = self._outlooks.get(step) if complete else None
        if found is None:
            ahead = dict.fromkeys(self._ahead(step, complete))
            found = tuple(ahead), frozenset(ahead)
            if complete:
                self._outlooks[step] = found
        return found

    def _ahead(self, step: int, complete: bool) -> Iterator[Block]:
        passing: set[Block] = set()
        start, count = self._first_use[step], len(self._uses)
        length = max(self._length, sum(block not in self.blocks.kept for block in self.steps[step].blocks))
        for place in range(start, start + count):
            block = self._uses[place % count]
            if block in self.blocks.kept:
                if not complete:
                    yield block
                continue
            passing.add(block)
            if len(passing) > length:
                return
            yield block
