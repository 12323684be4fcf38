"""The program that compute threads interpret: instructions of INSTRUCTION_WORDS int64, an opcode and its fields. Written by
dairllm.engine.ops, read by dairllm.kernels.interpreter.

Addresses are raw, so a program belongs to the memory it was compiled for. `*_row` and `*_plane` are byte strides from
one row of the batch and one plane to the next. Rows, columns and planes are counted in values unless the name says
blocks.
"""

from collections.abc import Mapping
from enum import IntEnum

__all__ = ["ALWAYS_ROWS", "CLAIMS", "FIELDS", "INSTRUCTION_WORDS", "MAX_FIELDS", "UNIT", "Kind", "State", "pack"]

INSTRUCTION_WORDS = 18
CLAIMS = INSTRUCTION_WORDS - 1
"""The word that threads count up who claim parts of an instruction's work (steps.claim): how many they have taken. 0 between runs."""
MAX_FIELDS = CLAIMS - 1
"""All words but the kind and CLAIMS."""
UNIT = 32
"""Columns dealt to threads together: a block of a quantized row, and two cache lines of floats, so that no line has two writers."""
ALWAYS_ROWS = 1
"""Flag of PACK: row panels are wanted for large batches as well."""


class State(IntEnum):
    """Words of the state block, which the host writes before each run."""

    FIRST_ROW = 0
    END_ROW = 1
    PROFILE = 2


class Kind(IntEnum):
    BARRIER = 0
    EMBED = 1
    COPY = 2
    TO_BLOCKS = 3
    FROM_BLOCKS = 4
    MERGE_ADD_F32 = 5
    MERGE_ADD_BLOCKS = 6
    PACK = 7
    PACK_BLOCKS = 8
    INV_RMS = 9
    RMS_NORM = 10
    # matmuls are neighbours: the interpreter asks for the range
    MATMUL_F32 = 11
    MATMUL_Q40 = 12
    MATMUL_Q80 = 13
    EXPERTS_F32 = 14
    EXPERTS_Q40 = 15
    EXPERTS_Q80 = 16
    ROPE_NEIGHBOURS = 17
    ROPE_HALVES = 18
    SHIFT = 19
    ATTEND = 20
    FOLD = 21
    SILU = 22
    GELU = 23
    MUL = 24
    SCALE = 25
    SOFTMAX = 26
    GATE = 27
    MERGE_SUM = 28
    # neighbours that are computed as one (dairllm.engine.fusion)
    RMS_NORM_PACK = 29
    SILU_MUL_PACK = 30
    GELU_MUL_PACK = 31


_MAP = ("x", "x_row", "x_plane", "y", "y_row", "y_plane", "n", "planes")
_FACTOR = ("factor", "factor_row", "factor_plane")
_PACK = ("n", "planes", "panels", "panels_row", "panels_plane", "tiles", "tile_stride", "flags", "x", "x_row", "x_plane")
_MATMUL = ("claimed", "d", "panels", "panels_row", "tiles", "tile_stride", "weights", "weights_row", "n_blocks", "y", "y_row")
_EXPERTS = (
    "claimed",
    "d",
    "x",
    "x_row",
    "x_plane",
    "weights",
    "weights_row",
    "weights_expert",
    "n",
    "y",
    "y_row",
    "y_plane",
    "indexes",
    "k",
    "n_experts",
)
_ROPE = ("x", "x_row", "n", "head_dim", "table", "positions")
_MERGE_ADD = ("x", "x_row", "x_slice", "n_slices", "y", "y_row", "n")
_ATTEND = (
    "q",
    "q_row",
    "n_heads",
    "group",
    "head_dim",
    "keys",
    "values",
    "head_stride",
    "positions",
    "y",
    "y_row",
    "parts",
    "stats",
    "max_chunks",
    "cache_type",
)

FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.BARRIER: (),
    Kind.EMBED: ("tokens", "table", "vocab", "n", "y", "y_row"),
    Kind.COPY: _MAP,
    Kind.TO_BLOCKS: _MAP,
    Kind.FROM_BLOCKS: _MAP,
    Kind.MERGE_ADD_F32: _MERGE_ADD,
    Kind.MERGE_ADD_BLOCKS: _MERGE_ADD,
    Kind.PACK: _PACK,
    Kind.PACK_BLOCKS: _PACK,
    Kind.INV_RMS: ("x", "x_row", "y", "y_row", "n_columns", "width", "epsilon_bits"),
    Kind.RMS_NORM: ("x", "x_row", "inverse", "inverse_row", "weights", "y", "y_row", "n_columns", "width"),
    Kind.MATMUL_F32: ("claimed", "d", "x", "x_row", "weights", "weights_row", "n", "y", "y_row"),
    Kind.MATMUL_Q40: _MATMUL,
    Kind.MATMUL_Q80: _MATMUL,
    Kind.EXPERTS_F32: _EXPERTS,
    Kind.EXPERTS_Q40: _EXPERTS,
    Kind.EXPERTS_Q80: _EXPERTS,
    Kind.ROPE_NEIGHBOURS: _ROPE,
    Kind.ROPE_HALVES: _ROPE,
    Kind.SHIFT: ("x", "x_row", "n", "head_dim", "cache", "head_stride", "positions", "cache_type"),
    Kind.ATTEND: _ATTEND,
    Kind.FOLD: _ATTEND,
    Kind.SILU: _MAP,
    Kind.GELU: _MAP,
    Kind.MUL: (*_MAP, *_FACTOR),
    Kind.SCALE: (*_MAP, *_FACTOR),
    Kind.SOFTMAX: ("x", "x_row", "n"),
    Kind.GATE: ("x", "x_row", "n", "k", "normalise", "indexes", "weights", "weights_row", "weights_plane"),
    Kind.MERGE_SUM: ("x", "x_row", "x_plane", "planes", "y", "y_row", "n"),
    Kind.RMS_NORM_PACK: (*_PACK, "source", "source_row", "inverse", "inverse_row", "weights"),
    Kind.SILU_MUL_PACK: (*_PACK, *_FACTOR),
    Kind.GELU_MUL_PACK: (*_PACK, *_FACTOR),
}
"""Names of each kind's fields, in the order of their words. Packed by `pack`, read by dairllm.kernels.fields."""


def _check() -> None:
    """A field beyond the last word would lie in CLAIMS, which threads count up."""
    for kind in Kind:
        names = FIELDS[kind]
        if len(names) > MAX_FIELDS or len(set(names)) < len(names):
            raise ValueError(f"{kind.name} has {len(names)} fields; expected up to {MAX_FIELDS} of different names")


_check()


def pack(kind: Kind, values: Mapping[str, int]) -> list[int]:
    """An instruction's words.

    Args:
        values: the kind's FIELDS, all of them.

    Raises:
        ValueError: a field is missing, or not one of the kind's.
    """
    names = FIELDS[kind]
    if wrong := values.keys() ^ set(names):
        raise ValueError(f"fields of {kind.name} that are missing, or that it does not have: {', '.join(sorted(wrong))}")
    return [kind, *(values[name] for name in names)] + [0] * (INSTRUCTION_WORDS - 1 - len(names))
