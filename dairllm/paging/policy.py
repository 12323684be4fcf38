"""How a node's room is divided: what stays, and what passes through."""

from collections.abc import Sequence
from dataclasses import dataclass

from dairllm.errors import LimitError
from dairllm.paging.needs import BLOCK_BYTES, PagingNeeds, PagingSettings
from dairllm.paging.schedule import Block, Step

__all__ = ["Division", "divide"]


@dataclass(frozen=True, slots=True)
class Division:
    """Attributes:
    kept: blocks that stay once they are in memory.
    ring: how many others may be there at once.
    outlook: how many of those are asked for ahead, if the next step alone does not need more.
    by_use: whether of these others the experts that are used least go first; else what was used longest ago.
    """

    kept: frozenset[Block]
    ring: int
    outlook: int
    by_use: bool = False


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
    experts, together = any(step.experts for step in steps), max(1, BLOCK_BYTES // needs.block_bytes)
    if settings.policy == "lru":
        ring = min(room, total)
        return Division(frozenset(), ring, min(needs.ring_blocks_best, ring - needs.ring_blocks_min if experts else ring))
    if experts:
        # each pass reads all of the others and few of the experts: the others stay first, and experts have what is left
        ring = max(2 * needs.ring_blocks_min, room - len(order))
        ring = min(ring, room)
        outlook = min(needs.ring_blocks_best, ring - needs.ring_blocks_min)
        spare = ring - needs.ring_blocks_min - (outlook if len(order) > room - ring else 0)
        return Division(spread(order, room - ring, together), ring, outlook, by_use=spare > needs.ring_blocks_min)
    if room >= total:
        return Division(frozenset(order), 0, 0)
    # a ring larger than what is missing would only take from what is kept
    ring = min(room, needs.ring_blocks_best, max(needs.ring_blocks_min + 2, total - room))
    return Division(spread(order, room - ring, together), ring, ring)


def spread(order: Sequence[Block], count: int, together: int = 1) -> frozenset[Block]:
    """`count` blocks evenly out of all, in order of their first use.

    Args:
        together: so many neighbours stay or pass as one, so that what passes is not read in pieces that are too small for a disk.
    """
    groups = [order[first : first + together] for first in range(0, len(order), together)]
    total = len(groups)
    whole = min(count // together, total)
    kept = [place for place in range(total) if (place + 1) * whole // total > place * whole // total]
    left = [block for place in sorted(set(range(total)) - set(kept)) for block in groups[place]]
    blocks = [block for place in kept for block in groups[place]]
    return frozenset(blocks + left[: max(0, count - len(blocks))])
