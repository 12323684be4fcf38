"""What one thread does of each instruction: ``name(instruction, first_row, end_row, thread, n_threads)``.

A thread takes a static part of the columns (in UNITs) or of the rows, or claims parts as it goes; which of them decides where the
program needs barriers (dairllm.engine.ops). The order of the sums within an output never depends on it.
"""

import numpy as np

from dairllm.graph.types import FloatType
from dairllm.kernels import elementwise
from dairllm.kernels.fields import fields_of
from dairllm.kernels.half import values_to_halves
from dairllm.kernels.instructions import CLAIMS, UNIT, Kind
from dairllm.kernels.ir import load_f, store_f, to_integer
from dairllm.kernels.kernel import kernel
from dairllm.kernels.matmul_f32 import sum_squares
from dairllm.kernels.moe import choose_experts, softmax
from dairllm.kernels.quantize import add_blocks, blocks_to_values, eight_to_blocks, values_to_blocks
from dairllm.kernels.rope import rotate_halves, rotate_neighbours
from dairllm.kernels.threads import atomic_add, atomic_store

__all__ = [
    "claim",
    "columns",
    "embed",
    "gate",
    "inv_rms",
    "map_columns",
    "merge_add",
    "merge_sum",
    "part",
    "rms_norm",
    "rope",
    "shift",
    "soft_max",
]

COPY, TO_BLOCKS, FROM_BLOCKS, SILU, GELU, MUL = (
    int(k) for k in (Kind.COPY, Kind.TO_BLOCKS, Kind.FROM_BLOCKS, Kind.SILU, Kind.GELU, Kind.MUL)
)
F16, Q80 = int(FloatType.F16), int(FloatType.Q80)
MERGE_ADD_BLOCKS, ROPE_HALVES = int(Kind.MERGE_ADD_BLOCKS), int(Kind.ROPE_HALVES)

_embed_fields = fields_of(Kind.EMBED)
_map_fields = fields_of(Kind.COPY, Kind.TO_BLOCKS, Kind.FROM_BLOCKS, Kind.SILU, Kind.GELU, Kind.MUL, Kind.SCALE)
_factor_fields = fields_of(Kind.MUL, Kind.SCALE)
_merge_add_fields = fields_of(Kind.MERGE_ADD_F32, Kind.MERGE_ADD_BLOCKS)
_merge_sum_fields = fields_of(Kind.MERGE_SUM)
_inv_rms_fields = fields_of(Kind.INV_RMS)
_rms_norm_fields = fields_of(Kind.RMS_NORM)
_rope_fields = fields_of(Kind.ROPE_NEIGHBOURS, Kind.ROPE_HALVES)
_shift_fields = fields_of(Kind.SHIFT)
_softmax_fields = fields_of(Kind.SOFTMAX)
_gate_fields = fields_of(Kind.GATE)


@kernel
def part(n, thread, n_threads):
    """This thread's contiguous part of n things."""
    return n * thread // n_threads, n * (thread + 1) // n_threads


