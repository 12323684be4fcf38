"""The plan of memory for people and for programs, and what reading costs beside it."""

from typing import Any

from dairllm.paging.read_probe import WayChoice
from dairllm.runtime.memory_plan import MemoryPlan
from dairllm.units import format_duration, format_size

__all__ = ["plan_lines", "reading", "reading_lines", "way_line"]


def plan_lines(plan: MemoryPlan) -> list[str]:
    """The plan as a table."""
    table = plan.table()
    width = max(len(what) for what, _, _ in table)
    return [f"{what:{width}}  {format_size(size):>10}  {remark}" for what, size, remark in table]


def way_line(choice: WayChoice, threads: int | None = None) -> str:
    """How a file is read."""
    speed = f", {format_size(choice.bytes_per_second)} a second" if choice.rates else ", as was asked for"
    computing = "" if threads is None else f"; {_count(threads, 'compute thread')}"
    return f"weights are read by the way `{choice.way}`, {_count(choice.readers, 'reader')}{speed}{computing}"


def reading_lines(plan: MemoryPlan, choice: WayChoice) -> list[str]:
    """How a file is read, and how long that takes for a token; plain where nothing was measured."""
    if not choice.bytes_per_second:
        return [way_line(choice)]
    seconds = plan.missing / choice.bytes_per_second
    return [way_line(choice), f"a token waits {format_duration(seconds)} for the disk, where computing takes less"]


def reading(choice: WayChoice, plan: MemoryPlan) -> dict[str, Any]:
    """The same for a JSON document; what was not measured is None."""
    speed = choice.bytes_per_second
    return {
        "way": choice.way,
        "readers": choice.readers,
        "read_bytes_per_second": round(speed) if speed else None,
        "read_seconds_a_token": round(plan.missing / speed, 4) if speed else None,
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
