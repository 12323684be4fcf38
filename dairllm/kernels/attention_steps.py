"""One thread's part of attention. See steps.py for the calling convention.

One row: (KV head, chunk) pairs are dealt out in contiguous runs, then, behind a barrier, the heads whose chunks are
folded. A batch: (row, KV head) pairs are dealt to and fro, since later rows attend to more, and each thread folds what
it computed, in scratch of its own.
"""

import numpy as np
from numba import njit

from dairllm.kernels.attention import attend_chunk, fold_head
from dairllm.kernels.ir import load_f
from dairllm.kernels.sizes import CHUNK
from dairllm.kernels.steps import fields, part

__all__ = ["attend", "fold"]


@njit(nogil=True)
def attend(record, first_row, end_row, thread, n_threads, scratch):
    q, q_row, n_heads, group, head_dim, keys, values, head_stride, positions, y, y_row, parts, stats, max_chunks = fields(record)[:14]
    head_bytes = 4 * head_dim
    part_bytes, stat_bytes = group * head_bytes, group * 8
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    n_kv = (n_heads + group - 1) // group
    coefficients = scratch + group * CHUNK * 4
    if end_row - first_row == 1:
        length = int(load_f(positions + 4 * first_row)) + 1
        chunks = (length + CHUNK - 1) // CHUNK
        a, z = part(n_kv * chunks, thread, n_threads)
        for unit in range(a, z):
            kv, c = unit // chunks, unit % chunks
            o = kv * head_stride + c * CHUNK * head_bytes
            at = kv * max_chunks + c
            heads = min(group, n_heads - kv * group)
            count = min(CHUNK, length - c * CHUNK)
            attend_chunk(
                q + first_row * q_row + kv * part_bytes,
                keys + o,
                values + o,
                head_bytes,
                heads,
                count,
                scale,
                scratch,
                parts + at * part_bytes,
                stats + at * stat_bytes,
            )
        return
    my_stats = coefficients + 4 * ((max_chunks + 15) // 16 * 16)
    my_parts = my_stats + max_chunks * stat_bytes
    for unit in range((end_row - first_row) * n_kv):
        turn = unit % (2 * n_threads)
        if thread != min(turn, 2 * n_threads - 1 - turn):
            continue
        m, kv = first_row + unit // n_kv, unit % n_kv
        length = int(load_f(positions + 4 * m)) + 1
        chunks = (length + CHUNK - 1) // CHUNK
        heads = min(group, n_heads - kv * group)
        for c in range(chunks):
            o = kv * head_stride + c * CHUNK * head_bytes
            count = min(CHUNK, length - c * CHUNK)
            attend_chunk(
                q + m * q_row + kv * part_bytes,
                keys + o,
                values + o,
                head_bytes,
                heads,
                count,
                scale,
                scratch,
                my_parts + c * part_bytes,
                my_stats + c * stat_bytes,
            )
        for h in range(heads):
            out = y + m * y_row + (kv * group + h) * head_bytes
            fold_head(my_parts + h * head_bytes, part_bytes, my_stats + 8 * h, stat_bytes, chunks, head_bytes, coefficients, out)


@njit(nogil=True)
def fold(record, first_row, end_row, thread, n_threads, scratch):
    _, _, n_heads, group, head_dim, _, _, _, positions, y, y_row, parts, stats, max_chunks = fields(record)[:14]
    if end_row - first_row != 1:
        return
    head_bytes = 4 * head_dim
    chunks = (int(load_f(positions + 4 * first_row)) + CHUNK) // CHUNK
    a, z = part(n_heads, thread, n_threads)
    for head in range(a, z):
        kv, h = head // group, head % group
        first = kv * max_chunks * group
        fold_head(
            parts + (first + h) * head_bytes,
            group * head_bytes,
            stats + 8 * (first + h),
            8 * group,
            chunks,
            head_bytes,
            scratch + group * CHUNK * 4,
            y + first_row * y_row + head * head_bytes,
        )
