"""How a node's room is divided: what stays, and what passes through."""

from collections.abc import Sequence
from dataclasses import dataclass

from dairllm.engine.paging import PagingNeeds, PagingSettings
from dairllm.engine.paging_steps import Block, Step
from dairllm.errors import LimitError

__all__ = ["Division", "divide"]


@dataclass(frozen=True, slots=True)
class Division:
    """Attributes:
    kept: blocks that stay once they are in memory.
    ring: how many others may be there at once.
    outlook: how many of those are asked for ahead, if the next step alone does not need more.
    """

    kept: frozenset[Block]
    ring: int
    outlook: int


def divide(steps: Sequence[Step], needs: PagingNeeds, settings: PagingSettings) -> Division:
    """Divide settings.room_blocks.

    Raises:
        LimitError: there is less room than the least that works.
    """
    room, total = settings.room_blocks, needs.blocks_total
    if room < needs.ring_blocks_min:
        least = needs.ring_blocks_min
        raise LimitError(f"room for {room} blocks of {needs.block_bytes} bytes; paging this model needs {least} at least")
    order = list(dict.fromkeys(block for step in steps for block in step.blocks))
    experts = any(step.experts for step in steps)
    if settings.policy == "lru":
        ring = min(room, total)
        return Division(frozenset(), ring, min(ring, needs.ring_blocks_best))
    if experts:
        # each pass reads all of the others and few of the experts: the others stay first, and experts have what is left
        ring = max(2 * needs.ring_blocks_min, room - len(order))
        ring = min(ring, room)
        return Division(spread(order, room - ring), ring, min(needs.ring_blocks_best, ring - needs.ring_blocks_min))
    if room >= total:
        return Division(frozenset(order), 0, 0)
    # a ring larger than what is missing would only take from what is kept
    ring = min(room, needs.ring_blocks_best, max(needs.ring_blocks_min + 2, total - room))
    return Division(spread(order, room - ring), ring, ring)


def spread(order: Sequence[Block], count: int) -> frozenset[Block]:
    """`count` blocks evenly out of all, in order of their first use."""
    total = len(order)
    count = min(count, total)
    return frozenset(block for place, block in enumerate(order) if (place + 1) * count // total > place * count // total)
