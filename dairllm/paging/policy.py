"""How a node divides its budget: blocks that are pinned, blocks that are streamed."""

from collections.abc import Sequence
from dataclasses import dataclass

from dairllm.errors import EngineError, LimitError
from dairllm.paging.needs import BLOCK_BYTES, POLICIES, PagingNeeds, PagingSettings
from dairllm.paging.schedule import Block, ScheduleUnit

__all__ = ["Division", "divide"]


@dataclass(frozen=True, slots=True)
class Division:
    """Attributes:
    pinned: blocks that stay once they are in memory.
    streaming: how many others may be there at once.
    lookahead: how many of those are asked for ahead, if the next unit alone does not need more.
    by_use: whether of these others the experts that are used least go first; else what was used longest ago.
    """

    pinned: frozenset[Block]
    streaming: int
    lookahead: int
    by_use: bool = False


def divide(units: Sequence[ScheduleUnit], needs: PagingNeeds, settings: PagingSettings) -> Division:
    """Divide settings.budget_blocks.

    Raises:
        LimitError: the budget is below the least that works.
        EngineError: there is no such policy.
    """
    budget, total = settings.budget_blocks, needs.blocks_total
    if budget < needs.streaming_blocks_min:
        least = needs.streaming_blocks_min
        raise LimitError(f"room for {budget} blocks of {needs.block_bytes} bytes; paging this model needs {least} at least")
    order = list(dict.fromkeys(block for unit in units for block in unit.blocks))
    experts, together = any(unit.experts for unit in units), max(1, BLOCK_BYTES // needs.block_bytes)
    if settings.policy not in POLICIES:
        raise EngineError(f"no paging policy is called {settings.policy!r}; there are {', '.join(POLICIES)}")
    if settings.policy == "lru":
        streaming = min(budget, total)
        return Division(
            frozenset(), streaming, min(needs.streaming_blocks_best, streaming - needs.streaming_blocks_min if experts else streaming)
        )
    if experts:
        # each pass reads all of the others and few of the experts: the others stay first, and experts have what is left
        streaming = max(2 * needs.streaming_blocks_min, budget - len(order))
        streaming = min(streaming, budget)
        lookahead = min(needs.streaming_blocks_best, streaming - needs.streaming_blocks_min)
        spare = streaming - needs.streaming_blocks_min - (lookahead if len(order) > budget - streaming else 0)
        return Division(spread(order, budget - streaming, together), streaming, lookahead, by_use=spare > needs.streaming_blocks_min)
    if budget >= total:
        return Division(frozenset(order), 0, 0)
    # a streaming buffer larger than what is missing would only take from what is pinned
    streaming = min(budget, needs.streaming_blocks_best, max(needs.streaming_blocks_min + 2, total - budget))
    return Division(spread(order, budget - streaming, together), streaming, streaming)


def spread(order: Sequence[Block], count: int, together: int = 1) -> frozenset[Block]:
    """`count` blocks evenly out of all, in order of their first use.

    Args:
        together: so many neighbours stay or pass as one, so that what passes is not read in pieces that are too small for a disk.
    """
    groups = [order[first : first + together] for first in range(0, len(order), together)]
    total = len(groups)
    whole = min(count // together, total)
    pinned = [place for place in range(total) if (place + 1) * whole // total > place * whole // total]
    left = [block for place in sorted(set(range(total)) - set(pinned)) for block in groups[place]]
    blocks = [block for place in pinned for block in groups[place]]
    return frozenset(blocks + left[: max(0, count - len(blocks))])
