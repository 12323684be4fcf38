"""Neighbouring steps that are computed as one, some blocks at a time, while the values are in the first-level cache.

What they write they write all the same, so that nothing need be known of who reads it. The bits are the same too.
"""

from collections.abc import Sequence
from itertools import pairwise

from dairllm.engine.step import Step
from dairllm.kernels.instructions import FIELDS, Kind

__all__ = ["MOST_STEPS", "fused"]

_FUSED = {
    (Kind.RMS_NORM, Kind.PACK): Kind.RMS_NORM_PACK,
    (Kind.SILU, Kind.MUL, Kind.PACK): Kind.SILU_MUL_PACK,
    (Kind.GELU, Kind.MUL, Kind.PACK): Kind.GELU_MUL_PACK,
}
MOST_STEPS = max(map(len, _FUSED))
"""That become one."""


def fused(recent: Sequence[Step], step: Step) -> tuple[int, Step] | None:
    """How many of the last steps can be computed as one with the one that follows, and that one; None: it stays alone."""
    for kinds, kind in _FUSED.items():
        if step.kind == kinds[-1] and len(recent) >= len(kinds) - 1:
            steps = [*recent[1 - len(kinds) :], step]
            if tuple(each.kind for each in steps) == kinds and (whole := _joined(kind, steps)):
                return len(kinds) - 1, whole
    return None


def _joined(kind: Kind, steps: Sequence[Step]) -> Step | None:
    if not all(_passes_on(step, following) for step, following in pairwise(steps)):
        return None
    values = {name: value for step in steps for name, value in step.values.items()}
    if kind == Kind.RMS_NORM_PACK:
        if values["n_columns"] != 1:
            return None
        values |= {"source": steps[0].values["x"], "source_row": steps[0].values["x_row"]}
    elif any(_place(step, "x") != _place(step, "y") for step in steps[:-1]) or values["factor"] == values["x"]:
        return None  # not in place, or multiplied by itself
    return Step(kind, [use for step in steps for use in step.uses], {name: values[name] for name in FIELDS[kind]})


def _passes_on(step: Step, following: Step) -> bool:
    """Whether the second takes all of what the first gives."""
    return _place(step, "y") == _place(following, "x")


def _place(step: Step, operand: str) -> tuple[int, ...]:
    """Address, strides, number of planes, width."""
    v = step.values
    width = v["n_columns"] * v["width"] if step.kind == Kind.RMS_NORM else v["n"]
    return v[operand], v[f"{operand}_row"], v.get(f"{operand}_plane", 0), v.get("planes", 1), width
