"""One thread's part of attention. See steps.py for the calling convention.

One row: threads claim runs of (KV head, chunk) pairs; then, behind a barrier, the heads whose chunks are folded are dealt out. A batch:
they claim pairs of some rows and a KV head, the last rows first, which attend to more, and fold what they computed, each in its scratch.
"""

import numpy as np

from dairllm.graph.types import FloatType
from dairllm.kernels.attention import attend_chunk, fold_head
from dairllm.kernels.fields import fields_of
from dairllm.kernels.instructions import Kind
from dairllm.kernels.ir import load_f
from dairllm.kernels.kernel import kernel
from dairllm.kernels.sizes import CHUNK, attention_rows_together
from dairllm.kernels.steps import claim, part

__all__ = ["attend", "fold"]

F16, Q80 = int(FloatType.F16), int(FloatType.Q80)
_RUNS = 8
"""Runs of chunks that a thread claims, if all are equally fast."""
_attend_fields, _fold_fields = fields_of(Kind.ATTEND), fields_of(Kind.FOLD)
_rows_together = kernel(attention_rows_together)


@kernel
def _head_bytes(cache_type, head_dim):
    """Of one position's row in a cache."""
    if cache_type == Q80:
        return head_dim // 32 * 34
    return 2 * head_dim if cache_type == F16 else 4 * head_dim


@kernel
def attend(instruction, first_row, end_row, n_threads, scratch):
    f = _attend_fields(instruction)
    cache_type = f.cache_type
    head_bytes, chunk_bytes = 4 * f.head_dim, CHUNK * _head_bytes(cache_type, f.head_dim)
    part_bytes, stat_bytes = f.group * head_bytes, f.group * 8
    scale = np.float32(1) / np.sqrt(np.float32(f.head_dim))
    n_kv, n_rows = (f.n_heads + f.group - 1) // f.group, end_row - first_row
    together = _rows_together(f.group, f.head_dim, f.max_chunks)
    room = scratch + 4 * ((f.max_chunks + 15) // 16 * 16)
    scores = room + CHUNK * head_bytes
    my_parts = scores + together * f.group * CHUNK * 4
    my_stats = my_parts + together * f.max_chunks * part_bytes
    if n_rows == 1:
        chunks = (int(load_f(f.positions + 4 * first_row)) + CHUNK) // CHUNK
        n_runs = min(_RUNS * n_threads, n_kv * chunks)
        while True:
            run = claim(instruction, n_runs, n_threads)
            if run >= n_runs:
                return
            a, z = part(n_kv * chunks, run, n_runs)
            for unit in range(a, z):
                kv, c = unit // chunks, unit % chunks
                o = kv * f.head_stride + c * chunk_bytes
                at = kv * f.max_chunks + c
                attend_chunk(
                    f.q + first_row * f.q_row + kv * part_bytes,
                    f.q_row,
                    1,
                    f.positions + 4 * first_row,
                    f.keys + o,
                    f.values + o,
                    cache_type,
                    c * CHUNK,
                    head_bytes,
                    min(f.group, f.n_heads - kv * f.group),
                    scale,
                    scores,
                    room,
                    f.parts + at * part_bytes,
                    0,
                    f.stats + at * stat_bytes,
                    0,
                )
    together = min(together, max(1, n_rows * n_kv // (2 * n_threads)))  # enough units for all threads
    row_parts, row_stats = f.max_chunks * part_bytes, f.max_chunks * stat_bytes
    n_units = (n_rows + together - 1) // together * n_kv
    while True:
        unit = n_units - 1 - claim(instruction, n_units, n_threads)
        if unit < 0:
            return
        m, kv = first_row + unit // n_kv * together, unit % n_kv
        rows, heads = min(together, end_row - m), min(f.group, f.n_heads - kv * f.group)
        most = 0
        for i in range(m, m + rows):
            most = max(most, (int(load_f(f.positions + 4 * i)) + CHUNK) // CHUNK)
        for c in range(most):
            o = kv * f.head_stride + c * chunk_bytes
            attend_chunk(
                f.q + m * f.q_row + kv * part_bytes,
                f.q_row,
                rows,
                f.positions + 4 * m,
                f.keys + o,
                f.values + o,
                cache_type,
                c * CHUNK,
                head_bytes,
                heads,
                scale,
                scores,
                room,
                my_parts + c * part_bytes,
                row_parts,
                my_stats + c * stat_bytes,
                row_stats,
            )
        for i in range(rows):
            chunks = (int(load_f(f.positions + 4 * (m + i))) + CHUNK) // CHUNK
            for h in range(heads):
                fold_head(
                    my_parts + i * row_parts + h * head_bytes,
                    part_bytes,
                    my_stats + i * row_stats + 8 * h,
                    stat_bytes,
                    chunks,
                    head_bytes,
                    scratch,
                    f.y + (m + i) * f.y_row + (kv * f.group + h) * head_bytes,
                )


@kernel
def fold(instruction, first_row, end_row, thread, n_threads, scratch):
    f = _fold_fields(instruction)
    if end_row - first_row != 1:
        return
    head_bytes = 4 * f.head_dim
    chunks = (int(load_f(f.positions + 4 * first_row)) + CHUNK) // CHUNK
    a, z = part(f.n_heads, thread, n_threads)
    for head in range(a, z):
        kv, h = head // f.group, head % f.group
        first = kv * f.max_chunks * f.group
        fold_head(
            f.parts + (first + h) * head_bytes,
            f.group * head_bytes,
            f.stats + 8 * (first + h),
            8 * f.group,
            chunks,
            head_bytes,
            scratch,
            f.y + first_row * f.y_row + head * head_bytes,
        )
