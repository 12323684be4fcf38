"""The program as it grows: records, and barriers where threads must meet.

Each record says which memory it reads and writes and how its columns, rows or heads are dealt to threads (its *deal*). Two records
need a barrier between them when one writes what the other touches, unless both deal it alike: then a thread only meets what it did
itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dairllm.kernels.records import FIELDS, RECORD_WORDS, Kind

__all__ = ["Deal", "Memory", "Recorder", "Use", "reads", "writes"]

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


class Recorder:
    """Appends records; `len` is their number."""

    def __init__(self) -> None:
        self._records: list[list[int]] = []
        self._since_barrier: list[Use] = []

    def __len__(self) -> int:
        return len(self._records)

    def add(self, kind: Kind, uses: list[Use], **values: int) -> int:
        """Append a record, behind a barrier where one is needed; its number. `values`: the kind's FIELDS, all of them."""
        if any(self._conflicts(use) for use in uses):
            self._append(Kind.BARRIER, [])
            self._since_barrier.clear()
        self._since_barrier += uses
        self._append(kind, [values.pop(name) for name in FIELDS[kind]])
        if values:
            raise ValueError(f"{kind.name} has no field {', '.join(values)}")
        return len(self) - 1

    def program(self) -> NDArray[np.int64]:
        """int64 [records, RECORD_WORDS]."""
        return np.array(self._records, np.int64).reshape(-1, RECORD_WORDS)

    def _append(self, kind: Kind, values: list[int]) -> None:
        self._records.append([kind, *values] + [0] * (RECORD_WORDS - 1 - len(values)))

    def _conflicts(self, new: Use) -> bool:
        return any(
            old.memory == new.memory and (old.writes or new.writes) and (old.deal is None or old.deal != new.deal)
            for old in self._since_barrier
        )
