"""The program as it grows: records, and barriers where threads must meet.

Two steps need a barrier between them when one writes what the other touches, unless both deal it alike: then a thread only meets what
it did itself. Steps that can be computed as one become one record.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.fusion import MOST_STEPS, fused
from dairllm.engine.step import Step, Use
from dairllm.kernels.records import FIELDS, RECORD_WORDS, Kind

__all__ = ["Recorder"]


class _Placed(NamedTuple):
    """A step, and what there was before it: records, and uses since the last barrier."""

    step: Step
    n_records: int
    since_barrier: tuple[Use, ...]


class Recorder:
    """Appends records; `len` is their number."""

    def __init__(self) -> None:
        self._records: list[list[int]] = []
        self._since_barrier: list[Use] = []
        self._recent: list[_Placed] = []
        """Of this segment, the last ones: they may become one with what follows."""

    def __len__(self) -> int:
        return len(self._records)

    def begin_segment(self) -> int:
        """The number of its first record: what lies on two sides of a sync stays apart."""
        self._recent.clear()
        return len(self)

    def add(self, kind: Kind, uses: list[Use], **values: int) -> int:
        """Append a record, behind a barrier where one is needed; its number. `values`: the kind's FIELDS, all of them."""
        if wrong := values.keys() ^ set(FIELDS[kind]):
            raise ValueError(f"fields of {kind.name} that are missing, or that it does not have: {', '.join(sorted(wrong))}")
        step = self._fuse(Step(kind, uses, values))
        self._recent = [*self._recent, _Placed(step, len(self), tuple(self._since_barrier))][1 - MOST_STEPS :]
        if any(self._conflicts(use) for use in step.uses):
            self._append(Kind.BARRIER, [])
            self._since_barrier.clear()
        self._since_barrier += step.uses
        self._append(step.kind, [step.values[name] for name in FIELDS[step.kind]])
        return len(self) - 1

    def _fuse(self, step: Step) -> Step:
        """The step, or one in its place and that of some before it, whose records are taken back."""
        found = fused([placed.step for placed in self._recent], step)
        if found is None:
            return step
        count, whole = found
        first = self._recent[-count]
        del self._records[first.n_records :], self._recent[-count:]
        self._since_barrier = list(first.since_barrier)
        return whole

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
