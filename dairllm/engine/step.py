"""A step of a program, before it is an instruction: what is computed, and the memory that is read and written.

Each thread has its part of a step's columns, rows or heads: that is how a use of memory is *dealt*.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dairllm.kernels.instructions import Kind

__all__ = ["Deal", "Memory", "Step", "Use", "reads", "writes"]

Deal = tuple[str, int] | None
"""("columns", n), ("rows", parts of a row) or ("heads", n); None: any thread may touch any of it."""
Memory = tuple[str, int]
"""A name for what is read and written: a pipe or buffer and its number."""


@dataclass(frozen=True, slots=True)
class Use:
    memory: Memory
    writes: bool
    deal: Deal


def reads(memory: Memory, deal: Deal = None) -> Use:
    return Use(memory, False, deal)


def writes(memory: Memory, deal: Deal = None) -> Use:
    return Use(memory, True, deal)


class Step(NamedTuple):
    """`values`: the kind's FIELDS, all of them."""

    kind: Kind
    uses: list[Use]
    values: dict[str, int]
