"""The program as it grows: instructions, and barriers where threads must meet.

Two steps need a barrier between them when one writes what the other touches, unless both deal it alike: then a thread only meets what
it did itself. Steps that can be computed as one become one instruction.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.fusion import MOST_STEPS, fused
from dairllm.engine.step import Deal, Memory, Step, Use
from dairllm.kernels.instructions import INSTRUCTION_WORDS, Kind, pack

__all__ = ["Assembler"]


class _Uses:
    """What has been read and written since a barrier: of each memory, how it was dealt. It takes as long to ask as to add, however much
    there is.
    """

    def __init__(self) -> None:
        self._deals: dict[tuple[Memory, bool], set[Deal]] = {}
        """By memory, and whether it was written."""

    def conflict(self, new: Use) -> bool:
        """Whether some thread may meet what another one did."""
        return self._otherwise(new, written=True) or (new.writes and self._otherwise(new, written=False))

    def _otherwise(self, new: Use, written: bool) -> bool:
        deals = self._deals.get((new.memory, written))
        return deals is not None and bool(deals) and (None in deals or deals != {new.deal})

    def add(self, use: Use) -> bool:
        """Whether it is another than there were."""
        deals = self._deals.setdefault((use.memory, use.writes), set())
        known = use.deal in deals
        deals.add(use.deal)
        return not known

    def take_back(self, use: Use) -> None:
        self._deals[use.memory, use.writes].discard(use.deal)


class _Placed(NamedTuple):
    """A step, and how to take it back: how many instructions there were before it, what was used since the barrier before it, and
    what it added."""

    step: Step
    n_instructions: int
    before: _Uses
    added: list[Use]


class Assembler:
    """Appends instructions; `len` is their number. Each takes the same time, however many there are: a root may ask for many."""

    def __init__(self) -> None:
        self._instructions: list[list[int]] = []
        self._uses = _Uses()
        """Since the last barrier."""
        self._recent: list[_Placed] = []
        """Of this segment, the last ones: they may become one with what follows."""

    def __len__(self) -> int:
        return len(self._instructions)

    def begin_segment(self) -> int:
        """The number of its first instruction: what lies on two sides of a sync stays apart."""
        self._recent.clear()
        return len(self)

    def add(self, kind: Kind, uses: list[Use], **values: int) -> int:
        """Append an instruction, behind a barrier where one is needed; its number. `values`: the kind's FIELDS, all of them."""
        words = pack(kind, values)  # also where it becomes one with others: a wrong name is noticed here
        step = self._fuse(Step(kind, uses, values))
        n_instructions, before = len(self), self._uses
        if any(before.conflict(use) for use in step.uses):
            self._instructions.append(pack(Kind.BARRIER, {}))
            self._uses = _Uses()
        added = [use for use in step.uses if self._uses.add(use)]
        self._recent = [*self._recent, _Placed(step, n_instructions, before, added)][1 - MOST_STEPS :]
        self._instructions.append(words if step.kind == kind else pack(step.kind, step.values))
        return len(self) - 1

    def _fuse(self, step: Step) -> Step:
        """The step, or one in its place and that of some before it, whose instructions are taken back."""
        found = fused([placed.step for placed in self._recent], step)
        if found is None:
            return step
        count, whole = found
        taken = self._recent[-count:]
        for placed in reversed(taken):
            for use in placed.added:
                self._uses.take_back(use)
            self._uses = placed.before
        del self._instructions[taken[0].n_instructions :], self._recent[-count:]
        return whole

    def program(self) -> NDArray[np.int64]:
        """int64 [instructions, INSTRUCTION_WORDS]."""
        return np.array(self._instructions, np.int64).reshape(-1, INSTRUCTION_WORDS)