@kernel
def columns(n, thread, n_threads):
    """This thread's part of n columns, in whole UNITs."""
    first, last = part((n + UNIT - 1) // UNIT, thread, n_threads)
    return first * UNIT, min(last * UNIT, n)


@kernel
def claim(instruction, n, n_threads):
    """Which of an instruction's n parts this thread is to compute next; n or more: all are taken.

    Threads are never equally fast: cores differ, and are shared with other work. Each asks until it is told that all are taken, and the
    last one to be told so leaves the count at 0 for the next run.
    """
    taken = atomic_add(instruction + 8 * CLAIMS, 1)
    if taken == n + n_threads - 1:
        atomic_store(instruction + 8 * CLAIMS, 0)
    return taken


@kernel
def embed(instruction, first_row, end_row, thread, n_threads):
    f = _embed_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    for m in range(first_row, end_row):
        token = min(max(to_integer(load_f(f.tokens + 4 * m)), 0), f.vocab - 1)
        elementwise.copy(f.y + m * f.y_row + 4 * a, z - a, f.table + 4 * (token * f.n + a))


@kernel
def map_columns(kind, instruction, first_row, end_row, thread, n_threads):
    """Copies, conversions and activations: column by column."""
    f, other = _map_fields(instruction), _factor_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    for plane in range(f.planes):
        for m in range(first_row, end_row):
            source = f.x + plane * f.x_plane + m * f.x_row
            out = f.y + plane * f.y_plane + m * f.y_row
            if kind == COPY:
                elementwise.copy(out + 4 * a, z - a, source + 4 * a)
            elif kind == TO_BLOCKS:
                eights = (z - a) // 256
                for i in range(eights):
                    eight_to_blocks(source, a // 32 + 8 * i, out)
                values_to_blocks(source, a // 32 + 8 * eights, z // 32, out)
            elif kind == FROM_BLOCKS:
                blocks_to_values(source, a // 32, z // 32, out)
            elif kind == SILU:
                elementwise.silu(out + 4 * a, z - a, source + 4 * a)
            elif kind == GELU:
                elementwise.gelu(out + 4 * a, z - a, source + 4 * a)
            elif kind == MUL:
                elementwise.multiply(
                    out + 4 * a, z - a, source + 4 * a, other.factor + plane * other.factor_plane + m * other.factor_row + 4 * a
                )
            else:  # SCALE
                elementwise.scale(
                    out + 4 * a, z - a, source + 4 * a, load_f(other.factor + plane * other.factor_plane + m * other.factor_row)
                )


@kernel
def merge_add(kind, instruction, first_row, end_row, thread, n_threads):
    f = _merge_add_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    for m in range(first_row, end_row):
        out = f.y + m * f.y_row
        for s in range(f.n_slices):
            source = f.x + s * f.x_slice + m * f.x_row
            if kind == MERGE_ADD_BLOCKS:
                add_blocks(source, a // 32, z // 32, out)
            else:
                elementwise.add(out + 4 * a, z - a, out + 4 * a, source + 4 * a)


@kernel
def merge_sum(instruction, first_row, end_row, thread, n_threads):
    f = _merge_sum_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    for m in range(first_row, end_row):
        out, source = f.y + m * f.y_row + 4 * a, f.x + m * f.x_row + 4 * a
        elementwise.copy(out, z - a, source)
        for plane in range(1, f.planes):
            elementwise.add(out, z - a, out, source + plane * f.x_plane)


@kernel
def inv_rms(instruction, first_row, end_row, thread, n_threads):
    """Rows and their parts are dealt out in turn."""
    f = _inv_rms_fields(instruction)
    epsilon = np.int32(f.epsilon_bits).view(np.float32)
    unit = first_row * f.n_columns + thread
    while unit < end_row * f.n_columns:
        m, c = unit // f.n_columns, unit % f.n_columns
        mean = sum_squares(f.x + m * f.x_row + 4 * c * f.width, f.width) / np.float32(f.width)
        store_f(f.y + m * f.y_row + 4 * c, np.float32(1) / np.sqrt(mean + epsilon))
        unit += n_threads


@kernel
def rms_norm(instruction, first_row, end_row, thread, n_threads):
    f = _rms_norm_fields(instruction)
    a, z = columns(f.n_columns * f.width, thread, n_threads)
    for m in range(first_row, end_row):
        c = a
        while c < z:
            head, d = c // f.width, c % f.width
            run = min(f.width - d, z - c)
            elementwise.norm(
                f.y + m * f.y_row + 4 * c,
                run,
                f.x + m * f.x_row + 4 * c,
                f.weights + 4 * d,
                load_f(f.inverse + m * f.inverse_row + 4 * head),
            )
            c += run


@kernel
def rope(kind, instruction, first_row, end_row, thread, n_threads):
    f = _rope_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    h0, h1 = part(f.n // f.head_dim, thread, n_threads)
    for m in range(first_row, end_row):
        row = f.table + int(load_f(f.positions + 4 * m)) * f.head_dim * 4
        if kind == ROPE_HALVES:
            for h in range(h0, h1):
                rotate_halves(f.x + m * f.x_row + 4 * h * f.head_dim, row, f.head_dim)
        else:
            rotate_neighbours(f.x + m * f.x_row, row, f.head_dim, a, z)


@kernel
def shift(instruction, first_row, end_row, thread, n_threads):
    """A row of K or V into the cache, [head][position][head_dim], of values, halves or blocks: then UNITs are whole blocks."""
    f = _shift_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    for m in range(first_row, end_row):
        position = int(load_f(f.positions + 4 * m))
        c = a
        while c < z:
            head, d = c // f.head_dim, c % f.head_dim
            run = min(f.head_dim - d, z - c)
            source, out = f.x + m * f.x_row + 4 * c, f.cache + head * f.head_stride
            if f.cache_type == Q80:
                values_to_blocks(source, 0, run // 32, out + (position * f.head_dim + d) // 32 * 34)
            elif f.cache_type == F16:
                values_to_halves(source, run // 8, out + 2 * (position * f.head_dim + d))
            else:
                elementwise.copy(out + 4 * (position * f.head_dim + d), run, source)
            c += run


@kernel
def soft_max(instruction, first_row, end_row, thread, n_threads):
    f = _softmax_fields(instruction)
    m = first_row + thread
    while m < end_row:
        softmax(f.x + m * f.x_row, f.n)
        m += n_threads


@kernel
def gate(instruction, first_row, end_row, thread, n_threads):
    f = _gate_fields(instruction)
    m = first_row + thread
    while m < end_row:
        choose_experts(f.x + m * f.x_row, f.n, f.k, f.normalise, f.indexes + 8 * f.k * m, f.weights + m * f.weights_row, f.weights_plane)
        m += n_threads
