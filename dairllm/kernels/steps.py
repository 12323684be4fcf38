"""What one thread does of each record: ``name(record, first_row, end_row, thread, n_threads)``.

A thread takes a static part of the columns (in UNITs) or of the rows, or claims parts as it goes; which of them decides where the
program needs barriers (dairllm.engine.ops). The order of the sums within an output never depends on it.
"""

import numpy as np

from dairllm.graph.types import FloatType
from dairllm.kernels import elementwise
from dairllm.kernels.half import values_to_halves
from dairllm.kernels.ir import load_f, load_i, store_f, to_integer
from dairllm.kernels.kernel import kernel
from dairllm.kernels.matmul_f32 import sum_squares
from dairllm.kernels.moe import choose_experts, softmax
from dairllm.kernels.quantize import add_blocks, blocks_to_values, eight_to_blocks, values_to_blocks
from dairllm.kernels.records import CLAIMS, UNIT, Kind
from dairllm.kernels.rope import rotate_halves, rotate_neighbours
from dairllm.kernels.threads import atomic_add, atomic_store

__all__ = [
    "claim",
    "columns",
    "embed",
    "fields",
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
def fields(record):
    """All fields of a record; take as many as its kind has (records.FIELDS)."""
    r = record
    return (
        load_i(r + 8),
        load_i(r + 16),
        load_i(r + 24),
        load_i(r + 32),
        load_i(r + 40),
        load_i(r + 48),
        load_i(r + 56),
        load_i(r + 64),
        load_i(r + 72),
        load_i(r + 80),
        load_i(r + 88),
        load_i(r + 96),
        load_i(r + 104),
        load_i(r + 112),
        load_i(r + 120),
        load_i(r + 128),
    )


@kernel
def claim(record, n, n_threads):
    """Which of a record's n parts this thread is to compute next; n or more: all are taken.

    Threads are never equally fast: cores differ, and are shared with other work. Each asks until it is told that all are taken, and the
    last one to be told so leaves the count at 0 for the next run.
    """
    taken = atomic_add(record + 8 * CLAIMS, 1)
    if taken == n + n_threads - 1:
        atomic_store(record + 8 * CLAIMS, 0)
    return taken


@kernel
def embed(record, first_row, end_row, thread, n_threads):
    tokens, table, vocab, n, y, y_row = fields(record)[:6]
    a, z = columns(n, thread, n_threads)
    for m in range(first_row, end_row):
        token = min(max(to_integer(load_f(tokens + 4 * m)), 0), vocab - 1)
        elementwise.copy(y + m * y_row + 4 * a, z - a, table + 4 * (token * n + a))


@kernel
def map_columns(kind, record, first_row, end_row, thread, n_threads):
    """Copies, conversions and activations: column by column."""
    x, x_row, x_plane, y, y_row, y_plane, n, planes, other, other_row, other_plane = fields(record)[:11]
    a, z = columns(n, thread, n_threads)
    for plane in range(planes):
        for m in range(first_row, end_row):
            source = x + plane * x_plane + m * x_row
            out = y + plane * y_plane + m * y_row
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
                elementwise.multiply(out + 4 * a, z - a, source + 4 * a, other + plane * other_plane + m * other_row + 4 * a)
            else:  # SCALE
                elementwise.scale(out + 4 * a, z - a, source + 4 * a, load_f(other + plane * other_plane + m * other_row))


@kernel
def merge_add(kind, record, first_row, end_row, thread, n_threads):
    x, x_row, x_slice, n_slices, y, y_row, n = fields(record)[:7]
    a, z = columns(n, thread, n_threads)
    for m in range(first_row, end_row):
        out = y + m * y_row
        for s in range(n_slices):
            source = x + s * x_slice + m * x_row
            if kind == MERGE_ADD_BLOCKS:
                add_blocks(source, a // 32, z // 32, out)
            else:
                elementwise.add(out + 4 * a, z - a, out + 4 * a, source + 4 * a)


@kernel
def merge_sum(record, first_row, end_row, thread, n_threads):
    x, x_row, x_plane, planes, y, y_row, n = fields(record)[:7]
    a, z = columns(n, thread, n_threads)
    for m in range(first_row, end_row):
        out, source = y + m * y_row + 4 * a, x + m * x_row + 4 * a
        elementwise.copy(out, z - a, source)
        for plane in range(1, planes):
            elementwise.add(out, z - a, out, source + plane * x_plane)


@kernel
def inv_rms(record, first_row, end_row, thread, n_threads):
    """Rows and their parts are dealt out in turn."""
    x, x_row, y, y_row, n_columns, width, epsilon_bits = fields(record)[:7]
    epsilon = np.int32(epsilon_bits).view(np.float32)
    unit = first_row * n_columns + thread
    while unit < end_row * n_columns:
        m, c = unit // n_columns, unit % n_columns
        mean = sum_squares(x + m * x_row + 4 * c * width, width) / np.float32(width)
        store_f(y + m * y_row + 4 * c, np.float32(1) / np.sqrt(mean + epsilon))
        unit += n_threads


@kernel
def rms_norm(record, first_row, end_row, thread, n_threads):
    x, x_row, inverse, inverse_row, weights, y, y_row, n_columns, width = fields(record)[:9]
    a, z = columns(n_columns * width, thread, n_threads)
    for m in range(first_row, end_row):
        c = a
        while c < z:
            head, d = c // width, c % width
            run = min(width - d, z - c)
            elementwise.norm(
                y + m * y_row + 4 * c, run, x + m * x_row + 4 * c, weights + 4 * d, load_f(inverse + m * inverse_row + 4 * head)
            )
            c += run


@kernel
def rope(kind, record, first_row, end_row, thread, n_threads):
    x, x_row, n, head_dim, table, positions = fields(record)[:6]
    a, z = columns(n, thread, n_threads)
    h0, h1 = part(n // head_dim, thread, n_threads)
    for m in range(first_row, end_row):
        row = table + int(load_f(positions + 4 * m)) * head_dim * 4
        if kind == ROPE_HALVES:
            for h in range(h0, h1):
                rotate_halves(x + m * x_row + 4 * h * head_dim, row, head_dim)
        else:
            rotate_neighbours(x + m * x_row, row, head_dim, a, z)


@kernel
def shift(record, first_row, end_row, thread, n_threads):
    """A row of K or V into the cache, [head][position][head_dim], of values, halves or blocks: then UNITs are whole blocks."""
    x, x_row, n, head_dim, cache, head_stride, positions, cache_type = fields(record)[:8]
    a, z = columns(n, thread, n_threads)
    for m in range(first_row, end_row):
        position = int(load_f(positions + 4 * m))
        c = a
        while c < z:
            head, d = c // head_dim, c % head_dim
            run = min(head_dim - d, z - c)
            source, out = x + m * x_row + 4 * c, cache + head * head_stride
            if cache_type == Q80:
                values_to_blocks(source, 0, run // 32, out + (position * head_dim + d) // 32 * 34)
            elif cache_type == F16:
                values_to_halves(source, run // 8, out + 2 * (position * head_dim + d))
            else:
                elementwise.copy(out + 4 * (position * head_dim + d), run, source)
            c += run


@kernel
def soft_max(record, first_row, end_row, thread, n_threads):
    x, x_row, n = fields(record)[:3]
    m = first_row + thread
    while m < end_row:
        softmax(x + m * x_row, n)
        m += n_threads


@kernel
def gate(record, first_row, end_row, thread, n_threads):
    x, x_row, n, k, normalise, indexes, weights, weights_row, weights_plane = fields(record)[:9]
    m = first_row + thread
    while m < end_row:
        choose_experts(x + m * x_row, n, k, normalise, indexes + 8 * k * m, weights + m * weights_row, weights_plane)
        m += n_threads
