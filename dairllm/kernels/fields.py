"""How kernels read an instruction: its fields, by name.

What the names are and where they lie is said once, in dairllm.kernels.instructions.
"""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

from dairllm.kernels.instructions import FIELDS, Kind
from dairllm.kernels.ir import load_i
from dairllm.kernels.kernel import kernel

__all__ = ["fields_of"]


@kernel
def _words(instruction):
    """All words of an instruction that fields may have."""
    i = instruction
    return (
        load_i(i + 8),
        load_i(i + 16),
        load_i(i + 24),
        load_i(i + 32),
        load_i(i + 40),
        load_i(i + 48),
        load_i(i + 56),
        load_i(i + 64),
        load_i(i + 72),
        load_i(i + 80),
        load_i(i + 88),
        load_i(i + 96),
        load_i(i + 104),
        load_i(i + 112),
        load_i(i + 120),
        load_i(i + 128),
    )


def fields_of(*kinds: Kind) -> Callable[[int], Any]:
    """A kernel that takes an instruction's address and returns the fields that all these kinds have at the same places, as a named tuple.

    Raises:
        ValueError: the kinds have no field in common.
    """
    names: list[str] = []
    for places in zip(*(FIELDS[kind] for kind in kinds), strict=False):
        if len(set(places)) > 1:
            break
        names.append(places[0])
    if not names:
        raise ValueError(f"no field is the same in all of {', '.join(kind.name for kind in kinds)}")
    count, fields = len(names), namedtuple("fields", names)

    @kernel
    def read(instruction):
        return fields(*_words(instruction)[:count])

    found: Callable[[int], Any] = read
    return found
