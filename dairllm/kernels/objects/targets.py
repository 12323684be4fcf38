"""What the kernels' object code is compiled for: no machine in particular, but every one that has what a form needs.

A target is a level of x86-64, which LLVM knows as a processor and tunes for, with what the form needs added and what else the level has
taken away. So an object depends on the kernels' sources, the compiler's version and the target, not on who compiles it. The portable form,
which names no instruction, has two: with SSE4.2, which all but the first few years' processors have, a batch takes a third less.
"""

import platform
from dataclasses import dataclass

from dairllm.kernels import forms, processor
from dairllm.kernels.objects.loader import MACHINES

__all__ = ["TARGETS", "Target", "current", "of_this_machine"]

_SCALAR = {
    "x86-64": (),
    "x86-64-v2": ("crc32", "cx16", "popcnt", "sahf"),
    "x86-64-v3": ("bmi", "bmi2", "crc32", "cx16", "lzcnt", "movbe", "popcnt", "sahf", "xsave"),
}
"""What a level has besides vector instructions. No form needs it, and not every virtual machine that has the vectors has it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What one object is compiled for.

    Attributes:
        form: of the kernels.
        level: the processor, by LLVM's name.
        needs: what a processor must have to run it, by LLVM's names.
    """

    form: str
    level: str
    needs: frozenset[str]

    def __str__(self) -> str:
        return f"{self.form} for {self.level}"

    @property
    def features(self) -> str:
        """What the compiler may use and what not, as LLVM reads it."""
        return ",".join([f"+{name}" for name in sorted(self.needs)] + [f"-{name}" for name in _SCALAR[self.level]])


TARGETS = (
    Target("avx512vnni", "x86-64-v3", forms.needs("avx512vnni")),
    Target("avxvnni", "x86-64-v3", forms.needs("avxvnni")),
    Target("avx2", "x86-64-v3", forms.needs("avx2")),
    Target("portable", "x86-64-v2", frozenset({"ssse3", "sse4.1", "sse4.2"})),
    Target("portable", "x86-64", forms.needs("portable")),
)
"""Best first."""


def of_this_machine() -> tuple[Target, ...]:
    """Targets that can be compiled here, whether or not this processor could run them; none on a machine without a loader for objects."""
    return TARGETS if platform.machine() in MACHINES else ()


def current() -> Target | None:
    """The target that this process takes, in its form; None where it has none, and numba compiles in the process."""
    form, features = forms.current(), processor.features()
    return next((target for target in of_this_machine() if target.form == form and target.needs <= features), None)
