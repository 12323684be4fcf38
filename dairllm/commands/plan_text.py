"""The plan of memory for people and for programs, and what reading costs beside it."""

from typing import Any

from dairllm.paging.read_mode import ReadMode
from dairllm.runtime.memory_plan import MemoryPlan
from dairllm.units import format_duration, format_size

__all__ = ["plan_lines", "read_mode_line", "reading", "reading_lines"]

_SYSTEM_CALLS = {"mmap": "mmap", "buffered": "read", "direct": "read, past the page cache"}
"""By I/O mode."""


def plan_lines(plan: MemoryPlan) -> list[str]:
    """The plan as a table."""
    table = plan.table()
    width = max(len(what) for what, _, _ in table)
    return [f"{what:{width}}  {format_size(size):>10}  {remark}" for what, size, remark in table]


def read_mode_line(choice: ReadMode, threads: int | None = None) -> str:
    """How weights are read."""
    speed = f", {format_size(choice.bytes_per_second)} a second" if choice.rates else ", as was asked for"
    computing = "" if threads is None else f"; {_count(threads, 'compute thread')}"
    return f"weights are read with {_SYSTEM_CALLS[choice.io_mode]}, {_count(choice.readers, 'reader')}{speed}{computing}"


def reading_lines(plan: MemoryPlan, choice: ReadMode) -> list[str]:
    """How a file is read, and how long that takes for a token; plain where nothing was measured."""
    if not choice.bytes_per_second:
        return [read_mode_line(choice)]
    seconds = plan.missing / choice.bytes_per_second
    return [read_mode_line(choice), f"a token waits {format_duration(seconds)} for the disk, where computing takes less"]


def reading(choice: ReadMode, plan: MemoryPlan) -> dict[str, Any]:
    """The same for a JSON document; what was not measured is None."""
    speed = choice.bytes_per_second
    return {
        "io_mode": choice.io_mode,
        "readers": choice.readers,
        "read_bytes_per_second": round(speed) if speed else None,
        "read_seconds_a_token": round(plan.missing / speed, 4) if speed else None,
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
